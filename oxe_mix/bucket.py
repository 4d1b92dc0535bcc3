"""A download's target in a bucket, which is the user's own: written with the credentials of the machine."""

from __future__ import annotations

import io
import json
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, cast

from oxe_mix.errors import UserError
from oxe_mix.files import BUSY_FILE
from oxe_mix.interrupt import held
from oxe_mix.source_file import scheme
from oxe_mix.writing import TargetError, safe


@dataclass(frozen=True, slots=True)
class BucketTarget:
    """See `oxe_mix.target.Target`. What the bucket or the way to it refuses is a TargetError."""

    root: str

    @property
    def durable(self) -> bool:
        """See Target."""
        return True

    def read(self, name: str) -> bytes | None:
        """See Target."""
        with self._reached(name) as (filesystem, path):
            try:
                return cast(bytes, filesystem.cat_file(path))
            except FileNotFoundError:
                return None

    def open(self, name: str) -> BinaryIO:
        """See Target."""
        with self._reached(name) as (filesystem, path):
            return cast(BinaryIO, io.BufferedReader(_Object(self.root, filesystem.open(path, "rb"))))

    def write(self, name: str, content: bytes) -> None:
        """See Target."""
        with self._reached(name) as (filesystem, path):
            filesystem.pipe_file(path, content)

    def append(self, name: str, line: str) -> None:
        """See Target."""

    def place(self, finished: Path, name: str) -> None:
        """See Target."""
        with self._reached(name) as (filesystem, path):
            filesystem.put_file(str(finished), path)  # an object appears when it is whole
        finished.unlink()

    def flush(self, name: str) -> None:
        """See Target."""

    def rename(self, old: str, new: str) -> None:
        """See Target."""
        with self._reached(old) as (filesystem, path):
            # Not mv: gcsfs would first try an interface that many stores do not have, for a minute.
            filesystem.cp_file(path, self._at(new)[1])
            filesystem.rm_file(path)

    def remove(self, name: str) -> None:
        """See Target."""
        with self._reached(name) as (filesystem, path):
            filesystem.invalidate_cache()
            if filesystem.exists(path):
                filesystem.rm(path, recursive=True)

    def sizes(self, folder: str) -> dict[str, int]:
        """See Target."""
        with self._reached(folder) as (filesystem, path):
            root = path.removesuffix(folder).rstrip("/") + "/"
            filesystem.invalidate_cache()
            found = filesystem.find(path, detail=True)
        return {name.removeprefix(root): int(entry["size"]) for name, entry in found.items()}

    def closed_folders(self) -> dict[str, str]:
        """See Target."""
        return {}

    def sweep(self, folder: str) -> None:
        """See Target."""

    @contextmanager
    def workspace(self, folder: str) -> Iterator[Path]:
        """See Target."""
        with tempfile.TemporaryDirectory(prefix="oxe-mix-") as path:
            yield Path(path)

    @contextmanager
    def hold(self, what: str) -> Iterator[None]:
        """See Target; a bucket knows no locks, so an object says who writes here, and who was killed left
        it.
        """
        self._take(what)
        with held(f"{self.root}/{BUSY_FILE}", self._let_go):
            try:
                yield
            finally:
                self._let_go()

    def free_bytes(self) -> int | None:
        """See Target."""
        return None

    def _take(self, what: str) -> None:
        who = json.dumps({**_here(), "pid": os.getpid(), "since": time.strftime("%F %T")}).encode()
        other = self.read(BUSY_FILE)
        if other is not None and _is_dead(other):
            self._let_go()
            other = None
        if other is None:  # some stores do not keep to `create`, so it was looked for as well
            with self._reached(BUSY_FILE) as (filesystem, path):
                try:
                    filesystem.pipe_file(path, who, mode="create")
                except FileExistsError:
                    other = filesystem.cat_file(path)
        # Ours, when an answer was lost on the way and the writing was tried again.
        if other not in (None, who):
            raise UserError(
                f"{self.root}: another {what} is writing here ({other.decode(errors='replace')}); "
                f"if that one was killed, delete {self.root}/{BUSY_FILE}"
            )

    def _let_go(self) -> None:
        with self._reached(BUSY_FILE) as (filesystem, path), suppress(FileNotFoundError):
            filesystem.rm_file(path)

    @contextmanager
    def _reached(self, name: str) -> Iterator[tuple[Any, str]]:
        """The filesystem, and where a name is in it. Raises: TargetError for what fails in the block."""
        with _reaching(self.root):
            yield self._at(name)

    def _at(self, name: str) -> tuple[Any, str]:
        import fsspec

        os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        url = f"{self.root}/{safe(name)}" if name else self.root
        try:
            filesystem, path = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise UserError(f"{self.root}: cannot be opened ({error}); expected a folder or gs://") from error
        return filesystem, str(path)


@contextmanager
def _reaching(root: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except _errors(scheme(root)) as error:
        words = f"{type(error).__name__}: {error}".removesuffix(": ")
        raise TargetError(f"{root}: cannot be reached or written ({words})") from error


class _Object(io.RawIOBase):
    """An open object; what breaks off while it is read is a TargetError, too."""

    def __init__(self, root: str, stream: Any) -> None:
        self._root, self._stream = root, stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        with _reaching(self._root):
            return int(self._stream.readinto(buffer))

    def close(self) -> None:
        self._stream.close()
        super().close()


def _here() -> dict[str, str]:
    """This machine, and which processes a process number of it counts: host names are not unique."""
    boot, space = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    marks = (boot.read_text().strip() if boot.exists() else "", os.readlink(space) if space.exists() else "")
    return {"host": socket.gethostname(), "boot": " ".join(marks)}


def _is_dead(who: bytes) -> bool:
    """Whether the one who holds a bucket was a process of this machine, and is no more."""
    try:
        note = json.loads(who)
        here, pid = {key: note[key] for key in ("host", "boot")}, note["pid"]
    except (ValueError, TypeError, KeyError):
        return False
    if here != _here() or not isinstance(pid, int) or pid <= 0:
        return False
    try:
        os.kill(pid, 0)  # asks, and sends nothing
    except ProcessLookupError:
        return True
    except OSError:
        pass  # somebody else's, so alive
    return False


@cache
def _errors(kind: str) -> tuple[type[Exception], ...]:
    """What fsspec's filesystems raise; each brings its own kind."""
    errors: list[type[Exception]] = [OSError, ImportError, ValueError, RuntimeError]
    if kind in ("gs", "gcs"):
        import aiohttp
        from gcsfs.retry import ChecksumError, HttpError
        from google.auth.exceptions import GoogleAuthError

        errors += [aiohttp.ClientError, ChecksumError, HttpError, GoogleAuthError]
    if kind in ("s3", "s3a"):
        from botocore.exceptions import BotoCoreError, ClientError

        errors += [BotoCoreError, ClientError]
    return tuple(errors)
