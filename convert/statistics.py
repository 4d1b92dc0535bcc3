"""Exact action statistics of a dataset, over every step after the recipe and before anything is dropped."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from convert.action_codec import ActionStats

STATISTICS_FILE = "dataset_statistics.json"


class DatasetStats(BaseModel):
    """What one dataset's actions, and its robot's states where they are asked for, are scaled by."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    actions: ActionStats
    states: ActionStats | None = None


def action_stats(actions: NDArray[np.float32], mask: tuple[bool, ...], num_trajectories: int) -> ActionStats:
    """Quantiles, moments and range of [N, A] actions in robot units, [A] each.

    Raises: ValueError when there is no step at all.
    Source: OpenVLA's dataset statistics: 1 % and 99 % quantiles with linear interpolation, population
    deviation.
    """
    return column_stats((actions[:, a] for a in range(actions.shape[1])), mask, num_trajectories)


def column_stats(
    columns: Iterable[NDArray[np.float32]], mask: tuple[bool, ...], num_trajectories: int
) -> ActionStats:
    """The same from one column after the other, [N] each: only one has to fit in memory.

    Raises: ValueError when there is no step at all.
    """
    figures: list[tuple[float, ...]] = []
    num_steps = 0
    for column in columns:
        if len(column) == 0:
            raise ValueError("no step is left after the recipe, so there are no statistics")
        x = column.astype(np.float64)
        moments = (x.mean(), x.std(), x.min(), x.max())
        # Sorting in place what is not needed any more, instead of a copy of it.
        quantiles = np.quantile(x, [0.01, 0.99], overwrite_input=True)
        figures.append((*map(float, quantiles), *map(float, moments)))
        num_steps = len(x)
    q01, q99, mean, std, low, high = zip(*figures, strict=True)
    return ActionStats(
        q01=q01,
        q99=q99,
        mean=mean,
        std=std,
        min=low,
        max=high,
        mask=mask,
        num_transitions=num_steps,
        num_trajectories=num_trajectories,
    )


def openvla_layout(stats: dict[str, DatasetStats]) -> dict[str, Any]:
    """dataset_statistics.json as OpenVLA lays it out, for tools that read that; `proprio` where the state was
    asked for.
    """
    keys = ("mean", "std", "max", "min", "q01", "q99")

    def figures(own: ActionStats) -> dict[str, list[float]]:
        return {key: list(getattr(own, key)) for key in keys}

    return {
        name: {
            "action": {**figures(own.actions), "mask": list(own.actions.mask)},
            **({"proprio": figures(own.states)} if own.states else {}),
            "num_transitions": own.actions.num_transitions,
            "num_trajectories": own.actions.num_trajectories,
        }
        for name, own in stats.items()
    }
