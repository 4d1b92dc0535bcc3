"""Random access to the samples of a converted folder, in either layout, without loading its conversations."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from convert.frames import Frame, tar_of
from convert.lines import index_of
from convert.llava import IMAGES
from convert.manifest import ConvertedFile, read_manifest
from oxe_mix.errors import UserError

_ITEM = np.dtype(np.int64).itemsize


@dataclass(frozen=True, slots=True)
class Sample:
    """One conversation: what is asked about which frames, and the answer."""

    id: str
    dataset: str
    episode: str  # NAME/SPLIT/SHARD/EPISODE, unique in the folder
    step: int
    question: str
    answer: str
    images: tuple[str, ...]  # paths below images/, as they stand in the conversation
    frames: tuple[Frame, ...]  # the same, to be read


@dataclass(frozen=True, slots=True)
class _Lines:
    """A file of conversations with its index, of which only the shape is kept."""

    file: Path
    index: Path
    header_bytes: int  # before the first row of the index
    columns: int

    def row(self, number: int) -> list[int]:
        with self.index.open("rb", buffering=0) as stream:
            size = self.columns * _ITEM
            data = os.pread(stream.fileno(), size, self.header_bytes + number * size)
        row: list[int] = np.frombuffer(data, np.int64).tolist()
        return row

    def line(self, begin: int, end: int) -> bytes:
        with self.file.open("rb", buffering=0) as stream:
            return os.pread(stream.fileno(), end - begin, begin)


class ConversationReader:
    """The samples of a converted folder by index: datasets in the manifest's order, each in order of shards.

    Nothing of a sample is kept in memory: where its line begins and where its frames lie is read, with it,
    from the index beside the conversations.
    """

    def __init__(self, folder: Path, part: Literal["train", "val"]) -> None:
        """Open a folder's training or held-out samples.

        Raises: UserError when the folder is no finished conversion or a file is not as the manifest says.
        """
        manifest = read_manifest(folder)
        self._images = (folder / IMAGES).resolve()
        self._is_tar = manifest.asked.layout == "tar"
        self._lines: list[_Lines] = []
        self.ranges: dict[str, range] = {}
        self.weights: dict[str, float] = {}
        start, starts = 0, [0]
        for dataset in manifest.datasets:
            files = dataset.files if part == "train" else dataset.validation_files
            for file in files:
                self._lines.append(_open(folder, file))
                starts.append(starts[-1] + file.samples)
            self.ranges[dataset.name], self.weights[dataset.name] = range(start, starts[-1]), dataset.weight
            start = starts[-1]
        self._starts = np.array(starts)

    def __len__(self) -> int:
        """Samples in all."""
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Sample:
        """One sample. Raises: IndexError; UserError for a line that is no sample or an image outside the
        folder.
        """
        if not 0 <= index < len(self):
            raise IndexError(index)
        place = int(np.searchsorted(self._starts, index, side="right")) - 1
        lines, number = self._lines[place], index - int(self._starts[place])
        begin, end, *frames = lines.row(number)
        try:
            return self._sample(json.loads(lines.line(begin, end)), lines, frames)
        except (json.JSONDecodeError, KeyError, TypeError, IndexError, ValueError) as error:
            raise UserError(
                f"{lines.file}:{number + 1}: not a sample ({type(error).__name__}: {error})"
            ) from error

    def _sample(self, line: dict[str, Any], lines: _Lines, places: list[int]) -> Sample:
        human, answer = line["conversations"][0]["value"], line["conversations"][1]["value"]
        image = line["image"]
        images = (image,) if isinstance(image, str) else tuple(map(str, image))
        return Sample(
            id=str(line["id"]),
            dataset=str(line["dataset"]),
            episode=str(line["id"]).rsplit("/", 1)[0],
            step=int(line["step"]),
            question=human,
            answer=answer,
            images=images,
            frames=self._frames(images, lines, places),
        )

    def _frames(self, images: tuple[str, ...], lines: _Lines, places: list[int]) -> tuple[Frame, ...]:
        if self._is_tar:
            tar = self._images / tar_of(lines.file.name)
            pairs = zip(places[::2], places[1::2], strict=True)
            return tuple(Frame(tar, offset, size) for offset, size in pairs)
        paths = [self._images / name for name in images]
        for path in paths:
            # normpath and not resolve: this asks nothing of the disk, and it is done for every sample.
            if not os.path.normpath(path).startswith(f"{self._images}{os.sep}"):
                raise UserError(f"the image {path} lies outside {self._images}")
        return tuple(map(Frame, paths))


def _open(folder: Path, file: ConvertedFile) -> _Lines:
    """A file of conversations and its index, proved to be of the size that the manifest says."""
    path = folder / file.path
    index = index_of(path)
    try:
        with index.open("rb") as stream:
            version = np.lib.format.read_magic(stream)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else None
            shape, _, dtype = read(stream) if read else ((0,), False, np.dtype(np.int8))
            header_bytes = stream.tell()
        lines = _Lines(path, index, header_bytes, shape[-1])
        end = lines.row(file.samples - 1)[1] if file.samples else 0
        sizes = (path.stat().st_size, len(shape), dtype, shape[0])
    except (OSError, ValueError, IndexError) as error:
        raise UserError(
            f"{path}: it or its index is not there, though the manifest lists it; convert again"
        ) from error
    if sizes != (end, 2, np.dtype(np.int64), file.samples):
        raise UserError(f"{path}: it or its index is not what the manifest says; convert again")
    return lines
