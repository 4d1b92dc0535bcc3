"""Curves over the steps of a run, from the lines of its metrics.jsonl."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from train_llava.curves import smoothed
from train_llava.report.figures import telling
from train_llava.report.run_values import Chart, Curve, Look
from train_llava.report.values import Floats

LOOKS: dict[str, Look] = {
    "model": "model",
    "shuffled_images": "shuffled",
    "mean_action": "mean",
    "repeat_last": "repeat",
}
_MOST_POINTS = 500  # of a curve
_MOST_NAMED = 8  # steps in a warning

Lines = Sequence[dict[str, Any]]
Figure = Callable[[dict[str, Any], str], float | None]  # of a policy in a report


def charts(lines: Lines) -> Iterator[Chart]:
    """The training loss, and each figure on held-out episodes that is there."""
    trained = [line for line in lines if "loss" in line]
    loss = _column(trained, lambda line: line["loss"])
    there = np.isfinite(loss)
    if there.any():
        smooth = np.full(len(loss), np.nan)
        smooth[there] = smoothed(loss[there])
        pairs: tuple[tuple[str, Look, Floats], ...] = (
            ("as logged", "faint", loss),
            ("smoothed", "model", smooth),
        )
        yield _chart("Training loss", "nats per supervised token", _steps(trained), pairs)
    scored = [line for line in lines if "evaluation" in line]
    for title, unit, figure in _FIGURES:
        found = [
            (name.replace("_", " "), look, _column(scored, partial(_figure, figure, name)))
            for name, look in LOOKS.items()
        ]
        curves = tuple(curve for curve in found if np.isfinite(curve[2]).any())
        if curves:
            yield _chart(title, unit, _steps(scored), curves)


def not_finite(lines: Lines) -> Iterator[str]:
    """A sentence on the steps whose training loss is no number; nothing when there is none."""
    trained = [line for line in lines if "loss" in line]
    steps = [line["step"] for line in trained if not np.isfinite(line["loss"])]
    if steps:
        named = ", ".join(f"{step:,}" for step in steps[:_MOST_NAMED])
        more = f" and {len(steps) - _MOST_NAMED:,} more" if len(steps) > _MOST_NAMED else ""
        yield f"The training loss was not finite at step {named}{more}; its curve has a gap there."


def _figure(figure: Figure, name: str, line: dict[str, Any]) -> float | None:
    return figure(line["evaluation"], name)


def _l1(report: dict[str, Any], name: str) -> float | None:
    l1: float | None = report["l1"].get(name)
    return l1


def _hits(within: str, report: dict[str, Any], name: str) -> float | None:
    share: float | None = report["accuracy"].get(name, {}).get(within)
    return share


def _loss(report: dict[str, Any], name: str) -> float | None:
    loss: float | None = (report.get("loss") or {}).get(name)
    return loss


_FIGURES: tuple[tuple[str, str, Figure], ...] = (
    ("L1 on held-out episodes", "codec's range", _l1),
    ("Exact bins on held-out episodes", "share", partial(_hits, "exact")),
    ("Within 5 bins on held-out episodes", "share", partial(_hits, "within_5")),
    ("Loss on held-out episodes", "nats per token", _loss),
)


def _steps(lines: Lines) -> Floats:
    return _column(lines, lambda line: line["step"])


def _column(lines: Lines, value: Callable[[dict[str, Any]], Any]) -> Floats:
    """[N]; not a number where there is none."""
    return np.array([value(line) for line in lines], np.float64)


def _chart(title: str, unit: str, xs: Floats, curves: tuple[tuple[str, Look, Floats], ...]) -> Chart:
    kept = telling([ys for _, _, ys in curves], _MOST_POINTS)
    high = max(float(ys[np.isfinite(ys)].max()) for _, _, ys in curves)
    return Chart(
        title=title,
        unit=unit,
        curves=tuple(Curve(label, look, xs[kept], ys[kept]) for label, look, ys in curves),
        box=(0.0, float(xs[-1]), 0.0, high or 1.0),
    )
