"""Where a download goes: a folder of this machine, or one in a bucket that all workers reach.

Files in it are whole or absent. Names are relative to the target, with slashes, and never leave it.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

from oxe_mix.errors import UserError
from oxe_mix.files import BUSY_FILE, atomic_write, folder_lock, sweep
from oxe_mix.writing import safe, writing


class Target(Protocol):
    """A folder to download into."""

    @property
    def root(self) -> str:
        """The folder as the user named it."""

    def read(self, name: str) -> bytes | None:
        """The content of a file, None when it is not there."""

    def open(self, name: str) -> BinaryIO:
        """Open a file that is there for reading."""

    def write(self, name: str, content: bytes) -> None:
        """Write a small file, whole or not at all."""

    def append(self, name: str, line: str) -> None:
        """Add a line to a log; a bucket keeps none."""

    def place(self, finished: Path, name: str) -> None:
        """Move a finished file of a workspace into the target, whole or not at all."""

    def flush(self, name: str) -> None:
        """Have the disk hold a file that was placed: a machine that stops must not take it along."""

    def rename(self, old: str, new: str) -> None:
        """Give a file another name, replacing what had it."""

    def remove(self, name: str) -> None:
        """Remove a file or a folder with all that is in it; nothing to do when it is not there."""

    def sizes(self, folder: str) -> dict[str, int]:
        """Every file below a folder, and its bytes."""

    def sweep(self, folder: str) -> None:
        """Remove what killed runs left half written in a folder."""

    def workspace(self, folder: str) -> AbstractContextManager[Path]:
        """A folder of this machine for unfinished files; a local target keeps it for the next run."""

    def hold(self, what: str) -> AbstractContextManager[None]:
        """Keep the target for one writer. Raises: UserError when another has it."""

    def free_bytes(self) -> int | None:
        """Bytes that still fit, None where there is no such limit."""


def open_target(out: str | Path) -> Target:
    """The target that `--out` means."""
    text = str(out)
    if "://" in text and not text.startswith("file://"):
        return BucketTarget(text.rstrip("/"))
    return LocalTarget(text.removeprefix("file://"))


def next_step(root: str) -> str:
    """What to type after a download into `root`: conversion reads a folder, not a bucket."""
    if "://" not in root:
        return f"oxe-mix convert --to llava --data {root}"
    return f"copy or mount {root} as a folder DATA, then oxe-mix convert --to llava --data DATA"


@dataclass(frozen=True, slots=True)
class LocalTarget:
    """A folder of this machine, or of a file system that all workers mount."""

    root: str

    def path(self, name: str) -> Path:
        """The file of a name. Raises: UserError when a link inside the target leads out of it."""
        path = Path(self.root) / safe(name)
        if not path.resolve().is_relative_to(Path(self.root).resolve()):
            raise UserError(f"{path}: leads out of {self.root}; remove the link, or choose another --out")
        return path

    def read(self, name: str) -> bytes | None:
        """See Target."""
        try:
            return self.path(name).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def open(self, name: str) -> BinaryIO:
        """See Target."""
        return self.path(name).open("rb")

    def write(self, name: str, content: bytes) -> None:
        """See Target."""
        with writing(self.root), atomic_write(self.path(name)) as stream:
            stream.write(content)

    def append(self, name: str, line: str) -> None:
        """See Target."""
        with self.path(name).open("a") as log:
            log.write(line)

    def place(self, finished: Path, name: str) -> None:
        """See Target."""
        path = self.path(name)
        with writing(self.root):
            path.parent.mkdir(parents=True, exist_ok=True)
            finished.replace(path)

    def flush(self, name: str) -> None:
        """See Target."""
        with writing(self.root), self.open(name) as stream:
            os.fsync(stream.fileno())

    def rename(self, old: str, new: str) -> None:
        """See Target."""
        with writing(self.root):
            self.path(new).parent.mkdir(parents=True, exist_ok=True)
            self.path(old).replace(self.path(new))

    def remove(self, name: str) -> None:
        """See Target."""
        path = self.path(name)
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    def sizes(self, folder: str) -> dict[str, int]:
        """See Target."""
        found: dict[str, int] = {}
        for parent, _, files in os.walk(self.path(folder) if folder else self.root):
            for file in files:
                path = Path(parent, file)
                # A file may be renamed while we look.
                with contextlib.suppress(FileNotFoundError):
                    found[str(path.relative_to(self.root))] = path.stat().st_size
        return found

    def sweep(self, folder: str) -> None:
        """See Target."""
        sweep(self.path(folder) if folder else Path(self.root))

    @contextmanager
    def workspace(self, folder: str) -> Iterator[Path]:
        """See Target."""
        path = self.path(folder)
        with writing(self.root):
            path.mkdir(parents=True, exist_ok=True)
        yield path

    def hold(self, what: str) -> AbstractContextManager[None]:
        """See Target."""
        return folder_lock(Path(self.root), what)

    def free_bytes(self) -> int | None:
        """See Target."""
        root = Path(self.root)
        return shutil.disk_usage(next(p for p in (root, *root.resolve().parents) if p.exists())).free


@dataclass(frozen=True, slots=True)
class BucketTarget:
    """A folder in a bucket, written with the credentials that the machine has: it is the user's own."""

    root: str

    def read(self, name: str) -> bytes | None:
        """See Target."""
        filesystem, path = self._at(name)
        try:
            return cast(bytes, filesystem.cat_file(path))
        except FileNotFoundError:
            return None

    def open(self, name: str) -> BinaryIO:
        """See Target."""
        filesystem, path = self._at(name)
        return cast(BinaryIO, io.BufferedReader(filesystem.open(path, "rb")))

    def write(self, name: str, content: bytes) -> None:
        """See Target."""
        filesystem, path = self._at(name)
        with writing(self.root):
            filesystem.pipe_file(path, content)

    def append(self, name: str, line: str) -> None:
        """See Target."""

    def place(self, finished: Path, name: str) -> None:
        """See Target."""
        filesystem, path = self._at(name)
        with writing(self.root):
            filesystem.put_file(str(finished), path)  # an object appears when it is whole
        finished.unlink()

    def flush(self, name: str) -> None:
        """See Target."""

    def rename(self, old: str, new: str) -> None:
        """See Target."""
        filesystem, path = self._at(old)
        with writing(self.root):
            # Not mv: gcsfs would first try an interface that many stores do not have, for a minute.
            filesystem.cp_file(path, self._at(new)[1])
            filesystem.rm_file(path)

    def remove(self, name: str) -> None:
        """See Target."""
        filesystem, path = self._at(name)
        filesystem.invalidate_cache()
        if filesystem.exists(path):
            filesystem.rm(path, recursive=True)

    def sizes(self, folder: str) -> dict[str, int]:
        """See Target."""
        filesystem, path = self._at(folder)
        root = path.removesuffix(folder).rstrip("/") + "/"
        filesystem.invalidate_cache()
        found = filesystem.find(path, detail=True)
        return {name.removeprefix(root): int(entry["size"]) for name, entry in found.items()}

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
        filesystem, path = self._at(BUSY_FILE)
        who = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%F %T")}
        try:
            # Some stores do not keep to `create`, so look as well.
            if self.read(BUSY_FILE) is not None:
                raise FileExistsError
            filesystem.pipe_file(path, json.dumps(who).encode(), mode="create")
        except FileExistsError as error:
            other = (self.read(BUSY_FILE) or b"").decode()
            raise UserError(
                f"{self.root}: another {what} is writing here ({other}); "
                f"if that one was killed, delete {self.root}/{BUSY_FILE}"
            ) from error
        try:
            yield
        finally:
            filesystem.rm_file(path)

    def free_bytes(self) -> int | None:
        """See Target."""
        return None

    def _at(self, name: str) -> tuple[Any, str]:
        import fsspec

        os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        try:
            filesystem, path = fsspec.core.url_to_fs(f"{self.root}/{safe(name)}" if name else self.root)
        except (ImportError, ValueError) as error:
            raise UserError(f"{self.root}: cannot be opened ({error}); expected a folder or gs://") from error
        return filesystem, str(path)
