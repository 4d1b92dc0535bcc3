"""A file of conversations, and the index beside it: where each line begins and where its frames lie."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from convert.llava import json_line
from convert.manifest import ConvertedFile
from oxe_mix.files import atomic_write

_INDEX_SUFFIX = ".index.npy"


def index_of(file: Path) -> Path:
    """The index beside a file of conversations: int64 [N, 2 + 2C], each row where a line begins and ends,
    then offset and bytes of each of its C frames in the shard's tar; [N, 2] where frames are files.
    """
    return file.with_name(file.name.removesuffix(".jsonl") + _INDEX_SUFFIX)


class LineWriter:
    """Writes samples, one a line; file and index appear when the block ends without an error."""

    def __init__(self, out: Path, path: str, num_tarred: int, *, keep_empty: bool) -> None:
        """Write `path` below `out`, with `num_tarred` frames a sample in a tar; without a single sample it is
        left out unless `keep_empty`.
        """
        self._file, self._path, self._keep_empty = out / path, path, keep_empty
        self._columns = 2 + 2 * num_tarred
        self._rows: list[list[int]] = []
        self._sha256 = hashlib.sha256()
        self._end = 0

    def __enter__(self) -> Self:
        self._block = ExitStack()
        self._stream = self._block.enter_context(atomic_write(self._file, flush=False))
        return self

    def add(self, sample: dict[str, Any], frames: Sequence[int]) -> None:
        """Append a sample; `frames`: offset and bytes of each of its frames, one after the other."""
        line = json_line(sample)
        self._stream.write(line)
        self._sha256.update(line)
        self._rows.append([self._end, self._end + len(line), *frames])
        self._end += len(line)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._block.__exit__(kind, error, trace)
        if kind is not None:
            return
        if self._rows or self._keep_empty:
            with atomic_write(index_of(self._file), flush=False) as stream:
                np.save(stream, np.array(self._rows, np.int64).reshape(-1, self._columns))
        else:
            self._file.unlink()
            index_of(self._file).unlink(missing_ok=True)

    @property
    def written(self) -> ConvertedFile | None:
        """What stands in the file; None when it was left out."""
        if not self._rows and not self._keep_empty:
            return None
        return ConvertedFile(path=self._path, samples=len(self._rows), sha256=self._sha256.hexdigest())
