"""Samples in training order, and batches with the answers' tokens supervised and nothing else."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, islice, repeat
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from oxe_mix.errors import UserError
from train_llava.augment import Augment, augment
from train_llava.batch import BatchPlan
from train_llava.llava_data import Conversation
from train_llava.mixture import MixedOrder
from train_llava.processor import IGNORE, OneViewProcessor, Size, View, open_frame
from train_llava.sources import TrainingData

NO_DIMENSION = -1  # of a supervised token that is no action's: a word, or the end of a turn
_PROMPTS_KEPT = 4096  # a prompt with its frame is some 800 numbers


@dataclass(frozen=True, slots=True)
class Draw:
    """One sample of the run's order: its position there, and where it is read."""

    position: int
    source: int
    index: int


@dataclass(frozen=True, slots=True)
class Tokens:
    """One sample: ids, labels and the action dimensions of its labels, of one length; and its views."""

    ids: list[int]
    labels: list[int]
    dimensions: list[int]
    views: tuple[View, ...]


class Tokenized:
    """Conversations to ids and labels. A dimension is the number of a token in its action, 0 … A - 1."""

    def __init__(self, processor: OneViewProcessor, action_dim: int) -> None:
        self._processor, self._action_dim = processor, action_dim
        self._prompt = lru_cache(_PROMPTS_KEPT)(processor.prompt_ids)

    def __call__(
        self, sample: Conversation, sizes: list[Size], *, is_robot: bool
    ) -> tuple[list[int], list[int], list[int]]:
        """Ids, labels and dimensions. Raises: ValueError when the prompt does not fit the images."""
        tokens = tuple(self._processor.num_view_tokens(size) for size in sizes)
        if len(sample.turns) > 2:
            ids, labels = self._processor.conversation_ids(sample.turns, tokens)
        else:
            (_, question), (_, answer) = sample.turns
            prompt, answered = self._prompt(question, tokens), self._processor.answer_ids(answer)
            ids, labels = prompt + answered, [IGNORE] * len(prompt) + answered
        dimensions = [NO_DIMENSION] * len(ids)
        if is_robot:
            first = len(ids) - len(answered)
            for i in range(len(answered) - 1):  # the last token ends the turn
                dimensions[first + i] = i % self._action_dim
        return ids, labels, dimensions


class SampleDataset(Dataset["Tokens | UserError"]):
    """The samples that draws name, as tokens and views. One that cannot be had comes as its error, which ends
    the run: none is ever swapped or left out.
    """

    def __init__(
        self,
        data: TrainingData,
        processor: OneViewProcessor,
        *,
        cache: bool = False,
        change: Augment | None = None,
        seed: int = 0,
    ) -> None:
        """`change`: how frames are augmented, each by a generator of the seed and the draw's position."""
        self.data = data
        self._processor, self._change, self._seed = processor, change, seed
        self._tokenized = Tokenized(processor, data.codec.action_dim)
        self._cache: dict[tuple[int, int], Tokens] | None = {} if cache else None

    def __getitem__(self, draw: Draw) -> Tokens | UserError:
        """One sample, or the error that names it."""
        try:
            if self._cache is None:
                return self.load(draw)
            key = (draw.source, draw.index)
            if key not in self._cache:
                self._cache[key] = self.load(draw)
            return self._cache[key]
        except UserError as error:
            return error

    def load(self, draw: Draw) -> Tokens:
        """One sample. Raises: UserError naming the sample whose frame or line is broken."""
        source = self.data.sources[draw.source]
        sample = source.sample(draw.index)
        rng = np.random.default_rng([self._seed, draw.position])
        views = []
        for frame in sample.images:
            image = open_frame(frame)
            views.append(
                self._processor.view(image if self._change is None else augment(image, rng, self._change))
            )
        return Tokens(*self._ids(sample, [view.size for view in views], source.is_robot), tuple(views))

    def lengths(self, source: int, index: int) -> Lengths:
        """Of a sample by its text alone; of its frames, at most the sizes are read.

        Raises: UserError naming a sample that is not usable.
        """
        own = self.data.sources[source]
        sample = own.sample(index)
        sizes = [_size(frame.read(), str(frame)) for frame in sample.images] if self._needs_sizes else []
        sizes = sizes or [(0, 0)] * len(sample.images)
        ids, labels, _ = self._ids(sample, sizes, own.is_robot)
        supervised = sum(label != IGNORE for label in labels)
        frames = sum(self._processor.num_view_tokens(size) for size in sizes)
        answers = len(sample.turns) // 2
        return Lengths(sample.id, len(ids), frames, supervised, supervised - answers)

    @property
    def _needs_sizes(self) -> bool:
        return self._processor.needs_sizes

    def _ids(
        self, sample: Conversation, sizes: list[Size], is_robot: bool
    ) -> tuple[list[int], list[int], list[int]]:
        try:
            return self._tokenized(sample, sizes, is_robot=is_robot)
        except ValueError as error:
            raise UserError(f"{sample.id}: {error}") from error


