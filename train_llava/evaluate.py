"""Answer samples with the decoder that a robot would use, and score the answers. The ranks share the work."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch.nn import functional

from convert.action_codec import ActionCodec, bins_to_text
from convert.reader import ConversationReader
from oxe_mix.errors import UserError
from oxe_mix.progress import Goal, Sample, progress
from train_llava.data import Tokenized, Tokens, collate
from train_llava.decode import ActionDecoder
from train_llava.metrics import Scored, score
from train_llava.mixture import share_out
from train_llava.model import OneViewLlava
from train_llava.processor import OneViewProcessor, View, open_frame
from train_llava.recorded import Recording, Translation

BATCH = 32
_MAX_THREADS = 8  # that decode frames; decoding lets go of Python's lock


@dataclass(frozen=True, slots=True)
class HeldOut:
    """What is scored: the samples of a converted folder, or some of them."""

    reader: ConversationReader
    codec: ActionCodec  # the folder's own, which need not have the statistics that the model acts with
    seed: int = 0  # decides whose frames a sample is shown where frames are shuffled
    samples: int | None = None  # so many, in proportion to each dataset's and evenly spread; None: all
    only: tuple[str, ...] = ()  # datasets; none named: all
    keys: Mapping[str, str] = field(default_factory=dict)  # of a dataset that the model has by another name
    batch: int = BATCH  # samples in a forward pass


def evaluate(
    model: OneViewLlava, processor: OneViewProcessor, codec: ActionCodec, held_out: HeldOut
) -> dict[str, Any]:
    """Score a model's answers; every rank gets the same report, whatever their number.

    With shuffled images each question is asked about the frames of another sample of its dataset: a model
    that looks at its frames must then do worse. `loss` is the cross-entropy of the recorded answers, a
    supervised token, without what training may do beside it.

    Args:
        codec: what the model acts with; of the folder's action width, chunk and binning.

    Raises: UserError for a sample or frame that cannot be read; ValueError when there is no sample.
    """
    exam = _Exam(model, processor, codec, held_out)
    batches = exam.batches()
    rank, num_ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    answered: dict[int, _Answered] = {}
    mine = _rounds(len(batches), rank, num_ranks)
    with _shown(rank, sum(map(len, batches)), lambda: len(answered) * num_ranks * held_out.batch):
        # Under ZeRO-3 each pass is a common step of all ranks: who has no batch left asks once more about the
        # first sample, and nobody looks at the answer.
        asked = [batches[number] if number is not None else batches[0][:1] for number in mine]
        for number, answers in zip(mine, exam.sit(asked), strict=True):
            if number is not None:
                answered[number] = answers
    if num_ranks > 1:
        parts: list[dict[int, _Answered]] = [{} for _ in range(num_ranks)]
        dist.all_gather_object(parts, answered)
        answered = {number: answers for part in parts for number, answers in part.items()}
    return exam.report([answered[number] for number in range(len(batches))])


@dataclass(frozen=True, slots=True)
class _Question:
    """One sample, ready to be asked."""

    key: str  # of its dataset in the model's codec
    recording: Recording
    views: list[View]
    others: list[View]  # of the sample that lends its frames where they are shuffled


@dataclass(frozen=True, slots=True)
class _Answered:
    """What is left of a batch."""

    parts: tuple[
        NDArray[Any], ...
    ]  # recorded, target, predicted, shuffled, last, first: as `Scored` has them
    losses: tuple[float, float]  # asked about its own frames and about others', summed over the tokens
    num_tokens: int


class _Exam:
    """One model before one set of samples."""

    def __init__(
        self, model: OneViewLlava, processor: OneViewProcessor, codec: ActionCodec, held_out: HeldOut
    ) -> None:
        self._model, self._processor, self._codec, self._held_out = model, processor, codec, held_out
        self._decoder = ActionDecoder(model, processor, codec)
        self._tokenized = Tokenized(processor, codec.action_dim)
        only = held_out.only or tuple(held_out.reader.ranges)
        ranges = {name: own for name, own in held_out.reader.ranges.items() if name in only and own}
        self._picked = pick(ranges, held_out.samples)
        self._translations = {
            name: Translation(held_out.codec, name, codec, held_out.keys.get(name, name)) for name in ranges
        }
        self._instead = shuffled(held_out.reader.ranges, held_out.seed)

    def batches(self) -> list[list[int]]:
        """The samples in order. Raises: ValueError when there is none."""
        if not self._picked:
            raise ValueError("no sample to score")
        order: list[int] = np.concatenate(list(self._picked.values())).tolist()
        size = self._held_out.batch
        return [order[start : start + size] for start in range(0, len(order), size)]

    def sit(self, batches: list[list[int]]) -> Iterator[_Answered]:
        """Answer batch after batch; frames of the next one are decoded meanwhile, and none is kept."""
        was_training = self._model.training
        self._model.eval()
        threads = min(_MAX_THREADS, len(os.sched_getaffinity(0)))
        try:
            with ThreadPoolExecutor(threads) as pool:
                coming: list[Future[_Question]] = []
                for batch in [*batches, []]:
                    due = coming  # before anything is begun: the frames of the last batch go now
                    coming = [pool.submit(self._question, index) for index in batch]
                    if due:
                        yield self._answer([future.result() for future in due])
        finally:
            self._model.train(was_training)

    def _question(self, index: int) -> _Question:
        reader = self._held_out.reader
        sample, other = reader[index], reader[int(self._instead[index])]
        before = reader[index - 1] if index > reader.ranges[sample.dataset].start else None
        translation = self._translations[sample.dataset]
        return _Question(
            key=translation.key,
            recording=translation.recording(sample, before),
            views=[self._processor.view(open_frame(frame)) for frame in sample.frames],
            others=[self._processor.view(open_frame(frame)) for frame in other.frames],
        )

    def _answer(self, batch: list[_Question]) -> _Answered:
        recordings = [question.recording for question in batch]
        bins, losses, num_tokens = [], [], 0
        for frames in ([question.views for question in batch], [question.others for question in batch]):
            prediction = self._decoder.predict(
                [own.question for own in recordings],
                [view for views in frames for view in views],
                [question.key for question in batch],
            )
            bins.append(prediction.bins)
            loss, num_tokens = self._loss(recordings, frames)
            losses.append(loss)
        recorded = np.stack([own.actions for own in recordings])
        target = np.stack([own.target for own in recordings])
        last = np.stack([own.target[0] if own.last is None else own.last for own in recordings])
        first = np.array([own.last is None for own in recordings])
        return _Answered((recorded, target, *bins, last, first), (losses[0], losses[1]), num_tokens)

    def _loss(self, recordings: list[Recording], frames: list[list[View]]) -> tuple[float, int]:
        """Cross-entropy of the recorded answers, summed over the supervised tokens, and their number."""
        samples: list[Tokens | UserError] = []
        for own, views in zip(recordings, frames, strict=True):
            turns = [("human", own.question), ("gpt", bins_to_text(own.target))]
            tokens = self._tokenized(turns, [view.size for view in views], is_robot=True)
            samples.append(dataclasses.replace(tokens, views=tuple(views)))
        batch = collate(samples, self._processor)
        inputs = {name: value.to(self._model.device) for name, value in batch.items() if name != "dimensions"}
        targets = inputs.pop("targets")
        with torch.inference_mode():
            logits = self._model(**inputs).logits.float()
            return float(functional.cross_entropy(logits, targets, reduction="sum")), len(targets)

    def report(self, answered: list[_Answered]) -> dict[str, Any]:
        """The report of all batches, in order."""
        parts = [np.concatenate(arrays) for arrays in zip(*(own.parts for own in answered), strict=True)]
        scored, start = [], 0
        for name, picked in self._picked.items():
            one, here = self._translations[name], slice(start, start := start + len(picked))
            scored.append(Scored(name, one.own, one.measured, *(part[here] for part in parts)))
        num_tokens = sum(batch.num_tokens for batch in answered)
        own, swapped = (sum(batch.losses[i] for batch in answered) / num_tokens for i in (0, 1))
        loss = {"model": own, "shuffled_images": swapped}
        return score(self._codec.binning, scored) | {"loss": loss}


def pick(ranges: Mapping[str, range], samples: int | None) -> dict[str, NDArray[np.int64]]:
    """The samples of each dataset that are scored, in order.

    Args:
        ranges: the samples of each dataset, none of them empty.
        samples: how many in all, in proportion to the datasets' sizes, but one of each dataset as long as
            they are enough for that, and evenly spread over each; None: all.
    """
    sizes = [len(own) for own in ranges.values()]
    counts = sizes
    if samples is not None and samples < sum(sizes):
        each = int(samples >= len(sizes))
        parts = [Fraction(size - each) for size in sizes]
        counts = [each + more for more in share_out(samples - each * len(sizes), parts)]
    return {
        # In the middle of each of as many equal parts.
        name: own.start + (2 * np.arange(number) + 1) * len(own) // (2 * number)
        for (name, own), number in zip(ranges.items(), counts, strict=True)
        if number
    }


def shuffled(ranges: Mapping[str, range], seed: int) -> NDArray[np.int64]:
    """For each sample another one of its dataset: a seeded permutation, turned by one place."""
    rng, out = np.random.default_rng(seed), [np.zeros(0, np.int64)]
    for samples in ranges.values():
        order = rng.permutation(len(samples))
        turned = np.empty_like(order)
        turned[order] = np.roll(order, 1)
        out.append(turned + samples.start)
    return np.concatenate(out)


def _rounds(num_batches: int, rank: int, num_ranks: int) -> list[int | None]:
    """The batches of one rank; None where others have one more. What stands in a batch does not depend on
    the ranks, so neither do the answers.
    """
    rounds = -(-num_batches // num_ranks)
    numbers = range(rank, rounds * num_ranks, num_ranks)
    return [number if number < num_batches else None for number in numbers]


def _shown(rank: int, total: int, done: Callable[[], int]) -> AbstractContextManager[None]:
    """Progress, told by the first rank once it takes seconds."""
    if rank != 0:
        return nullcontext()
    return progress(Goal("evaluate", "sample", total), lambda: Sample(min(total, done())))
