"""Where each sample of a .json or .jsonl file begins and ends: found in one pass that keeps one block of it,
written to a cache folder, and read from there number by number.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from oxe_mix.errors import UserError

Spans = NDArray[np.int64]  # [N, 2]: begin and end of samples, in bytes

_BLOCK = 1 << 18  # what it takes to look through one is about 25 times as much
_ROW = 2 * np.dtype(np.int64).itemsize
# What the scanner looks at: quotes, what opens, and what closes. As many bytes as there were.
_QUOTE, _OPEN, _CLOSE = 1, 2, 3
_KINDS = bytes({34: _QUOTE, 91: _OPEN, 123: _OPEN, 93: _CLOSE, 125: _CLOSE}.get(i, 0) for i in range(256))
# An array of objects, the inside of each left out, is [{,{,{]: which byte may follow which. ^ stands before.
_FOLLOWS = {tuple(pair.encode()) for pair in ("^[", "[{", "[]", "{,", "{]", ",{")}


@dataclass(frozen=True, slots=True)
class SampleIndex:
    """The samples of one file, of which nothing is in memory."""

    file: Path
    index: Path  # int64 [N, 2] as .npy
    header_bytes: int  # before the first row
    num_samples: int

    def read(self, number: int) -> bytes:
        """A sample's JSON. Raises: UserError when the file or its index went away."""
        try:
            row = _read_at(self.index, self.header_bytes + number * _ROW, _ROW)
            begin, end = np.frombuffer(row, np.int64).tolist()
            return _read_at(self.file, begin, end - begin)
        except (OSError, ValueError) as error:
            raise UserError(f"{self.file}: it or its index {self.index} cannot be read ({error})") from error


def open_index(file: Path, cache: Path) -> SampleIndex:
    """The samples of a file, found now where the cache folder does not hold them for its size and time of
    change.

    Raises: UserError for a file that is missing or neither JSON lines nor an array of objects, and a cache
        folder that cannot be written to.
    """
    try:
        stat = file.stat()
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error
    if file.suffix not in (".json", ".jsonl"):
        raise UserError(f"{file}: not LLaVA data, which is .json, .jsonl or a .yaml that lists such files")
    # In the name of the place too: two files may agree in all the rest.
    place = hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:16]
    index = cache / f"{file.stem[:80]}-{place}-{stat.st_size}-{stat.st_mtime_ns}.npy"
    if not index.exists():
        _write(file, index)
    try:
        with index.open("rb") as stream:
            np.lib.format.read_magic(stream)
            shape, _, _ = np.lib.format.read_array_header_1_0(stream)
            return SampleIndex(file, index, stream.tell(), shape[0])
    except (OSError, ValueError) as error:
        raise UserError(f"{index}: cannot be read ({error}); delete it") from error


def _read_at(file: Path, offset: int, num_bytes: int) -> bytes:
    # pread, where a mapped file would count its pages as this process's memory.
    with file.open("rb", buffering=0) as stream:
        return os.pread(stream.fileno(), num_bytes, offset)


def _write(file: Path, index: Path) -> None:
    """Find a file's samples. The name is random until it is whole: ranks on several machines may be at it."""
    try:
        index.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=index.parent, suffix=".tmp")
    except OSError as error:
        raise UserError(
            f"{index.parent}: cannot write here ({error.strerror}); set XDG_CACHE_HOME to another folder"
        ) from error
    try:
        with os.fdopen(handle, "wb") as out, file.open("rb") as stream:
            _write_header(out, 0)
            num_samples = 0
            for spans in _lines(stream) if file.suffix == ".jsonl" else _elements(stream, file):
                out.write(spans.tobytes())
                num_samples += len(spans)
            out.seek(0)
            _write_header(out, num_samples)
        Path(temporary).replace(index)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _write_header(out: IO[bytes], num_rows: int) -> None:
    """NumPy pads it so that the first axis may grow in place."""
    np.lib.format.write_array_header_1_0(
        out, {"descr": "<i8", "fortran_order": False, "shape": (num_rows, 2)}
    )


def _lines(stream: IO[bytes]) -> Iterator[Spans]:
    """The lines of a file that are not empty."""
    offset = begin = 0
    while block := stream.read(_BLOCK):
        ends = offset + np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n"))
        offset += len(block)
        if len(ends):
            spans = np.stack([np.concatenate([[begin], ends[:-1] + 1]), ends], axis=1)
            begin = int(ends[-1]) + 1
            yield spans[spans[:, 1] - spans[:, 0] > 1]  # one byte is a carriage return
    if offset - begin > 1:
        yield np.array([[begin, offset]])


def _elements(stream: IO[bytes], file: Path) -> Iterator[Spans]:
    """The elements of an array of objects. Raises: UserError naming about where the file is none."""
    depth, quoted, offset, held, before = 0, False, 0, b"", b"^"
    begun = np.zeros(0, np.int64)  # where an element began that has not ended yet: one place or none
    while block := stream.read(_BLOCK):
        block = held + block
        # A backslash that escapes what the next block begins with waits for it.
        held = b"\\" * ((len(block) - len(block.rstrip(b"\\"))) % 2)
        block = block[: len(block) - len(held)]
        places, depths, opens, quoted = _brackets(block, depth, quoted)
        depth = int(depths[-1]) if len(depths) else depth
        begins, ends = places[opens & (depths == 2)], places[~opens & (depths == 1)] + 1
        # What lies outside the elements, and the first byte of each: both kinds of places take turns.
        starts = ends.tolist() if len(begun) else [0, *ends.tolist()]
        stops = [*(begins + 1).tolist(), len(block)][: len(starts)]
        outside = b"".join(block[start:stop] for start, stop in zip(starts, stops, strict=True))
        text = before + outside.translate(None, b" \t\r\n")
        if not _FOLLOWS.issuperset(itertools.pairwise(text)):
            raise UserError(f"{file}: not an array of JSON objects (near byte {offset:,})")
        before = text[-1:]
        begins = np.concatenate([begun, begins + offset])
        begun = begins[len(ends) :]
        yield np.stack([begins[: len(ends)], ends + offset], axis=1)
        offset += len(block)
    if before != b"]" or held:
        raise UserError(f"{file}: not an array of JSON objects: it ends after {offset:,} bytes without a ]")


def _brackets(
    block: bytes, depth: int, quoted: bool
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_], bool]:
    """The brackets and braces outside strings: where they are, the depth behind each, which of them open, and
    whether the block ends inside a string.
    """
    # From the left, two backslashes are one; a quote behind one that is left over does not end the string.
    kinds = np.frombuffer(block.replace(b"\\\\", b"__").replace(b'\\"', b"__").translate(_KINDS), np.uint8)
    places = np.flatnonzero(kinds != 0)
    kinds = kinds[places]
    quotes = kinds == _QUOTE
    inside = (np.cumsum(quotes) + quoted) % 2 == 1
    kept = ~quotes & ~inside
    opens = kinds[kept] == _OPEN
    depths = depth + np.cumsum(np.where(opens, 1, -1))
    return places[kept], depths, opens, bool(inside[-1]) if len(inside) else quoted
