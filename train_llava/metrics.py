"""How good predicted actions are, beside what a policy without eyes would score. Pure NumPy on bins.

Which dimensions count: L1 in the codec's range and the accuracies are over those that move, that is, are not
constant in the data (constant ones are right for free), nor in the statistics that the model acts with
(which can say only the constant). L1 in robot units is given for every dimension. Gripper F1 is of the last
dimension where the mask leaves it in [0, 1]; below 0.5 is closed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convert.action_codec import (
    ActionStats,
    Binning,
    Bins,
    bins_to_normalized,
    normalize,
    normalized_to_bins,
    unnormalize,
)
from oxe_mix.text import count, table

Floats = NDArray[np.float64]
POLICIES = ("model", "shuffled_images", "mean_action", "repeat_last")
_WITHIN = {"exact": 0, "within_1": 1, "within_5": 5}
CLOSED_BELOW = 0.5


@dataclass(frozen=True, slots=True)
class Scored:
    """N samples of one dataset, H steps of A dimensions each: what was recorded and what was predicted.

    All bins are those of the model's codec.
    """

    dataset: str
    stats: ActionStats  # of the model's codec: what its bins mean
    measured: ActionStats  # of the data: the mean that a baseline answers, and which dimensions move
    recorded: Floats  # [N, H, A], robot units
    target: Bins  # [N, H, A], the recorded actions as the model would have to say them
    predicted: Bins  # [N, H, A]
    shuffled: Bins | None  # [N, H, A], predicted from another sample's frames; None: was not asked
    last: Bins  # [N, A], recorded right before the sample
    first: NDArray[np.bool_]  # [N], nothing was recorded before: an episode's first sample

    @property
    def moving(self) -> NDArray[np.bool_]:
        """Dimensions that count, [A]."""
        can_say = self.stats.moving | ~np.array(self.stats.mask)
        return np.asarray(self.measured.moving & can_say)


def score(binning: Binning, scored: list[Scored]) -> dict[str, Any]:
    """L1, accuracies and gripper F1 for the model, for shuffled frames where there are such, and for two
    baselines; over all datasets, and of each.

    L1 is in the codec's range (movements -1 to 1, gripper 0 to 1) so that datasets can be averaged; every
    sample weighs the same. Of chunks all H steps count, and `l1_by_step` says how L1 grows with the
    distance. The gripper's F1 over all datasets is the mean over those whose gripper moves, open and closed
    alike. What cannot be said is None: L1 where nothing moves, F1 of a state that is neither recorded nor
    predicted.

    Baselines: mean_action answers the data's mean; repeat_last, at each step, the action recorded right
    before the sample, and the mean at an episode's first one.
    """
    parts = [
        (own, {name: _figures(own, binning, *answer) for name, answer in _answers(own, binning)})
        for own in scored
    ]
    datasets = {
        own.dataset: {
            "samples": len(own.target),
            "moving": [int(a) for a in np.flatnonzero(own.moving)],
            **_averages([(own, figures)]),
            "gripper_f1": {name: one.gripper for name, one in figures.items()},
            "l1_robot_units": {name: one.robot_units.tolist() for name, one in figures.items()},
        }
        for own, figures in parts
    }
    return {
        "samples": sum(len(own.target) for own in scored),
        **_averages(parts),
        "gripper_f1": {
            name: _mean_f1([(own, figures[name]) for own, figures in parts]) for name in parts[0][1]
        },
        "datasets": datasets,
    }


@dataclass(frozen=True, slots=True)
class _Figures:
    """One policy's answers to one dataset's samples; l1 and hits are empty where nothing moves."""

    l1: Floats  # [H], mean over samples and moving dimensions
    hits: Floats  # [3], share of the bins that are right within 0, 1 and 5
    robot_units: Floats  # [A], mean distance over samples and steps
    gripper: dict[str, float | None] | None  # F1 of closed and of open; None without a gripper


_Part = tuple[Scored, dict[str, _Figures]]


def _answers(own: Scored, binning: Binning) -> Iterator[tuple[str, tuple[Bins, Floats]]]:
    """Each policy's answers as bins and in the codec's range, [N, H, A] both."""
    # The mean is none of the bins' centres: only the policies that answer in tokens are tied to them.
    mean = normalize(np.array([own.measured.mean]), own.stats)
    mean_bins = normalized_to_bins(mean, binning)
    first, last = own.first[:, None], bins_to_normalized(own.last, binning)
    as_mean, as_last = np.zeros_like(own.target), np.zeros(own.target.shape)
    yield "model", (own.predicted, bins_to_normalized(own.predicted, binning))
    if own.shuffled is not None:
        yield "shuffled_images", (own.shuffled, bins_to_normalized(own.shuffled, binning))
    yield "mean_action", (as_mean + mean_bins, as_last + mean)
    repeated_bins, repeated = np.where(first, mean_bins, own.last), np.where(first, mean, last)
    yield "repeat_last", (as_mean + repeated_bins[:, None], as_last + repeated[:, None])


def _figures(own: Scored, binning: Binning, bins: Bins, normalized: Floats) -> _Figures:
    moving, width = own.moving, own.target.shape[-1]
    units = unnormalize(normalized.reshape(-1, width), own.stats)
    gripper = None
    if not own.stats.mask[-1]:
        recorded, answered = own.recorded[..., -1] < CLOSED_BELOW, normalized[..., -1] < CLOSED_BELOW
        gripper = {"closed": _f1(recorded, answered), "open": _f1(~recorded, ~answered)}
    l1, hits = np.zeros(0), np.zeros(0)
    if moving.any():
        off = np.abs(bins - own.target)[..., moving]
        l1 = np.abs(normalized - bins_to_normalized(own.target, binning))[..., moving].mean(axis=(0, 2))
        hits = np.array([(off <= within).mean() for within in _WITHIN.values()])
    return _Figures(l1, hits, np.abs(units - own.recorded.reshape(-1, width)).mean(axis=0), gripper)


def _f1(recorded: NDArray[np.bool_], answered: NDArray[np.bool_]) -> float | None:
    """2 x both / (recorded + answered); None where neither ever is."""
    either = int(recorded.sum()) + int(answered.sum())
    return 2 * int((recorded & answered).sum()) / either if either else None


def _mean_f1(parts: list[tuple[Scored, _Figures]]) -> float | None:
    values = [
        value
        for own, figures in parts
        if figures.gripper is not None and own.measured.moving[-1]
        for value in figures.gripper.values()
        if value is not None
    ]
    return float(np.mean(values)) if values else None


def _averages(parts: list[_Part]) -> dict[str, Any]:
    """L1 and accuracies over one dataset or several: each sample weighs the same in L1, each bin in the
    accuracies.
    """
    moving = [part for part in parts if part[0].moving.any()]
    samples = [len(own.target) for own, _ in moving]
    bins = [len(own.target) * int(own.moving.sum()) for own, _ in moving]
    names = tuple(parts[0][1])
    by_step = {name: _average([figures[name].l1 for _, figures in moving], samples) for name in names}
    hits = {name: _average([figures[name].hits for _, figures in moving], bins) for name in names}
    chunked = parts[0][0].target.shape[1] > 1
    return {
        "l1": {name: None if l1 is None else float(np.mean(l1)) for name, l1 in by_step.items()},
        **({"l1_by_step": by_step} if chunked else {}),
        "accuracy": {
            name: dict.fromkeys(_WITHIN) if shares is None else dict(zip(_WITHIN, shares, strict=True))
            for name, shares in hits.items()
        },
    }


def _average(values: list[Floats], weights: list[int]) -> list[float] | None:
    """The weighted mean of several rows; None when there are none."""
    if not values:
        return None
    mean: list[float] = np.average(values, axis=0, weights=weights).tolist()
    return mean


def rows(report: dict[str, Any]) -> list[tuple[str, ...]]:
    """The report as a table: a line per policy, L1, its ratio to the mean action's, accuracies, gripper F1,
    and the loss per token where it was measured.
    """
    mean, loss = report["l1"]["mean_action"], report.get("loss")
    return [
        (
            name.replace("_", " "),
            _said(report["l1"][name], ".3f"),
            _said(report["l1"][name] / mean if mean else None, ".2f"),
            *(_said(value, ".1%") for value in report["accuracy"][name].values()),
            _said(report["gripper_f1"][name], ".2f"),
            *([_said(loss.get(name), ".3f")] if loss else []),
        )
        for name in POLICIES
        if name in report["l1"]
    ]


def summary(report: dict[str, Any], unit: str = "held-out sample") -> str:
    """The report's figures as a table, over the dimensions that move."""
    names = (
        count(report["samples"], unit),
        *("L1", "of mean's", "exact bin", "within 1", "within 5", "gripper F1"),
        *(["loss"] if report.get("loss") else []),
    )
    return table(names, rows(report))


def by_dataset(report: dict[str, Any]) -> str:
    """The model's figures for each dataset as a table, L1 of every dimension in robot units."""
    header = ("model", "samples", "L1", "of mean's", "within 5", "F1 closed", "open", "L1 in robot units")
    lines = []
    for name, own in report["datasets"].items():
        l1, mean = own["l1"]["model"], own["l1"]["mean_action"]
        gripper = own["gripper_f1"]["model"] or {"closed": None, "open": None}
        cells = (
            f"{own['samples']:,}",
            _said(l1, ".3f"),
            _said(l1 / mean if mean else None, ".2f"),
            _said(own["accuracy"]["model"]["within_5"], ".1%"),
            _said(gripper["closed"], ".2f"),
            _said(gripper["open"], ".2f"),
            " ".join(f"{value:.4f}" for value in own["l1_robot_units"]["model"]),
        )
        lines.append((name, *cells))
    return table(header, lines)


def _said(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
