"""Random access to the samples of a converted folder, without loading its conversations into memory."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from convert.llava import IMAGES
from convert.manifest import ConvertedFile, read_manifest
from oxe_mix.errors import UserError


@dataclass(frozen=True, slots=True)
class Sample:
    """One conversation: what is asked about which frames, and the answer."""

    id: str
    dataset: str
    episode: str  # NAME/SPLIT/SHARD/EPISODE, unique in the folder
    step: int
    question: str
    answer: str
    images: tuple[Path, ...]


class ConversationReader:
    """The samples of a converted folder by index: datasets in the manifest's order, each in order of shards.

    Only the offset of each line is kept in memory, 8 bytes a sample; a line is read when it is asked for.
    """

    def __init__(self, folder: Path, part: Literal["train", "val"]) -> None:
        """Index a folder's training or held-out samples.

        Raises: UserError when the folder is no finished conversion or a file is not as the manifest says.
        """
        self._images = (folder / IMAGES).resolve()
        self._offsets: list[NDArray[np.int64]] = []
        self._files: list[Path] = []
        self.ranges: dict[str, range] = {}
        self.weights: dict[str, float] = {}
        start = 0
        for dataset in read_manifest(folder).datasets:
            files = dataset.files if part == "train" else dataset.validation_files
            for file in files:
                self._offsets.append(_line_offsets(folder, file))
                self._files.append(folder / file.path)
            stop = start + sum(file.samples for file in files)
            self.ranges[dataset.name], self.weights[dataset.name] = range(start, stop), dataset.weight
            start = stop
        self._starts = np.cumsum([0, *(len(offsets) - 1 for offsets in self._offsets)])

    def __len__(self) -> int:
        """Samples in all."""
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Sample:
        """One sample. Raises: IndexError; UserError for a line that is no sample or an image outside the
        folder.
        """
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        begin, end = self._offsets[number][index - self._starts[number] :][:2]
        with self._files[number].open("rb") as stream:
            line = os.pread(stream.fileno(), int(end - begin), int(begin))
        try:
            return self._sample(json.loads(line))
        except (json.JSONDecodeError, KeyError, TypeError, IndexError) as error:
            place = index - self._starts[number] + 1
            raise UserError(
                f"{self._files[number]}:{place}: not a sample ({type(error).__name__}: {error})"
            ) from error

    def _sample(self, line: dict[str, object]) -> Sample:
        human, answer = line["conversations"][0]["value"], line["conversations"][1]["value"]  # type: ignore[index]
        names = [line["image"]] if isinstance(line["image"], str) else line["image"]
        images = tuple((self._images / str(name)).resolve() for name in names)  # type: ignore[attr-defined]
        outside = next((path for path in images if not path.is_relative_to(self._images)), None)
        if outside is not None:
            raise UserError(f"{line['id']}: the image {outside} lies outside {self._images}")
        return Sample(
            id=str(line["id"]),
            dataset=str(line["dataset"]),
            episode=str(line["id"]).rsplit("/", 1)[0],
            step=int(str(line["step"])),
            question=human,
            answer=answer,
            images=images,
        )


def _line_offsets(folder: Path, file: ConvertedFile) -> NDArray[np.int64]:
    """Where each line begins, and the end of the last: [samples + 1]."""
    path = folder / file.path
    try:
        newlines = np.flatnonzero(np.fromfile(path, np.uint8) == ord("\n"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: not there, though the manifest lists it; convert again") from error
    if len(newlines) != file.samples:
        raise UserError(f"{path}: {len(newlines)} samples, the manifest says {file.samples}; convert again")
    return np.concatenate([[0], newlines + 1]).astype(np.int64)
