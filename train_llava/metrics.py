"""How good predicted actions are, beside what a policy without eyes would score. Pure NumPy on bins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convert.action_codec import (
    ActionCodec,
    ActionStats,
    Binning,
    Bins,
    bins_to_normalized,
    normalize,
    normalized_to_bins,
    unnormalize,
)
from oxe_mix.text import table

Floats = NDArray[np.float64]
POLICIES = ("model", "shuffled_images", "mean_action", "repeat_last")


@dataclass(frozen=True, slots=True)
class Scored:
    """Held-out samples of one dataset in order of episode and step: what was recorded and what was predicted.

    target, predicted, shuffled: int64 [N, A]; shuffled is predicted from another sample's frame. episode:
    [N].
    """

    dataset: str
    episode: list[str]
    target: Bins
    predicted: Bins
    shuffled: Bins


def score(codec: ActionCodec, scored: list[Scored]) -> dict[str, Any]:
    """L1 and accuracy over the dimensions that move, for the model, for shuffled frames and for two
    baselines.

    A dimension moves when it is not constant in the dataset: constant ones are right for free. L1 is in the
    codec's range (movements -1 to 1, gripper 0 to 1) so that datasets can be averaged, and per dimension and
    dataset in robot units.

    Baselines: mean_action answers the dataset's mean; repeat_last the recorded action of the step before in
    the same episode, and the mean at an episode's first step.
    """
    parts = {own.dataset: _compare(own, codec.datasets[own.dataset], codec.binning) for own in scored}
    return {
        "samples": sum(len(own.target) for own in scored),
        "l1": {name: _mean_of([part[name].l1.mean(axis=1) for part in parts.values()]) for name in POLICIES},
        "accuracy": {
            name: {
                f"within_{d}" if d else "exact": _mean_of(
                    [(part[name].bins <= d).ravel() for part in parts.values()]
                )
                for d in (0, 1, 5)
            }
            for name in POLICIES
        },
        "datasets": {
            own.dataset: {
                "samples": len(own.target),
                "moving": [int(a) for a in np.flatnonzero(codec.datasets[own.dataset].moving)],
                "l1": {name: float(compared.l1.mean()) for name, compared in parts[own.dataset].items()},
                "l1_robot_units": {
                    name: [float(value) for value in compared.robot_units.mean(axis=0)]
                    for name, compared in parts[own.dataset].items()
                },
            }
            for own in scored
        },
    }


@dataclass(frozen=True, slots=True)
class _Compared:
    """One policy's distances from what was recorded: l1 and bins [N, moving], robot_units [N, A]."""

    l1: Floats
    bins: Bins
    robot_units: Floats


def _compare(own: Scored, stats: ActionStats, binning: Binning) -> dict[str, _Compared]:
    target = bins_to_normalized(own.target, binning)
    answers = {
        "model": bins_to_normalized(own.predicted, binning),
        "shuffled_images": bins_to_normalized(own.shuffled, binning),
        "mean_action": np.tile(_mean(stats), (len(target), 1)),
        "repeat_last": _repeat_last(own, target, stats),
    }
    moving, recorded = stats.moving, unnormalize(target, stats)
    return {
        name: _Compared(
            l1=np.abs(answer - target)[:, moving],
            bins=np.abs(normalized_to_bins(answer, binning) - own.target)[:, moving],
            robot_units=np.abs(unnormalize(answer, stats) - recorded),
        )
        for name, answer in answers.items()
    }


def _mean_of(parts: list[Any]) -> float:
    return float(np.concatenate(parts).mean())


def _mean(stats: ActionStats) -> Floats:
    mean: Floats = normalize(np.array([stats.mean]), stats)[0]
    return mean


def _repeat_last(own: Scored, target: Floats, stats: ActionStats) -> Floats:
    out = np.concatenate([target[:1], target[:-1]])
    first = [i == 0 or own.episode[i] != own.episode[i - 1] for i in range(len(target))]
    out[first] = _mean(stats)
    return out


def rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """The report as a table: a line per policy, L1, its ratio to the mean action's, and accuracies."""
    mean = report["l1"]["mean_action"]
    return [
        (
            name.replace("_", " "),
            f"{report['l1'][name]:.3f}",
            f"{report['l1'][name] / mean:.2f}",
            *(f"{value:.1%}" for value in report["accuracy"][name].values()),
        )
        for name in POLICIES
    ]


def summary(report: dict[str, Any]) -> str:
    """The report's figures as a table, over the dimensions that move."""
    header = (
        f"{report['samples']:,} held-out samples",
        "L1",
        "of mean's",
        "exact bin",
        "within 1",
        "within 5",
    )
    return table(header, rows(report))
