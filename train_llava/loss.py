"""Cross-entropy on answers; by choice softened over neighbouring bins, and weighted by action dimension."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from convert.action_codec import NUM_BINS, ActionCodec
from oxe_mix.errors import UserError
from train_llava.config import LossConfig


class AnswerLoss:
    """The sum of the losses of supervised tokens."""

    def __init__(self, config: LossConfig, codec: ActionCodec, action_ids: Sequence[int]) -> None:
        """Raises: UserError when there is not one weight for each action dimension."""
        self._ids = torch.tensor(action_ids)
        self._weights = _weights(config, codec.action_dim)
        self._spread: Tensor | None = None
        if config.neighbour_sigma > 0:
            self._spread = torch.from_numpy(_spread(config.neighbour_sigma, _possible(codec)))

    def __call__(self, logits: Tensor, targets: Tensor, dimensions: Tensor) -> Tensor:
        """The sum over K supervised tokens; the caller divides by their number.

        Args:
            logits: [K, V]; targets: [K] token ids; dimensions: [K], 0 … A - 1 of an action's token, below 0
                of any other, which is learnt as it is and has weight 1.
        """
        logits = logits.float()
        losses = nn.functional.cross_entropy(logits, targets, reduction="none")
        is_action = dimensions >= 0
        of_action = dimensions.clamp(min=0)
        if self._spread is not None:
            losses = torch.where(is_action, self._softened(logits, targets, of_action), losses)
        if self._weights is not None:
            losses = losses * torch.where(is_action, self._weights.to(losses)[of_action], 1.0)
        return losses.sum()

    def _softened(self, logits: Tensor, targets: Tensor, dimensions: Tensor) -> Tensor:
        """Cross-entropy with a distribution over bins; of tokens that are no action's, any number."""
        assert self._spread is not None
        ids = self._ids.to(targets.device)
        # searchsorted would need sorted ids; equality needs none, and K x 256 is little beside K x V.
        bins = (targets[:, None] == ids).int().argmax(dim=1)
        wanted = self._spread.to(logits)[dimensions, bins]
        return -(wanted * logits.log_softmax(dim=-1)[:, ids]).sum(dim=-1)


def _weights(config: LossConfig, action_dim: int) -> Tensor | None:
    """One per dimension, their mean 1: the loss keeps its scale beside text and ends of turns."""
    if config.dimension_weights is None:
        return None
    weights = np.array(config.dimension_weights)
    if len(weights) != action_dim:
        raise UserError(
            f"train.loss.dimension_weights has {len(weights)} numbers; the data's actions have {action_dim}"
        )
    if weights.sum() == 0:
        raise UserError("train.loss.dimension_weights are all 0; nothing would be learnt")
    return torch.from_numpy(weights / weights.mean())


def _possible(codec: ActionCodec) -> NDArray[np.bool_]:
    """Which bins any dataset's actions can have, [A, 256]: a closed gripper is no neighbour of -0.01."""
    of_datasets = [stats.possible_bins(codec.binning) for stats in codec.datasets.values()]
    possible: NDArray[np.bool_] = np.any(of_datasets, axis=0)
    return possible


def _spread(sigma: float, possible: NDArray[np.bool_]) -> NDArray[np.float32]:
    """For each dimension and recorded bin the distribution to learn, [A, 256, 256]: a Gaussian about it, cut
    to the bins that are possible, and the bin itself always.
    """
    bins = np.arange(NUM_BINS)
    bell = np.exp(-0.5 * ((bins[:, None] - bins) / sigma) ** 2)
    cut = bell * (possible[:, None, :] | np.eye(NUM_BINS, dtype=bool))
    spread: NDArray[np.float32] = (cut / cut.sum(axis=-1, keepdims=True)).astype(np.float32)
    return spread
