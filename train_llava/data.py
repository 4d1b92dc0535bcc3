"""Samples in training order, and batches with the answer's tokens supervised and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from convert.reader import ConversationReader
from train_llava.processor import IGNORE, OneViewProcessor, open_frame


@dataclass(frozen=True, slots=True)
class Tokens:
    """One sample as ids and labels of the same length, and its views, uint8 [N, S, S, 3]."""

    ids: list[int]
    labels: list[int]
    views: NDArray[np.uint8]


class SampleDataset(Dataset[Tokens]):
    """A reader's samples as tokens and views. A sample that cannot be had is an error: none is ever
    swapped.
    """

    def __init__(self, reader: ConversationReader, processor: OneViewProcessor, *, cache: bool) -> None:
        self.reader = reader
        self._processor = processor
        self._prompts: dict[str, list[int]] = {}
        self._cache: dict[int, Tokens] | None = {} if cache else None

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> Tokens:
        """One sample. Raises: UserError naming the sample whose frame or line is broken."""
        if self._cache is None:
            return self._load(index)
        if index not in self._cache:
            self._cache[index] = self._load(index)
        return self._cache[index]

    def token_counts(self, index: int) -> tuple[int, int]:
        """Tokens of a sample's prompt and of its answer; its frames are not opened."""
        sample = self.reader[index]
        return len(self._prompt(sample.question)), len(self._processor.answer_ids(sample.answer))

    def _prompt(self, question: str) -> list[int]:
        if question not in self._prompts:
            self._prompts[question] = self._processor.prompt_ids(question)
        return self._prompts[question]

    def _load(self, index: int) -> Tokens:
        sample = self.reader[index]
        prompt, answer = self._prompt(sample.question), self._processor.answer_ids(sample.answer)
        views = np.stack([self._processor.view(open_frame(frame)) for frame in sample.frames])
        return Tokens([*prompt, *answer], [IGNORE] * len(prompt) + answer, views)


def collate(samples: list[Tokens], processor: OneViewProcessor) -> dict[str, Tensor]:
    """A batch, padded at the end: input_ids, labels and attention_mask [B, L], pixel_values [N, 3, S, S]."""
    length = max(len(sample.ids) for sample in samples)
    pad = int(processor.tokenizer.pad_token_id)
    ids = [sample.ids + [pad] * (length - len(sample.ids)) for sample in samples]
    labels = [sample.labels + [IGNORE] * (length - len(sample.labels)) for sample in samples]
    mask = [[1] * len(sample.ids) + [0] * (length - len(sample.ids)) for sample in samples]
    return {
        "input_ids": torch.tensor(ids),
        "labels": torch.tensor(labels),
        "attention_mask": torch.tensor(mask),
        "pixel_values": torch.from_numpy(
            processor.pixels(np.concatenate([sample.views for sample in samples]))
        ),
    }


class MixSampler(Sampler[int]):
    """An epoch's order by index: as many draws as samples, P(dataset) proportional to weight x its samples.

    Within a dataset no sample comes again before all others have come; with weight 1 everywhere an epoch is
    one pass over everything. The order depends on the seed and the epoch alone.
    """

    def __init__(self, ranges: dict[str, range], weights: dict[str, float], seed: int) -> None:
        self._ranges = {name: samples for name, samples in ranges.items() if len(samples)}
        self._draws = _share_out(
            sum(map(len, self._ranges.values())),
            {name: weights[name] * len(samples) for name, samples in self._ranges.items()},
        )
        self._seed, self._epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the trainer: another epoch, another order."""
        self._epoch = epoch

    def __len__(self) -> int:
        return sum(self._draws.values())

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng([self._seed, self._epoch])
        picked = [_draw(samples, self._draws[name], rng) for name, samples in self._ranges.items()]
        order: list[int] = rng.permutation(np.concatenate(picked)).tolist()
        return iter(order)


def _draw(samples: range, draws: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """`draws` of the samples, in passes without replacement."""
    passes = -(-draws // len(samples))
    rounds = [rng.permutation(samples) for _ in range(passes)]
    return np.concatenate([np.zeros(0, np.int64), *rounds])[:draws]


def _share_out(total: int, parts: dict[str, float]) -> dict[str, int]:
    """Whole numbers in proportion to `parts` that sum to `total`: the largest remainders get what rounding
    leaves.
    """
    exact = {name: total * part / sum(parts.values()) for name, part in parts.items()}
    whole = {name: int(value) for name, value in exact.items()}
    by_remainder = sorted(exact, key=lambda name: (whole[name] - exact[name], name))
    for name in by_remainder[: total - sum(whole.values())]:
        whole[name] += 1
    return whole
