"""What a run trains on: converted folders and LLaVA data, as sources of one mixture."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from convert.action_codec import CODEC_FILE, ActionCodec, read_codec
from convert.manifest import MANIFEST_FILE
from convert.reader import ConversationReader
from oxe_mix.errors import UserError
from train_llava.config import DataConfig, SourceConfig
from train_llava.llava_data import Conversation, LlavaData
from train_llava.mixture import MixedOrder, SourceRange


@dataclass(frozen=True, slots=True)
class Source:
    """One source of the mixture, and where its samples are read."""

    range: SourceRange
    reader: ConversationReader | LlavaData

    @property
    def is_robot(self) -> bool:
        """Whether its answers are actions."""
        return isinstance(self.reader, ConversationReader)

    def sample(self, index: int) -> Conversation:
        """A sample by its index in the reader. Raises: UserError for one that is not usable."""
        if isinstance(self.reader, LlavaData):
            return self.reader[index]
        sample = self.reader[index]
        return Conversation(sample.id, (("human", sample.question), ("gpt", sample.answer)), sample.frames)


@dataclass(frozen=True, slots=True)
class TrainingData:
    """All that a run trains on. `order` numbers the sources as `sources` does."""

    sources: tuple[Source, ...]
    order: MixedOrder
    codec: ActionCodec
    folders: tuple[Path, ...]  # the converted ones; the first is the command's
    fingerprint: str  # of the samples and their order, the seed left out

    def questions(self, at_most: int) -> list[str]:
        """Questions spread evenly over the robot data."""
        per_source = max(1, at_most // len(self.sources))
        return [
            source.sample(index).turns[0][1]
            for source in self.sources
            if source.is_robot
            for index in source.range.samples[:: max(1, len(source.range.samples) // per_source)]
        ]


def open_data(config: DataConfig, llava: Path, seed: int) -> TrainingData:
    """Open everything that the config and the command name.

    Raises: UserError for data that is not there, a dataset that comes twice, and converted folders whose
        actions or prompts are not of one kind.
    """
    sources = _of_folder(llava, config.weight)
    codec, folders = read_codec(llava), [llava]
    marks: list[list[str]] = [_mark(llava)]
    for other in config.sources:
        if (other.path / MANIFEST_FILE).exists():
            sources += _of_folder(other.path, other.weight)
            codec = _joined(codec, read_codec(other.path), other)
            folders.append(other.path)
            marks.append(_mark(other.path))
        else:
            data = LlavaData(other.path, other.images, seed)
            sources.append(Source(SourceRange(other.name, range(len(data)), other.weight), data))
            marks.append([f"{taken.samples.index.stem} {taken.numbers}" for taken in data.files])
    order = MixedOrder([source.range for source in sources], seed)
    weights = [(source.range.name, source.range.weight, len(source.range.samples)) for source in sources]
    fingerprint = hashlib.sha256(repr((marks, weights)).encode()).hexdigest()
    return TrainingData(tuple(sources), order, codec, tuple(folders), fingerprint)


def _of_folder(folder: Path, weight: float) -> list[Source]:
    reader = ConversationReader(folder, "train")
    if len(reader) == 0:
        raise UserError(f"{folder}: holds no training sample")
    return [
        Source(SourceRange(name, samples, weight * reader.weights[name]), reader)
        for name, samples in reader.ranges.items()
        if len(samples)
    ]


def _mark(folder: Path) -> list[str]:
    files = (folder / MANIFEST_FILE, folder / CODEC_FILE)
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]


def _joined(codec: ActionCodec, other: ActionCodec, source: SourceConfig) -> ActionCodec:
    """One codec for the datasets of two folders. Raises: UserError when they differ in kind."""
    for field in ("action_dim", "chunk", "binning", "asking"):
        ours, theirs = getattr(codec, field), getattr(other, field)
        if ours != theirs:
            raise UserError(f"{source.path}: {field} is {theirs}, but {ours} in the command's folder")
    if twice := sorted(codec.datasets.keys() & other.datasets.keys()):
        raise UserError(f"{source.path}: {twice[0]} is in the command's folder too; convert them together")
    return codec.model_copy(
        update={
            "datasets": {**codec.datasets, **other.datasets},
            "states": {**codec.states, **other.states},
            "cameras": {**codec.cameras, **other.cameras},
        }
    )
