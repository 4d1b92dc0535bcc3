"""What fsspec does for us: folders and s3:// are read, and all but plain web servers listed, through it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from oxe_mix.source_file import (
    CHUNK,
    FileMissingError,
    SourceError,
    SourceFile,
    Stream,
    TransientError,
    base64_check,
    etag_check,
    scheme,
)

# Public buckets: whatever credentials the machine has are neither read nor sent.
_ANONYMOUS: dict[str, dict[str, Any]] = {"gs": {"token": "anon"}, "s3": {"anon": True}}


def list_folder(url: str) -> dict[str, SourceFile] | None:
    """The files of a folder by name; None when this kind of source cannot be listed.

    Raises: SourceError.
    """
    if scheme(url) in ("http", "https"):
        return None
    try:
        filesystem, path = filesystem_of(url)
        entries = filesystem.ls(path, detail=True)
    except _errors(scheme(url)) as error:
        raise SourceError(f"{url}: cannot be listed ({type(error).__name__}: {error})") from error
    return {
        entry["name"].rsplit("/", 1)[-1]: SourceFile(entry.get("size"), _check(entry))
        for entry in entries
        if entry["type"] == "file"
    }


@contextmanager
def open_fsspec(url: str, start: int, end: int | None) -> Iterator[Stream]:
    """Open a range of a file that fsspec reads; see `transport.open_range`."""
    stream, file = _opened(url, start)
    with stream:
        left = None if end is None else end - start
        yield Stream(file, _fsspec_chunks(url, stream, left))


def _opened(url: str, start: int) -> tuple[Any, SourceFile]:
    try:
        filesystem, path = filesystem_of(url)
        info = filesystem.info(path)
        stream = filesystem.open(path, "rb")
        stream.seek(start)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileMissingError(f"{url}: not there") from error
    except PermissionError as error:
        raise SourceError(f"{url}: no permission ({error}); sources are read without credentials") from error
    except _errors(scheme(url)) as error:
        raise _failure(url, error) from error
    return stream, SourceFile(info.get("size"), _check(info))


def _fsspec_chunks(url: str, stream: Any, left: int | None) -> Iterator[bytes]:
    try:
        while chunk := stream.read(CHUNK if left is None else min(CHUNK, left)):
            left = None if left is None else left - len(chunk)
            yield chunk
    except _errors(scheme(url)) as error:
        raise _failure(url, error) from error


def _failure(url: str, error: Exception) -> Exception:
    """A disk that cannot read will not read the next time either; a network may."""
    words = f"{type(error).__name__}: {error}"
    if scheme(url) == "file" or isinstance(error, (ImportError, ValueError)):
        return SourceError(f"{url}: cannot be read ({words})")
    return TransientError(words)


def filesystem_of(url: str) -> tuple[Any, str]:
    """fsspec's filesystem for a URL, without credentials, and the path inside it."""
    import fsspec

    # gcsfs asks every bucket over gRPC whether it has folders of its own; without credentials that takes a
    # minute and says no.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    options = _ANONYMOUS.get(scheme(url), {})
    filesystem, path = fsspec.core.url_to_fs(url, **options)
    return filesystem, str(path)


@cache
def _errors(kind: str) -> tuple[type[Exception], ...]:
    """What fsspec's filesystems raise; each brings its own kind."""
    errors: list[type[Exception]] = [OSError, ImportError, ValueError]
    if kind == "gs":
        import aiohttp
        from gcsfs.retry import HttpError

        errors += [HttpError, aiohttp.ClientError]
    if kind == "s3":
        from botocore.exceptions import BotoCoreError

        errors.append(BotoCoreError)
    return tuple(errors)


def _check(entry: dict[str, Any]) -> str | None:
    if "crc32c" in entry:
        return base64_check(entry["crc32c"])
    return etag_check(entry["ETag"]) if "ETag" in entry else None
