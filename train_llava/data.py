"""Samples in training order, and batches with the answers' tokens supervised and nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, islice, repeat
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from oxe_mix.errors import UserError
from oxe_mix.images import opened
from train_llava.augment import Augment, augment
from train_llava.batch import BatchPlan
from train_llava.llava_data import Conversation
from train_llava.mixture import MixedOrder
from train_llava.processor import IGNORE, OneViewProcessor, Size, Turns, View, open_frame
from train_llava.slots import slot_ids
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
    """One sample: ids, labels and the action dimensions of its labels, of one length; and its views.

    A label is the id that stands there, and that the position before is to say; at the last `num_slots` it is
    what the position itself is to say.
    """

    ids: list[int]
    labels: list[int]
    dimensions: list[int]
    views: tuple[View, ...] = ()
    num_slots: int = 0

    def said(self, values: list[int], nothing: int) -> list[int]:
        """Labels, or dimensions, moved to the positions that are to say them."""
        return values if self.num_slots else [*values[1:], nothing]


class Tokenized:
    """Conversations to ids and labels. A dimension is the number of a token in its action, 0 … A - 1.

    A robot's answer stands in the slots where the tokenizer has some, without an end of the turn.
    """

    def __init__(self, processor: OneViewProcessor, action_dim: int) -> None:
        self._processor, self._action_dim = processor, action_dim
        self._slots = slot_ids(processor.tokenizer)
        self._prompt = lru_cache(_PROMPTS_KEPT)(processor.prompt_ids)

    def __call__(self, turns: Turns, sizes: list[Size], *, is_robot: bool) -> Tokens:
        """All but the views. Raises: ValueError when the prompt does not fit the images, or the answer the
        slots.
        """
        tokens = tuple(self._processor.num_view_tokens(size) for size in sizes)
        if len(turns) > 2:
            ids, labels = self._processor.conversation_ids(turns, tokens)
            return Tokens(ids, labels, [NO_DIMENSION] * len(ids))
        (_, question), (_, answer) = turns
        prompt, answered = self._prompt(question, tokens), self._processor.answer_ids(answer)
        unsaid, no_dimension = [IGNORE] * len(prompt), [NO_DIMENSION] * len(prompt)
        if not is_robot:
            return Tokens(prompt + answered, unsaid + answered, no_dimension + [NO_DIMENSION] * len(answered))
        actions = answered[:-1]  # the last token ends the turn
        dimensions = no_dimension + [i % self._action_dim for i in range(len(actions))]
        if not self._slots:
            return Tokens(prompt + answered, unsaid + answered, [*dimensions, NO_DIMENSION])
        if len(actions) != len(self._slots):
            raise ValueError(f"an answer of {len(actions)} tokens, but {len(self._slots)} slots")
        return Tokens(prompt + self._slots, unsaid + actions, dimensions, num_slots=len(actions))


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
        tokens = self._ids(sample, [view.size for view in views], source.is_robot)
        return dataclasses.replace(tokens, views=tuple(views))

    def lengths(self, source: int, index: int) -> Lengths:
        """Of a sample by its text alone; of its frames, at most the sizes are read.

        Raises: UserError naming a sample that is not usable.
        """
        own = self.data.sources[source]
        sample = own.sample(index)
        sizes = [_size(frame.read(), str(frame)) for frame in sample.images] if self._needs_sizes else []
        sizes = sizes or [(0, 0)] * len(sample.images)
        tokens = self._ids(sample, sizes, own.is_robot)
        supervised = sum(label != IGNORE for label in tokens.labels)
        frames = sum(self._processor.num_view_tokens(size) for size in sizes)
        ends = 0 if tokens.num_slots else len(sample.turns) // 2
        return Lengths(sample.id, len(tokens.ids), frames, supervised, supervised - ends)

    @property
    def _needs_sizes(self) -> bool:
        return self._processor.needs_sizes

    def _ids(self, sample: Conversation, sizes: list[Size], is_robot: bool) -> Tokens:
        try:
            return self._tokenized(sample.turns, sizes, is_robot=is_robot)
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
        with opened(encoded) as image:
            return image.height, image.width
    except ValueError as error:
        raise UserError(f"{name}: not an image that can be decoded ({error})") from error


def collate(samples: list[Tokens | UserError], processor: OneViewProcessor) -> dict[str, Any]:
    """A batch, padded at the end.

    Returns: input_ids [B, L]; logits_at [K], the positions in the flattened batch that are to say something;
        targets and dimensions [K] of those; pixel_values and image_sizes where there are frames; slots
        [B, 2], where action slots begin and end, where there are some. With a sample that is an error:
        {"error": its text} alone.
    """
    whole = [sample for sample in samples if isinstance(sample, Tokens)]
    for sample in samples:
        if isinstance(sample, UserError):
            return {"error": str(sample)}
    length = max(len(sample.ids) for sample in whole)
    pad = int(processor.tokenizer.pad_token_id)
    ids = _padded([sample.ids for sample in whole], length, pad)
    targets = _padded([sample.said(sample.labels, IGNORE) for sample in whole], length, IGNORE)
    dimensions = [sample.said(sample.dimensions, NO_DIMENSION) for sample in whole]
    rows, columns = (targets != IGNORE).nonzero(as_tuple=True)
    frames = processor.frames(view for sample in whole for view in sample.views)
    ends = [len(sample.ids) for sample in whole]
    slots = [[end - sample.num_slots, end] for end, sample in zip(ends, whole, strict=True)]
    return {
        "input_ids": ids,
        "logits_at": rows * length + columns,
        "targets": targets[rows, columns],
        "dimensions": _padded(dimensions, length, NO_DIMENSION)[rows, columns],
        **{name: torch.from_numpy(value) for name, value in frames.items()},
        **({"slots": torch.tensor(slots)} if any(sample.num_slots for sample in whole) else {}),
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
