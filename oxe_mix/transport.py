"""Bytes from where datasets lie, always without credentials: ranges of files, and small texts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from oxe_mix.filesystems import open_fsspec
from oxe_mix.http_client import open_http
from oxe_mix.source_file import (
    FileMissingError,
    Patience,
    SourceError,
    Stream,
    TransientError,
    scheme,
    with_retries,
)

_TEXT_RETRIES = 3


@contextmanager
def open_range(url: str, start: int, end: int | None, stall_s: float) -> Iterator[Stream]:
    """Open bytes start to end - 1 of a file (end None: to its end); only what is read is transferred.

    Raises: SourceError when the file is not there or not ours to read, TransientError for what may pass;
        both also while chunks are read.
    """
    if scheme(url) in ("gs", "http", "https"):
        with open_http(url, start, end, stall_s) as stream:
            yield stream
    else:
        with open_fsspec(url, start, end) as stream:
            yield stream


def read_text(url: str, patience: Patience) -> str | None:
    """A small file as text; None when it is not there. Raises: SourceError."""

    def read() -> str | None:
        try:
            with open_range(url, 0, None, patience.stall_s) as stream:
                return b"".join(stream.chunks).decode()
        except FileMissingError:
            return None

    # Nothing is lost yet, and somebody waits: a source that is not there shall say so in seconds.
    try:
        return with_retries(read, replace(patience, retries=min(patience.retries, _TEXT_RETRIES)))
    except TransientError as error:
        raise SourceError(f"{url}: cannot be read ({error})") from error
    except UnicodeDecodeError as error:
        raise SourceError(f"{url}: is no text ({error})") from error
