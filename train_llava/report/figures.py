"""From actions to what is drawn of them. Pure NumPy."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from convert.action_codec import NUM_BINS, ActionStats, Binning, Bins, clipped
from oxe_mix.text import count
from train_llava.report.values import Counts, Dimension, Floats, Histogram, Motion, Recorded

_BARS, _LENGTH_BARS = 48, 24
_MARGIN = 0.35  # of the range between the quantiles, shown on each side of it


def action_dimensions(
    actions: Floats, bins: Bins, stats: ActionStats, names: Sequence[str], binning: Binning
) -> tuple[Dimension, ...]:
    """Histograms and bins of each dimension.

    Args:
        actions: [N, A], robot units.
        bins: [N, A], the same as the codec has them.
        stats: [A]; its quantiles give the bins.
        names: [A].

    Returns: [A]; the clipped share is that of these actions.
    """
    lost = clipped(actions, stats).mean(axis=0) if len(actions) else np.zeros(len(names))
    possible = stats.possible_bins(binning).sum(axis=1)
    return tuple(
        Dimension(
            name=name,
            histogram=_histogram(actions[:, a], stats, a),
            q01=stats.q01[a],
            q99=stats.q99[a],
            low=stats.min[a],
            high=stats.max[a],
            clipped=float(lost[a]),
            bins=np.bincount(bins[:, a], minlength=NUM_BINS),
            possible=int(possible[a]),
            is_gripper=not stats.mask[a],
            is_constant=bool(stats.constant[a]),
        )
        for a, name in enumerate(names)
    )


def _histogram(values: Floats, stats: ActionStats, a: int) -> Histogram:
    """Around the quantiles: a value far out would leave all others in one bar."""
    if stats.mask[a]:
        margin = _MARGIN * (stats.q99[a] - stats.q01[a])
        # A movement of always one value has its bar in the middle.
        margin = margin or max(abs(stats.q01[a]), 1.0) * _MARGIN
        low, high = stats.q01[a] - margin, stats.q99[a] + margin
    else:
        low, high = 0.0, 1.0
    counts, _ = np.histogram(np.clip(values, low, high), bins=_BARS, range=(low, high))
    return Histogram(counts, low, high, int((values < low).sum()), int((values > high).sum()))


def length_histogram(lengths: Sequence[int]) -> Histogram | None:
    """Of episodes' steps, a whole number of steps to a bar; None without an episode."""
    if not lengths:
        return None
    low, high = min(lengths), max(lengths) + 1
    step = -(-(high - low) // _LENGTH_BARS)
    bars = -(-(high - low) // step)
    counts, _ = np.histogram(lengths, bins=bars, range=(low, low + bars * step))
    return Histogram(counts, low, low + bars * step)


def shortest_to_longest(lengths: Sequence[int]) -> str:
    """In words, to follow how many episodes they are of."""
    if not lengths:
        return ""
    low, high = min(lengths), max(lengths)
    return f", each of {count(low, 'step')}" if low == high else f", {low:,} to {high:,} steps long"


def arrows(actions: Floats, motion: Motion) -> Floats:
    """Where an action goes in space, [T, 3]; [T, 0] where its dimensions are no directions.

    Args:
        actions: [T, A], robot units, the first three x, y and z.
        motion: `delta`: the action itself; `change`: since the step before, nothing at the first.
    """
    if motion == "none":
        return np.zeros((len(actions), 0))
    moved = actions[:, :3]
    return moved if motion == "delta" else np.diff(moved, axis=0, prepend=moved[:1])


def reach(episodes: Sequence[Recorded], motion: Motion) -> tuple[float, float]:
    """How long an arrow in the plane, and a movement up or down, is drawn full: the 99 % quantiles; 0 where
    nothing moves.
    """
    moved = [arrows(episode.actions, motion) for episode in episodes]
    every = np.concatenate(moved) if moved else np.zeros((0, 3))
    if not every.size:
        return 0.0, 0.0
    plane = float(np.quantile(np.hypot(every[:, 0], every[:, 1]), 0.99))
    return plane, float(np.quantile(np.abs(every[:, 2]), 0.99))


def thin(num: int, most: int) -> Counts:
    """Places of at most so many of `num` things, evenly spread, the first and the last among them."""
    return np.unique(np.linspace(0, num - 1, min(num, most)).round().astype(np.int64))


def telling(curves: Sequence[Floats], most: int) -> Counts:
    """Places of the points of curves, [N] each, that are drawn: all, or evenly spread ones and, of each
    stretch between two, where a curve is highest, where it is lowest and where it has a gap.
    """
    num = len(curves[0])
    edges = thin(num, most)
    if len(edges) == num:
        return edges
    places = [edges]
    for ys in curves:
        finite = np.isfinite(ys)
        high, low = np.where(finite, ys, -np.inf), np.where(finite, ys, np.inf)
        for start, end in pairwise(edges.tolist()):
            own = slice(start, end)
            found = (high[own].argmax(), low[own].argmin(), finite[own].argmin())
            places.append(start + np.array(found, np.int64))
    return np.unique(np.concatenate(places))


def distances(target: NDArray[np.int64], predicted: NDArray[np.int64], edges: Sequence[int]) -> Counts:
    """How many bins lie how far from their target: within each of the rising `edges` but not the one before,
    and, last, further.
    """
    off = np.abs(predicted - target).ravel()
    return np.bincount(np.searchsorted(edges, off), minlength=len(edges) + 1).astype(np.int64)
