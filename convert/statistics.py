"""Exact action statistics of a dataset, over every step after the recipe and before anything is dropped."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from convert.action_codec import ActionStats

STATISTICS_FILE = "dataset_statistics.json"


def action_stats(actions: NDArray[np.float32], mask: tuple[bool, ...], num_trajectories: int) -> ActionStats:
    """Quantiles, moments and range of [N, A] actions in robot units, [A] each.

    Raises: ValueError when there is no step at all.
    Source: OpenVLA's dataset statistics: 1 % and 99 % quantiles with linear interpolation, population
    deviation.
    """
    if len(actions) == 0:
        raise ValueError("no step is left after the recipe, so there are no statistics")
    x = actions.astype(np.float64)
    q01, q99 = np.quantile(x, [0.01, 0.99], axis=0)
    return ActionStats(
        q01=tuple(q01),
        q99=tuple(q99),
        mean=tuple(x.mean(axis=0)),
        std=tuple(x.std(axis=0)),
        min=tuple(x.min(axis=0)),
        max=tuple(x.max(axis=0)),
        mask=mask,
        num_transitions=len(x),
        num_trajectories=num_trajectories,
    )


def openvla_layout(stats: dict[str, ActionStats]) -> dict[str, Any]:
    """dataset_statistics.json as OpenVLA lays it out, for tools that read that."""
    keys = ("mean", "std", "max", "min", "q01", "q99", "mask")
    return {
        name: {
            "action": {key: list(getattr(own, key)) for key in keys},
            "num_transitions": own.num_transitions,
            "num_trajectories": own.num_trajectories,
        }
        for name, own in stats.items()
    }
