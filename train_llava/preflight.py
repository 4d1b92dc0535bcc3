"""What must hold before step 1: a week of training is not where to find out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from oxe_mix.errors import UserError
from train_llava.config import RunConfig
from train_llava.data import SampleDataset, collate
from train_llava.model import OneViewLlava
from train_llava.processor import IGNORE, OneViewProcessor

_PROBED = 256  # samples whose length and labels are counted, spread over the data


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
    probe = list(range(0, len(dataset), max(1, len(dataset) // _PROBED)))
    yield f"data: {len(dataset):,} samples; {check_lengths(dataset, probe, own.max_length)}"
    batch = collate([dataset[0]], processor)
    yield f"first sample: {first_batch_text(batch, processor)}"
    change = frame_effect(model, batch)
    if change == 0:
        raise UserError("a black and a white frame give the same logits: the model does not see its frames")
    yield f"a black and a white frame change the logits by up to {change:.2g}"


def check_lengths(dataset: SampleDataset, indices: list[int], max_length: int) -> str:
    """Prove that samples fit and are supervised; returns the length budget of the longest, in words.

    Raises: UserError naming the first sample that is too long or has nothing to learn.
    """
    longest = 0
    for index in indices:
        tokens = dataset[index]
        supervised = sum(label != IGNORE for label in tokens.labels)
        if supervised <= 1:
            raise UserError(f"{dataset.reader[index].id}: the answer has no token to learn from")
        if len(tokens.ids) > max_length:
            raise UserError(
                f"{dataset.reader[index].id}: {len(tokens.ids)} tokens > train.max_length {max_length}"
            )
        longest = max(longest, len(tokens.ids))
    return f"longest sample {longest} tokens <= {max_length}"


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
    """The largest difference in logits between a black and a white frame."""
    model.eval()
    with torch.no_grad():
        black, white = (
            model(batch["input_ids"], torch.full_like(batch["pixel_values"], value)).logits
            for value in (-1.0, 1.0)
        )
    model.train()
    return float((black - white).abs().max())
