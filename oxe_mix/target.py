"""Where a download goes: a folder of this machine, or one in a bucket that all workers reach.

Files in it are whole or absent. Names are relative to the target, with slashes, and never leave it.
"""

from __future__ import annotations

import errno
import os
import shlex
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from oxe_mix.bucket import BucketTarget
from oxe_mix.errors import UserError
from oxe_mix.files import atomic_write, folder_lock, sweep
from oxe_mix.writing import safe, writing

_DATASET_DEPTH = 2  # NAME/VERSION


class Target(Protocol):
    """A folder to download into."""

    @property
    def root(self) -> str:
        """The folder as the user named it."""

    @property
    def durable(self) -> bool:
        """Whether a file is safe as soon as it is placed; if not, only after `flush`."""

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

    def closed_folders(self) -> dict[str, str]:
        """Folders NAME and NAME/VERSION that are there and cannot be looked into, and why."""

    def sweep(self, folder: str) -> None:
        """Remove what killed runs left half written in a folder."""

    def workspace(self, folder: str) -> AbstractContextManager[Path]:
        """A folder of this machine for unfinished files; a local target keeps it for the next run."""

    def hold(self, what: str) -> AbstractContextManager[None]:
        """Keep the target for one writer. Raises: UserError when another has it."""

    def free_bytes(self) -> int | None:
        """Bytes that still fit, None where there is no such limit."""


def open_target(out: str | Path, *, follow_links: bool = False) -> Target:
    """The target that `--out` means. `follow_links`: for who only reads.

    Raises: UserError for the address of a web server.
    """
    text = str(out)
    if text.startswith(("http://", "https://")):
        raise UserError(f"{text}: a web server is neither listed nor written; give a folder, gs:// or s3://")
    if "://" in text and not text.startswith("file://"):
        return BucketTarget(text.rstrip("/"))
    return LocalTarget(text.removeprefix("file://"), follow_links)


def next_step(root: str) -> str:
    """What to type after a download into `root`: conversion reads a folder, not a bucket."""
    if "://" not in root:
        return f"oxe-mix convert --to llava --data {shlex.quote(root)}"
    return f"copy or mount {shlex.quote(root)} as a folder DATA, then oxe-mix convert --to llava --data DATA"


@dataclass(frozen=True, slots=True)
class LocalTarget:
    """A folder of this machine, or of a file system that all workers mount. Links out of it are followed only
    where asked: who writes must not follow them.
    """

    root: str
    follow_links: bool = False

    @property
    def durable(self) -> bool:
        """See Target."""
        return False

    def path(self, name: str) -> Path:
        """The file of a name. Raises: UserError when a link inside the target leads out of it."""
        path = Path(self.root) / safe(name)
        if not self.follow_links and not path.resolve().is_relative_to(Path(self.root).resolve()):
            raise UserError(f"{path}: leads out of {self.root}; remove the link, or choose another --out")
        return path

    def read(self, name: str) -> bytes | None:
        """See Target."""
        path = self.path(name)
        try:
            return path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from error

    def open(self, name: str) -> BinaryIO:
        """See Target."""
        return self.path(name).open("rb")

    def write(self, name: str, content: bytes) -> None:
        """See Target."""
        with writing(self.root), atomic_write(self.path(name)) as stream:
            stream.write(content)

    def append(self, name: str, line: str) -> None:
        """See Target."""
        with writing(self.root), self.path(name).open("a") as log:
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
        with writing(self.root):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def sizes(self, folder: str) -> dict[str, int]:
        """See Target."""
        found: dict[str, int] = {}
        top = self.path(folder) if folder else Path(self.root)
        with writing(self.root):
            if folder and top.exists() and not top.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, "not a folder", str(top))
            for parent, folders, files in os.walk(top, followlinks=self.follow_links):
                if self.follow_links:
                    folders[:] = [name for name in folders if self._leads_on(Path(parent, name))]
                for file in files:
                    path = Path(parent, file)
                    # A file may be renamed while we look.
                    with suppress(FileNotFoundError):
                        found[str(path.relative_to(self.root))] = path.stat().st_size
        return found

    def closed_folders(self) -> dict[str, str]:
        """See Target."""
        root, closed = Path(self.root), dict[str, str]()
        for path in sorted((*root.glob("*"), *root.glob("*/*"))):
            name = str(path.relative_to(root))
            if path.is_symlink() and not path.exists():
                closed[name] = "a link that leads nowhere"
            elif path.is_dir() and not os.access(path, os.R_OK | os.X_OK):
                closed[name] = "cannot be read (Permission denied)"
        return closed

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
        with writing(self.root):
            return shutil.disk_usage(next(p for p in (root, *root.resolve().parents) if p.exists())).free

    def _leads_on(self, folder: Path) -> bool:
        """Whether to walk into a folder: a link only where NAME or NAME/VERSION stands, and never round."""
        if not folder.is_symlink():
            return True
        round_ = folder.parent.resolve().is_relative_to(folder.resolve())
        return len(folder.relative_to(self.root).parts) <= _DATASET_DEPTH and not round_
