"""The loss of answers, beside its definition written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from convert.action_codec import ActionCodec
from convert.statistics import action_stats
from oxe_mix.errors import UserError
from train_llava.config import LossConfig
from train_llava.loss import AnswerLoss

MASK = (True, False)  # one movement, and a gripper
CODEC = ActionCodec(
    action_dim=2,
    datasets={"a": action_stats(np.random.default_rng(0).normal(size=(50, 2)).astype(np.float32), MASK, 1)},
)
IDS = list(range(300, 556))
VOCABULARY = 600


def _logits(number: int) -> torch.Tensor:
    return torch.randn(number, VOCABULARY, generator=torch.Generator().manual_seed(0))


TARGETS = torch.tensor([IDS[7], IDS[255], 20, IDS[0], IDS[128]])
DIMENSIONS = torch.tensor([0, 1, -1, 0, 1])


def test_without_options_it_is_cross_entropy_summed() -> None:
    loss = AnswerLoss(LossConfig(), CODEC, IDS)(_logits(5), TARGETS, DIMENSIONS)
    expected = torch.nn.functional.cross_entropy(_logits(5), TARGETS, reduction="sum")
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_neighbouring_bins_share_the_target_as_a_gaussian_cut_to_what_is_possible() -> None:
    loss = AnswerLoss(LossConfig(neighbour_sigma=2.0), CODEC, IDS)(_logits(5), TARGETS, DIMENSIONS)
    log_p = _logits(5).log_softmax(dim=-1)
    expected = 0.0
    for row, (target, dimension) in enumerate(zip(TARGETS.tolist(), DIMENSIONS.tolist(), strict=True)):
        if dimension < 0:
            expected -= float(log_p[row, target])
            continue
        recorded = target - IDS[0]
        first = 128 if dimension == 1 else 0  # a gripper has the upper half alone
        bell = {b: np.exp(-((b - recorded) ** 2) / (2 * 2.0**2)) for b in range(first, 256)}
        total = sum(bell.values())
        expected -= sum(share / total * float(log_p[row, IDS[b]]) for b, share in bell.items())
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_weights_are_per_dimension_and_leave_text_alone() -> None:
    config = LossConfig(dimension_weights=(3.0, 1.0))
    loss = AnswerLoss(config, CODEC, IDS)(_logits(5), TARGETS, DIMENSIONS)
    each = torch.nn.functional.cross_entropy(_logits(5), TARGETS, reduction="none")
    expected = (each * torch.tensor([1.5, 0.5, 1.0, 1.5, 0.5])).sum()  # their mean is 1
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_weights_must_be_as_many_as_dimensions_and_not_all_zero() -> None:
    with pytest.raises(UserError, match="has 3 numbers; the data's actions have 2"):
        AnswerLoss(LossConfig(dimension_weights=(1.0, 1.0, 1.0)), CODEC, IDS)
    with pytest.raises(UserError, match="nothing would be learnt"):
        AnswerLoss(LossConfig(dimension_weights=(0.0, 0.0)), CODEC, IDS)
