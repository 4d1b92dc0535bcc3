"""What must hold before step 1: a week of training is not where to find out."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from oxe_mix.errors import UserError
from train_llava.config import REHEARSAL, RunConfig
from train_llava.data import SampleDataset, collate
from train_llava.model import OneViewLlava, load_checkpoint, save_checkpoint
from train_llava.processor import IGNORE, OneViewProcessor


def preflight(
    config: RunConfig,
    model: OneViewLlava,
    processor: OneViewProcessor,
    dataset: SampleDataset,
    num_ranks: int,
) -> Iterator[str]:
    """Prove what must hold, and say it, a line each.

    Raises: UserError when a sample does not fit or has nothing to learn, or the frame does not reach the
    answer.
    """
    weights, own = sum(p.numel() for p in model.parameters()), config.train
    size, tokens = processor.image_processor.size["height"], processor.num_image_tokens + 1
    yield f"model: {weights / 1e6:.2f} M weights; a frame is one {size}x{size} view of {tokens} tokens"
    accumulate = config.accumulation(num_ranks)
    yield f"batch: {own.global_batch} = micro {own.micro_batch} x accumulate {accumulate} x ranks {num_ranks}"
    yield f"data: {len(dataset):,} samples; {check_lengths(dataset, own.max_length)}"
    batch = collate([dataset[0]], processor)
    yield f"first sample: {first_batch_text(batch, processor)}"
    change = frame_effect(model, batch)
    if change == 0:
        raise UserError("a black and a white frame give the same logits: the model does not see its frames")
    yield f"a black and a white frame change the logits by up to {change:.2g}"


def check_lengths(dataset: SampleDataset, max_length: int) -> str:
    """Prove that every sample fits and is supervised; returns the length of the longest, in words.

    Raises: UserError naming the first sample that is too long or has nothing to learn.
    """
    longest = 0
    for index in range(len(dataset)):
        prompt, answer = dataset.token_counts(index)
        # The last token of an answer is the end of its turn.
        if answer <= 1:
            raise UserError(f"{dataset.reader[index].id}: the answer has no token to learn from")
        if prompt + answer > max_length:
            name = dataset.reader[index].id
            raise UserError(f"{name}: {prompt + answer} tokens > train.max_length {max_length}")
        longest = max(longest, prompt + answer)
    return f"longest sample {longest} tokens <= {max_length}"


def rehearse_save(
    model: OneViewLlava, processor: OneViewProcessor, run: Path, batch: dict[str, torch.Tensor]
) -> None:
    """Save and reload before step 1: a week of training is worth only what its checkpoint gives back.

    Raises: UserError when the reloaded model answers differently.
    """
    with tempfile.TemporaryDirectory(dir=run, prefix=REHEARSAL) as folder:
        save_checkpoint(Path(folder), model, processor)
        reloaded, _ = load_checkpoint(folder)
    inputs = {key: batch[key] for key in ("input_ids", "pixel_values", "attention_mask")}
    with torch.no_grad():
        before, after = (own.eval()(**inputs).logits for own in (model, reloaded))
    model.train()
    if not torch.equal(before, after):
        raise UserError(
            "a checkpoint that is saved and loaded again gives other logits: training would be lost"
        )


def first_batch_text(batch: dict[str, Any], processor: OneViewProcessor) -> str:
    """The first sample of a batch in words: what is asked, and in brackets what is supervised."""
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    ids = ids[batch["attention_mask"][0].bool()]
    labels = labels[: len(ids)]
    decode = processor.tokenizer.decode
    image = processor.tokenizer.convert_ids_to_tokens(processor.image_token_id)
    asked = decode(ids[labels == IGNORE], spaces_between_special_tokens=False)
    frames = asked.count(image)
    asked = asked.replace(image * frames, f"{image} x {frames}")
    return f"{asked!r} -> supervised: [{decode(ids[labels != IGNORE], spaces_between_special_tokens=False)}]"


def frame_effect(model: OneViewLlava, batch: dict[str, torch.Tensor]) -> float:
    """The largest difference that a black or a white frame makes to the logits of the answer."""
    answer = batch["labels"][:, 1:] != IGNORE
    model.eval()
    with torch.no_grad():
        black, white = (
            model(batch["input_ids"], torch.full_like(batch["pixel_values"], value)).logits[:, :-1][answer]
            for value in (-1.0, 1.0)
        )
    model.train()
    return float((black - white).abs().max())
