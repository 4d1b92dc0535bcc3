"""Files that are either whole or absent: written under a temporary name, flushed to disk, renamed."""

from __future__ import annotations

import fcntl
import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeVar

from pydantic import BaseModel, ValidationError

from oxe_mix.errors import UserError

BUSY_FILE = ".oxe-mix.busy"  # in a folder that one of our commands writes; held while it does
# What `atomic_write` calls a file of the process PID until it is whole; others' hidden files are not ours.
_TEMPORARY = re.compile(r"\..+\.\d+\.tmp")

Model = TypeVar("Model", bound=BaseModel)


@contextmanager
def atomic_write(path: Path, *, flush: bool = True) -> Iterator[IO[bytes]]:
    """Open `path` for writing under a temporary name; it appears, whole, when the block ends without an
    error. `flush` false: for bulk data that is flushed to disk later, all at once.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as stream:
            yield stream
            if flush:
                stream.flush()
                os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def prove_writable(out: Path) -> Path:
    """The file that `--out` names, once it is sure that it can be written: said before the work, not after.

    Raises: UserError when it cannot.
    """
    if out.is_dir():
        raise UserError(f"--out {out}: is a folder; name a file")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out.parent):  # permissions alone do not say it
            pass
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written there ({error.strerror}); choose another") from error
    return out


def sweep(*folders: Path) -> None:
    """Remove what a killed `atomic_write` left in these folders; only for who holds their lock."""
    for folder in folders:
        for temporary in folder.glob(".*.tmp"):
            ours = _TEMPORARY.fullmatch(temporary.name) and temporary.is_file()
            if ours and not temporary.is_symlink():
                temporary.unlink()


def json_bytes(value: Any) -> bytes:
    """JSON that reads well and is the same bytes for the same value."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, whole or not at all."""
    with atomic_write(path) as stream:
        stream.write(json_bytes(value))


def read_json(path: Path, what: str) -> Any:
    """Read a JSON file; a missing or broken one is the user's error, named as `what`."""
    return parse_json(_read(path, what), str(path), what)


def read_model(kind: type[Model], file: Path, what: str) -> Model:
    """Read one of our own JSON files; one that was edited or is of another version is the user's error."""
    return parse_model(kind, _read(file, what), str(file), what)


def parse_model(kind: type[Model], text: bytes, where: str, what: str) -> Model:
    """The same for a file that was read already and that messages call `where`."""
    try:
        return kind.model_validate(parse_json(text, where, what))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "file"
        raise UserError(f"{where}: {place}: {first['msg']}; expected {what}") from error


def read_text(path: Path, what: str) -> str:
    """Read a file of UTF-8 text; one that is missing or no text is the user's error, named as `what`."""
    try:
        return _read(path, what).decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is no UTF-8 text; expected {what}") from error


def _read(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; expected {what}") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); expected {what}") from error


def parse_json(text: bytes, where: str, what: str) -> Any:
    """The same for JSON of any form."""
    try:
        return json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{where}: not valid JSON ({error}); expected {what}") from error


@contextmanager
def folder_lock(folder: Path, what: str) -> Iterator[None]:
    """Hold `folder` for one writer; a second one is refused at once. The kernel lets go when the process
    ends.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stream = (folder / BUSY_FILE).open("w")
    except OSError as error:
        raise UserError(f"{folder}: cannot write here ({error.strerror}); choose another folder") from error
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(
                f"{folder}: another {what} is writing here; wait for it or choose another folder"
            ) from error
        yield
