"""What must hold before step 1: a week of training is not where to find out."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oxe_mix.errors import UserError
from oxe_mix.progress import Goal, Sample, progress
from train_llava import ranks
from train_llava.config import REHEARSAL
from train_llava.data import Draw, Lengths, SampleDataset, Tokens, collate
from train_llava.model import OneViewLlava
from train_llava.processor import IGNORE, OneViewProcessor

_PROGRESS_FROM = 20_000  # samples; fewer are read within two seconds


@dataclass(frozen=True, slots=True)
class _Found:
    """What one rank found in its share: the longest sample, and the first that will not do."""

    longest: Lengths | None
    wrong: tuple[int, str] | None


def check_lengths(dataset: SampleDataset, max_length: int) -> str:
    """Prove of every sample of every source that it fits and is supervised; the ranks share the work.

    Returns: the length of the longest, part by part, in words.
    Raises: UserError, on all ranks, naming the first sample that is not usable, too long or has nothing to
        learn.
    """
    found = ranks.gather(_look_at(dataset, max_length, ranks.rank(), ranks.num_ranks()))
    if wrong := [own.wrong for own in found if own.wrong is not None]:
        raise UserError(min(wrong)[1])
    longest = max((own.longest for own in found if own.longest is not None), key=lambda own: own.total)
    text = longest.total - longest.frames - longest.supervised
    return (
        f"length: frames {longest.frames} + prompt {text} + answer {longest.supervised} = {longest.total} "
        f"<= {max_length} (train.max_length); the longest is {longest.id}"
    )


def _look_at(dataset: SampleDataset, max_length: int, rank: int, num_ranks: int) -> _Found:
    sources = [source.range.samples for source in dataset.data.sources]
    total = sum(map(len, sources))
    first, last = total * rank // num_ranks, total * (rank + 1) // num_ranks
    numbered = ((i, index) for i, samples in enumerate(sources) for index in samples)
    longest, done = None, first

    def far() -> Sample:
        return Sample(done - first)

    def look() -> _Found:
        nonlocal longest, done
        for number, (source, index) in enumerate(numbered):
            if not first <= number < last:
                continue
            done = number
            try:
                own = dataset.lengths(source, index)
                _check(own, max_length)
            except UserError as error:
                return _Found(longest, (number, str(error)))
            if longest is None or own.total > longest.total:
                longest = own
        return _Found(longest, None)

    if rank != 0 or last - first < _PROGRESS_FROM:
        return look()
    with progress(Goal("looking at samples", "sample", last - first), far):
        return look()


def _check(own: Lengths, max_length: int) -> None:
    if own.learnt < 1:
        raise UserError(f"{own.id}: the answer has no token to learn from")
    if own.total > max_length:
        text = own.total - own.frames - own.supervised
        raise UserError(
            f"{own.id}: frames {own.frames} + prompt {text} + answer {own.supervised} = {own.total} tokens "
            f"> train.max_length {max_length}"
        )


def first_batch(dataset: SampleDataset, num: int) -> list[Tokens]:
    """The first samples of the run's order. Raises: UserError for one that cannot be had."""
    found = [
        dataset[Draw(position, *dataset.data.order.sample_at(position))]
        for position in range(min(num, len(dataset.data.order)))
    ]
    for sample in found:
        if isinstance(sample, UserError):
            raise sample
    return [sample for sample in found if isinstance(sample, Tokens)]


def in_words(sample: Tokens, processor: OneViewProcessor) -> str:
    """A sample decoded: what is asked, and in brackets what is supervised."""
    image, decode = processor.image_token_id, processor.tokenizer.decode
    parts: list[str] = []
    start = 0
    for end in range(1, len(sample.ids) + 1):
        same = end < len(sample.ids) and _kind(sample, end, image) == _kind(sample, start, image)
        if same:
            continue
        supervised, is_frame = _kind(sample, start, image)
        ids = sample.labels if supervised else sample.ids  # in a slot stands what it is to say
        text = decode(ids[start:end], spaces_between_special_tokens=False)
        if is_frame:
            text = f"<image> x {end - start}"
        parts.append(f"[{text}]" if supervised else repr(text)[1:-1])
        start = end
    return "".join(parts)


def _kind(sample: Tokens, i: int, image: int) -> tuple[bool, bool]:
    return sample.labels[i] != IGNORE, sample.ids[i] == image


def frame_effect(model: OneViewLlava, batch: dict[str, Tensor]) -> float:
    """The largest difference that a black or a white frame makes to the logits of the answers."""
    pixels = batch["pixel_values"]
    black, white = (
        _logits(model, batch | {"pixel_values": torch.full_like(pixels, value)}) for value in (-1.0, 1.0)
    )
    return float((black - white).abs().max())


def check_sight(model: OneViewLlava, processor: OneViewProcessor, samples: list[Tokens]) -> str:
    """Prove that frames reach the answers. Raises: UserError when they do not."""
    with_frames = [sample for sample in samples if sample.views][:1]
    if not with_frames:
        return "the first samples have no frames: that they reach the answers is not proved"
    change = frame_effect(model, _on_device(collate(list(with_frames), processor), model))
    if change == 0:
        raise UserError("a black and a white frame give the same logits: the model does not see its frames")
    return f"a black and a white frame change the logits by up to {change:.2g}"


def rehearse_save(
    model: OneViewLlava,
    processor: OneViewProcessor,
    samples: list[Tokens],
    run: Path,
    save_and_load: Callable[[Path], OneViewLlava],
) -> str:
    """Save and reload before step 1: a week of training is worth only what its checkpoint gives back.

    Args:
        save_and_load: into and from a folder, as the run will do it.

    Raises: UserError when the reloaded model answers differently.
    """
    batch = _on_device(collate(list(samples[:1]), processor), model)
    before = _logits(model, batch)
    with tempfile.TemporaryDirectory(dir=run, prefix=REHEARSAL) as folder:
        reloaded = save_and_load(Path(folder))
    after = _logits(reloaded.to(model.device), batch)  # type: ignore[arg-type]
    if not torch.equal(before, after):
        raise UserError(
            "a checkpoint that is saved and loaded again gives other logits: training would be lost"
        )
    return "a checkpoint that is saved and loaded again gives the same logits"


def _logits(model: OneViewLlava, batch: dict[str, Tensor]) -> Tensor:
    """Of the supervised positions; the model is left as it was."""
    inputs = {name: value for name, value in batch.items() if name not in ("targets", "dimensions")}
    was_training = model.training
    model.eval()
    with torch.no_grad():
        logits: Any = model(**inputs).logits
    model.train(was_training)
    found: Tensor = logits
    return found


def _on_device(batch: dict[str, Any], model: OneViewLlava) -> dict[str, Tensor]:
    return {name: value.to(model.device) for name, value in batch.items()}