@dataclass(frozen=True, slots=True)
class Lengths:
    """A sample's tokens: in all, of its frames, supervised, and supervised without the ends of turns."""

    id: str
    total: int
    frames: int
    supervised: int
    learnt: int


def _size(encoded: bytes, name: str) -> Size:
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            return image.height, image.width
    except (UnidentifiedImageError, OSError) as error:
        raise UserError(f"{name}: not an image that can be decoded ({error})") from error


def collate(samples: list[Tokens | UserError], processor: OneViewProcessor) -> dict[str, Any]:
    """A batch, padded at the end.

    Returns: input_ids [B, L]; logits_at [K], the positions in the flattened batch whose next token is
        supervised; targets and dimensions [K] of those; pixel_values and image_sizes where there are frames.
        With a sample that is an error: {"error": its text} alone.
    """
    whole = [sample for sample in samples if isinstance(sample, Tokens)]
    for sample in samples:
        if isinstance(sample, UserError):
            return {"error": str(sample)}
    length = max(len(sample.ids) for sample in whole)
    pad = int(processor.tokenizer.pad_token_id)
    ids = _padded([sample.ids for sample in whole], length, pad)
    labels = _padded([sample.labels for sample in whole], length, IGNORE)
    dimensions = _padded([sample.dimensions for sample in whole], length, NO_DIMENSION)
    rows, columns = (labels[:, 1:] != IGNORE).nonzero(as_tuple=True)
    frames = processor.frames(view for sample in whole for view in sample.views)
    return {
        "input_ids": ids,
        "logits_at": rows * length + columns,
        "targets": labels[rows, columns + 1],
        "dimensions": dimensions[rows, columns + 1],
        **{name: torch.from_numpy(value) for name, value in frames.items()},
    }


def _padded(rows: list[list[int]], length: int, value: int) -> Tensor:
    return torch.tensor([row + [value] * (length - len(row)) for row in rows])


class RankBatches(Sampler[list[Draw]]):
    """The micro batches of one rank over a whole run. All ranks together take the order's positions once, a
    step's in any number of ranks and micro batches.
    """

    def __init__(
        self, order: MixedOrder, batch: BatchPlan, num_steps: int, rank: int, *, overfit: bool = False
    ) -> None:
        """`overfit`: every step takes the positions of the first."""
        self._order, self._batch, self._num_steps, self._rank = order, batch, num_steps, rank
        self._overfit = overfit

    def __len__(self) -> int:
        """Micro batches, with those that a resumed run leaves out."""
        return self._num_steps * self._batch.accumulate

    def __iter__(self) -> Iterator[list[Draw]]:
        passes = self._num_steps if self._overfit else 1
        draws = chain.from_iterable(self._draws() for _ in repeat(None, passes))
        while batch := list(islice(draws, self._batch.micro)):
            yield batch

    def _draws(self) -> Iterator[Draw]:
        stop = self._batch.samples * (1 if self._overfit else self._num_steps)
        drawn = self._order.of_rank(self._rank, self._batch.num_ranks, 0, stop)
        for i, (source, index) in enumerate(drawn):
            yield Draw(self._rank + i * self._batch.num_ranks, source, index)
