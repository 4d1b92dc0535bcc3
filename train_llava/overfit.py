"""Training on one batch alone: what cannot learn even that has something wrong with it."""

from __future__ import annotations

import torch

from oxe_mix.errors import UserError
from train_llava.data import Draw, SampleDataset, Tokens, collate
from train_llava.model import OneViewLlava
from train_llava.processor import OneViewProcessor

_LEARNT = 0.9


def learnt_share(
    model: OneViewLlava, processor: OneViewProcessor, dataset: SampleDataset, num: int
) -> tuple[float, int]:
    """The share of the supervised tokens of the order's first samples that the model puts first, and their
    number.
    """
    right = total = 0
    model.eval()
    for position in range(num):
        sample = dataset[Draw(position, *dataset.data.order.sample_at(position))]
        assert isinstance(sample, Tokens)  # it was trained on
        batch = {name: value.to(model.device) for name, value in collate([sample], processor).items()}
        targets = batch.pop("targets")
        del batch["dimensions"]
        with torch.no_grad():
            right += int((model(**batch).logits.argmax(dim=-1) == targets).sum())
        total += len(targets)
    return right / total, total


def verdict(share: float, num_tokens: int, steps: int, loss: float) -> str:
    """In words. Raises: UserError when the batch was not learnt."""
    said = (
        f"after {steps:,} steps on one batch: loss {loss:.4f}, {share:.1%} of its {num_tokens:,} tokens right"
    )
    if share < _LEARNT:
        raise UserError(
            f"{said}; {_LEARNT:.0%} would do. Raise train.learning_rates, or look at what is supervised"
        )
    return f"{said}: it can learn"
