"""curves.png: how a run went, in one picture."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from oxe_mix.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INK, _BLUE, _ORANGE, _GREEN, _GREY = "#333333", "#1f5fa8", "#d9730d", "#2a8a5f", "#8a8a8a"
_WIDTH_IN, _HEIGHT_IN, _DPI = 12, 8, 100
_COLORS = (_BLUE, _ORANGE, _GREEN)
_POLICIES = (("model", _BLUE, "-"), ("shuffled_images", _ORANGE, ":"), ("mean_action", _GREY, "--"))
_SMOOTH = 60  # a smoothed point is the mean of a 60th of the run to each side
_LEAST_SHARE = 5.0  # percent; the scale of waiting goes at least so far, so that little looks little

Floats = NDArray[np.float64]


def draw_curves(lines: Sequence[dict[str, Any]], file: Path) -> None:
    """Draw the lines of a metrics.jsonl; the same lines give the same bytes.

    Args:
        lines: training lines, at least one, and evaluation lines, if any.
    """
    # Matplotlib takes half a second to import, which only a run's end should pay.
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    trained = [line for line in lines if "loss" in line]
    scored = [line for line in lines if "evaluation" in line]
    # The user's own matplotlibrc is no input of a run.
    with matplotlib.rc_context(matplotlib.rcParamsDefault):
        figure = Figure(figsize=(_WIDTH_IN, _HEIGHT_IN), dpi=_DPI, layout="constrained")
        axes = figure.subplot_mosaic(
            [["loss", "held out" if scored else "loss"], ["rates", "wait"]], gridspec_kw={"hspace": 0.05}
        )
        _loss(axes["loss"], trained)
        _rates(axes["rates"], trained)
        _wait(axes["wait"], trained)
        if scored:
            _held_out(axes["held out"], scored)
        for own in axes.values():
            _frame(own, max(line["step"] for line in lines))
        picture = BytesIO()
        # Software names matplotlib's version; without it a new one need not change the file.
        FigureCanvasAgg(figure).print_png(picture, metadata={"Software": None})
    with atomic_write(file) as stream:
        stream.write(picture.getvalue())


def smoothed(values: Floats) -> Floats:
    """The mean around each value, [N]; as many to the left as to the right: a falling curve is not late.
    Of few values each is its own mean.
    """
    num = len(values)
    reach = num // _SMOOTH
    sums = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(num)
    half = np.minimum(np.minimum(at, num - 1 - at), reach)
    return np.asarray((sums[at + half + 1] - sums[at - half]) / (2 * half + 1))


def _loss(axes: Axes, lines: list[dict[str, Any]]) -> None:
    _noisy(axes, lines, _column(lines, "loss"), _BLUE)
    axes.set_title("Training loss")
    axes.set_ylabel("loss (nats per supervised token)")
    axes.set_ylim(bottom=0)
    axes.legend(loc="upper right")


def _rates(axes: Axes, lines: list[dict[str, Any]]) -> None:
    # Parts at one rate are one curve: of two on top of each other only one is seen.
    curves: dict[tuple[float, ...], list[str]] = {}
    for part in lines[0]["learning_rate"]:
        rates = tuple(line["learning_rate"][part] for line in lines)
        curves.setdefault(rates, []).append(part.replace("_", " "))
    for color, (rates, parts) in zip(_COLORS, curves.items(), strict=False):
        axes.plot(_column(lines, "step"), rates, color=color, label=", ".join(parts), **_dot(lines))
    axes.set_title("Learning rate of what is trained")
    axes.set_ylabel("learning rate")
    axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    axes.set_ylim(bottom=0)
    axes.legend(loc="best")


def _wait(axes: Axes, lines: list[dict[str, Any]]) -> None:
    share = 100 * _column(lines, "data_wait_share")
    _noisy(axes, lines, share, _GREEN)
    axes.axhline(
        np.median(share), color=_INK, linewidth=1, linestyle="--", label=f"median {np.median(share):.1f} %"
    )
    axes.set_title("Waiting for data")
    axes.set_ylabel("share of the time (%)")
    axes.set_ylim(0, max(_LEAST_SHARE, 1.1 * float(share.max())))
    axes.legend(loc="upper right")


def _noisy(axes: Axes, lines: list[dict[str, Any]], values: Floats, color: str) -> None:
    steps = _column(lines, "step")
    if len(lines) < _SMOOTH:
        axes.plot(steps, values, color=color, linewidth=1.8, label="as logged", **_dot(lines))
        return
    axes.plot(steps, values, color=color, alpha=0.3, linewidth=1, label="as logged")
    axes.plot(steps, smoothed(values), color=color, linewidth=1.8, label="smoothed")


def _held_out(axes: Axes, lines: list[dict[str, Any]]) -> None:
    steps = _column(lines, "step")
    for name, color, dashes in _POLICIES:
        l1 = np.array([line["evaluation"]["l1"][name] for line in lines], np.float64)
        axes.plot(steps, l1, dashes, color=color, marker=".", label=name.replace("_", " "))
    axes.set_title("Held-out episodes")
    axes.set_ylabel("L1 in the codec's range (movements -1 to 1)")
    axes.set_ylim(bottom=0)
    axes.legend(loc="best")


def _frame(axes: Axes, last: int) -> None:
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    axes.set_xlabel("optimizer step")
    axes.set_xlim(0, last * 1.02)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.grid(visible=True, color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _dot(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """A curve of one point is a point."""
    return {"marker": "o"} if len(lines) == 1 else {}


def _column(lines: list[dict[str, Any]], name: str) -> Floats:
    return np.array([line[name] for line in lines], np.float64)
