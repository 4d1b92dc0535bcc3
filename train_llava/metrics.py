"""How good predicted actions are, beside what a policy without eyes would score. Pure NumPy on bins."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convert.action_codec import ActionCodec, ActionStats, Bins, bins_to_normalized, decode, normalize

Floats = NDArray[np.float64]


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
    """Accuracy and L1 over the dimensions that move, for the model, for shuffled frames and for two
    baselines.

    A dimension moves when it is not constant in the dataset: constant ones are right for free. L1 is in the
    codec's range (movements -1 to 1, gripper 0 to 1) so that datasets can be averaged, and per dataset in
    robot units.

    Baselines: mean_action answers the dataset's mean; repeat_last the recorded action of the step before in
    the same episode, and the mean at an episode's first step.
    """
    errors: dict[str, list[Floats]] = {
        "model": [],
        "shuffled_images": [],
        "mean_action": [],
        "repeat_last": [],
    }
    distances, per_dataset = [], {}
    for own in scored:
        stats = codec.datasets[own.dataset]
        moving = stats.moving
        target = bins_to_normalized(own.target)[:, moving]
        answers = {
            "model": bins_to_normalized(own.predicted),
            "shuffled_images": bins_to_normalized(own.shuffled),
            "mean_action": np.broadcast_to(_mean(stats), own.target.shape),
            "repeat_last": _repeat_last(own, stats),
        }
        l1 = {name: np.abs(answer[:, moving] - target) for name, answer in answers.items()}
        for name, values in l1.items():
            errors[name].append(values.mean(axis=1))
        distances.append(np.abs(own.predicted - own.target)[:, moving])
        per_dataset[own.dataset] = _dataset(own, stats, l1)
    num = sum(len(own.target) for own in scored)
    return {
        "samples": num,
        "l1": {name: float(np.concatenate(values).mean()) for name, values in errors.items()},
        "accuracy": {
            f"within_{d}" if d else "exact": float(
                np.concatenate([(x <= d).ravel() for x in distances]).mean()
            )
            for d in (0, 1, 5)
        },
        "datasets": per_dataset,
    }


def _dataset(own: Scored, stats: ActionStats, l1: dict[str, Floats]) -> dict[str, Any]:
    error = np.abs(decode(own.predicted, stats) - decode(own.target, stats)).mean(axis=0)
    return {
        "samples": len(own.target),
        "moving": [int(a) for a in np.flatnonzero(stats.moving)],
        "l1": {name: float(values.mean()) for name, values in l1.items()},
        "l1_robot_units": [float(value) for value in error],
    }


def _mean(stats: ActionStats) -> Floats:
    mean: Floats = normalize(np.array([stats.mean]), stats)[0]
    return mean


def _repeat_last(own: Scored, stats: ActionStats) -> Floats:
    target = bins_to_normalized(own.target)
    out = np.concatenate([target[:1], target[:-1]])
    first = [i == 0 or own.episode[i] != own.episode[i - 1] for i in range(len(target))]
    out[first] = _mean(stats)
    return out


def summary(report: dict[str, Any]) -> str:
    """The report's figures in a few lines."""
    l1, mean = report["l1"], report["l1"]["mean_action"]
    lines = [
        f"held out: {report['samples']:,} samples; L1 over the dimensions that move (of the mean action's):"
    ]
    lines += [f"  {name:<16} {value:.3f}  ({value / mean:.2f})" for name, value in l1.items()]
    accuracy = ", ".join(
        f"{name.replace('_', ' ')} {value:.1%}" for name, value in report["accuracy"].items()
    )
    return "\n".join([*lines, f"  bins: {accuracy}"])
