"""What is known of a file at a source, and what can go wrong with it."""

from __future__ import annotations

import base64
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from oxe_mix.errors import UserError

CHUNK = 1 << 20
_MAX_WAIT_S = 60.0
_MAX_DOUBLINGS = 8  # by then a wait is longer than the longest

T = TypeVar("T")


class SourceError(UserError):
    """A file at the source cannot be had, and trying again would not help."""


class FileMissingError(SourceError):
    """There is no such file at the source."""


class TransientError(Exception):
    """The network or the server failed in a way that often passes; `retry_after` is what the server asked
    for, seconds.
    """

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to go on when a source fails: tries in a row without a byte gained, and seconds of silence."""

    retries: int = 6
    stall_s: float = 30.0


@dataclass(frozen=True, slots=True)
class SourceFile:
    """What a source says of a file: bytes, and a mark that changes with its content (`crc32c:…` or
    `etag:…`).
    """

    size: int | None = None
    check: str | None = None

    def __str__(self) -> str:
        size = "of unknown size" if self.size is None else f"{self.size:,} bytes"
        return f"{size}, {self.check}" if self.check else size

    @property
    def anywhere(self) -> SourceFile:
        """What holds for copies at other addresses, too: an entity tag is its own server's."""
        return SourceFile(self.size) if (self.check or "").startswith("etag:") else self

    def merged(self, other: SourceFile) -> SourceFile:
        """What both of them know."""
        return SourceFile(other.size if self.size is None else self.size, self.check or other.check)

    def differs(self, other: SourceFile) -> bool:
        """Whether both know something and it does not agree."""
        pairs = ((self.size, other.size), (self.check, other.check))
        return any(a is not None and b is not None and _comparable(a, b) and a != b for a, b in pairs)


def _comparable(a: object, b: object) -> bool:
    return str(a).split(":", 1)[0] == str(b).split(":", 1)[0] or not isinstance(a, str)


def source_file_from_json(value: Any) -> SourceFile:
    """The inverse of `dataclasses.asdict`. Raises: TypeError for anything else."""
    file = SourceFile(**value)
    if not isinstance(file.size, int | None) or not isinstance(file.check, str | None):
        raise TypeError(f"{value} is no SourceFile")
    return file


@dataclass(frozen=True, slots=True)
class Stream:
    """A file opened at some byte."""

    file: SourceFile
    chunks: Iterator[bytes]


def with_retries(call: Callable[[], T], patience: Patience) -> T:
    """Call until it does not raise TransientError, or patience ends; then that error."""
    for attempt in range(1, patience.retries + 1):
        try:
            return call()
        except TransientError as error:
            pause(attempt, error)
    return call()


def pause(attempt: int, error: TransientError) -> None:
    """Wait after failed try number `attempt`: what the server asked for, else 0.25, 0.5, 1, … s; with jitter,
    so that workers do not come back all at once.
    """
    doubled = 2 ** min(attempt - 1, _MAX_DOUBLINGS)
    wait = 0.25 * doubled if error.retry_after is None else error.retry_after
    time.sleep(min(_MAX_WAIT_S, wait) * random.uniform(1.0, 1.5))


def scheme(url: str) -> str:
    """`gs`, `https`, …; a plain path is a `file`."""
    return url.split("://", 1)[0] if "://" in url else "file"


def crc32c_check(crc: int) -> str:
    """A file's crc32c as `SourceFile.check` writes it."""
    return f"crc32c:{crc:08x}"


def base64_check(crc: str) -> str:
    """The same from a bucket's own notation."""
    return f"crc32c:{base64.b64decode(crc).hex()}"


def etag_check(etag: str) -> str:
    """An entity tag as `SourceFile.check` writes it."""
    return f"etag:{etag.removeprefix('W/').strip(chr(34))}"
