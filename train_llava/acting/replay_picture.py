"""An episode in one picture: what was said beside what was recorded, below what was seen."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from oxe_mix.files import atomic_write
from train_llava.metrics import Floats

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

MOST_FRAMES = 8
_INK, _BLUE, _GREY, _LIGHT, _PALE = "#333333", "#1f5fa8", "#8a8a8a", "#e4e4e4", "#f0b583"
_WIDTH_IN, _ROW_IN, _DPI = 12, 1.9, 100
_COLUMNS = 2
_TITLE_IN, _STRIP_IN = 0.7, 1.55
_FEW = 60  # steps; up to so many each has its dot
_STILL = 1e-6
_LONGEST = 110  # characters of a title


@dataclass(frozen=True, slots=True)
class Seen:
    """A sample frame: uint8 [H, W, 3] and the step that it is of."""

    step: int
    frame: NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Drawing:
    """What is drawn. T steps of A dimensions, robot units; asked: the steps at which the policy was asked."""

    title: str
    subtitle: str
    names: tuple[str, ...]  # [A]
    steps: NDArray[np.int64]  # [T]
    asked: NDArray[np.int64]
    recorded: Floats  # [T, A]
    predicted: Floats  # [T, A]
    mean: Floats  # [A], of the data
    seen: dict[str, list[Seen]]  # by camera, all of the same steps


def draw_replay(drawing: Drawing, file: Path) -> None:
    """Draw it as PNG, 1,200 pixels wide and as high as it has cameras and dimensions; the same drawing gives
    the same bytes.
    """
    # Matplotlib takes half a second to import, which only the end of a replay should pay.
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = -(-len(drawing.names) // _COLUMNS)
    heights = (_STRIP_IN * len(drawing.seen), _ROW_IN * rows)
    # The user's own matplotlibrc is no input of a replay.
    with matplotlib.rc_context(matplotlib.rcParamsDefault), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+")  # of instructions in other scripts, boxes are drawn
        figure = Figure(figsize=(_WIDTH_IN, _TITLE_IN + sum(heights)), dpi=_DPI, layout="constrained")
        parts: Any = figure.subfigures(2, 1, height_ratios=(_TITLE_IN + heights[0], heights[1]))
        strip, curves = parts
        # An instruction is no formula, whatever signs it holds.
        title = f"{shorten(drawing.title, _LONGEST, placeholder='…')}\n{drawing.subtitle}"
        strip.suptitle(title, fontsize=12, color=_INK, parse_math=False)
        _strip(strip, drawing)
        _curves(curves, drawing, rows)
        picture = BytesIO()
        # Software names matplotlib's version; without it a new one need not change the file.
        FigureCanvasAgg(figure).print_png(picture, metadata={"Software": None})
    with atomic_write(file) as stream:
        stream.write(picture.getvalue())


def _strip(figure: SubFigure, drawing: Drawing) -> None:
    """The frames, a row for each camera."""
    most = max(map(len, drawing.seen.values()))
    cells = figure.subplots(len(drawing.seen), most, squeeze=False)
    for row, (camera, seen) in zip(cells, drawing.seen.items(), strict=True):
        for cell, one in zip(row, seen, strict=True):
            cell.imshow(one.frame, interpolation="antialiased")
            cell.set_axis_off()
            name = f"{camera}, step {one.step}" if one is seen[0] else f"step {one.step}"
            cell.set_title(name, fontsize=9, color=_INK, pad=3)


def _curves(figure: SubFigure, drawing: Drawing, rows: int) -> None:
    """A cell for each dimension: movements left, rotations right, the gripper of an arm below them."""
    cells = figure.subplots(rows, _COLUMNS, squeeze=False)
    pairs = len(drawing.names) // _COLUMNS
    places = [*cells[:pairs].T.ravel(), *cells[pairs:].ravel()]
    for a, name in enumerate(drawing.names):
        _dimension(places[a], drawing, a)
        off = float(np.abs(drawing.predicted - drawing.recorded)[:, a].mean())
        places[a].set_title(name, loc="left", fontsize=10, fontweight="bold", color=_INK)
        places[a].set_title(f"L1 {off:.3g}", loc="right", fontsize=9, color=_INK)
    for cell in places[len(drawing.names) :]:
        cell.set_axis_off()
    handles, labels = places[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), fontsize=10, frameon=False)
    figure.supxlabel("step of the episode; actions in robot units", fontsize=10, color=_INK)


def _dimension(axes: Axes, drawing: Drawing, a: int) -> None:
    from matplotlib.ticker import MaxNLocator

    dots: dict[str, Any] = {"marker": ".", "markersize": 6} if len(drawing.steps) <= _FEW else {}
    # Wide and pale below, so that it is seen where both agree.
    axes.plot(drawing.steps, drawing.recorded[:, a], color=_PALE, linewidth=4, label="recorded")
    axes.plot(drawing.steps, drawing.predicted[:, a], color=_BLUE, linewidth=1.4, label="predicted", **dots)
    axes.axhline(drawing.mean[a], color=_GREY, linestyle="--", linewidth=1, label="mean of the data")
    if len(drawing.asked) < len(drawing.steps):
        for place, step in enumerate(drawing.asked):
            label = "the policy is asked" if place == 0 else None
            axes.axvline(step, color=_GREY, linewidth=0.8, linestyle=":", label=label, zorder=0)
    axes.grid(visible=True, axis="y", color=_LIGHT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.margins(x=0.02, y=0.12)
    shown = np.array([*drawing.recorded[:, a], *drawing.predicted[:, a], drawing.mean[a]])
    if np.ptp(shown) <= _STILL * max(1.0, float(np.abs(shown).max())):
        # Else what never moves is a picture of rounding errors.
        axes.set_ylim(float(shown[0]) - 0.05, float(shown[0]) + 0.05)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4))
    axes.ticklabel_format(axis="y", scilimits=(-5, 6), useOffset=False)
    axes.tick_params(labelsize=8, colors=_INK)
    axes.spines[["top", "right"]].set_visible(False)
