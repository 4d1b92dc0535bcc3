"""Paths of SVG for charts. A chart is stretched to its place, so all text stands beside it, in HTML."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from train_llava.report.values import Dimension, Floats, Histogram

WIDTH, HEIGHT = 400, 100  # of every chart, in its own units
_GAP = 0.12  # of a bar's width
_THIN = 2.0  # the least width or height at which a bar is seen


def bars(
    counts: Sequence[float] | Floats, *, gap: bool = True, span: tuple[float, float] = (0, WIDTH)
) -> str:
    """A bar for each count from one x to another, the largest as high as the chart; none for a count of 0."""
    values = np.asarray(counts, np.float64)
    most = float(values.max()) if values.size else 0.0
    if most <= 0:
        return ""
    step = (span[1] - span[0]) / len(values)
    width = max(_THIN, step * (1 - _GAP) if gap else step)
    parts = []
    for i in np.flatnonzero(values):
        # A bar of one among thousands is still to be seen.
        height = max(_THIN, values[i] / most * HEIGHT)
        parts.append(f"M{_n(span[0] + i * step)} {HEIGHT}v{_n(-height)}h{_n(width)}v{_n(height)}z")
    return "".join(parts)


def line(xs: Floats, ys: Floats, box: tuple[float, float, float, float]) -> str:
    """A curve through points within x0, x1, y0, y1; a gap where a value is not finite."""
    x0, x1, y0, y1 = box
    across = (np.asarray(xs, np.float64) - x0) / ((x1 - x0) or 1) * WIDTH
    up = HEIGHT - (np.asarray(ys, np.float64) - y0) / ((y1 - y0) or 1) * HEIGHT
    there, parts = np.isfinite(up), []
    for i in np.flatnonzero(there):
        begins, ends = i == 0 or not there[i - 1], i == len(there) - 1 or not there[i + 1]
        # Of a point without neighbours the round end of the line is seen.
        alone = "h0" if begins and ends else ""
        parts.append(f"{'M' if begins else 'L'}{_n(across[i])} {_n(up[i])}{alone}")
    return "".join(parts)


def steps(values: Floats) -> str:
    """A curve of one value a step, each level as wide as its step; values are within 0 and 1."""
    if not len(values):
        return ""
    width = WIDTH / len(values)
    levels = HEIGHT - np.clip(values, 0, 1) * (HEIGHT - 4) - 2
    # To a place, not by a width: rounded ones would add up to another end.
    parts = (f"V{_n(level)}H{_n(i * width)}" for i, level in enumerate(levels, 1))
    return f"M0 {_n(levels[0])}{''.join(parts)}"


def across(value: float, histogram: Histogram) -> str:
    """Where a value stands below the histogram, as an x."""
    return _n(_across(value, histogram))


def span(dimension: Dimension) -> tuple[float, float]:
    """From where to where the bins that mean something reach, below the histogram of the values."""
    ends = (0.0, 1.0) if dimension.is_gripper else (dimension.q01, dimension.q99)
    return _across(ends[0], dimension.histogram), _across(ends[1], dimension.histogram)


def _across(value: float, histogram: Histogram) -> float:
    wide = (histogram.high - histogram.low) or 1
    return min(1.0, max(0.0, (value - histogram.low) / wide)) * WIDTH


def _n(value: float) -> str:
    """A coordinate, short."""
    return f"{value:.1f}".rstrip("0").rstrip(".")
