"""The page of a training run, from the files that it left."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from oxe_mix.text import count, duration
from train_llava.card_source import CardSource, left_out
from train_llava.config import METRICS_FILE
from train_llava.dimensions import dimension_names
from train_llava.metrics import POLICIES, rows
from train_llava.report.predictions import Predicted, predict
from train_llava.report.run_charts import LOOKS, charts, not_finite
from train_llava.report.run_files import has_weights, read_run
from train_llava.report.run_values import Bar, DatasetScore, RunPage
from train_llava.report.values import Overview, Row, Share
from train_llava.result import REPORT_FILE

_WITHIN = ("exact", "within_1", "within_5")
_NEAR = ("the recorded bin", "1 away", "2 to 5 away", "further")
_GIVE = "Give --data LLAVA, the converted folder, to see here what the model says to held-out samples."
_NO_WEIGHTS = "The run has no weights yet, so no model can be asked."
_HEADER = ("policy", "L1", "of mean's", "exact bin", "within 1", "within 5", "gripper F1")


def run_report_parts(
    folder: Path, data: Path | None, samples: int, device: str | None
) -> tuple[Overview, RunPage]:
    """The first page and the figures of a run; with `data` the model is asked about some held-out samples.

    Raises: UserError for a file that is broken, and when the data does not go with the run.
    """
    source = read_run(folder)
    predicted = None if data is None else predict(folder, data, samples, device)
    return _overview(source), _page(source, predicted, _GIVE if has_weights(folder) else _NO_WEIGHTS)


def _overview(source: CardSource) -> Overview:
    report, held_out = source.report, source.held_out
    tiles = [Row("datasets", f"{len(source.datasets):,}", "datasets")]
    if report is not None:
        tiles.append(Row("steps", f"{report['steps']:,}", "steps"))
    if held_out is not None:
        l1, mean = held_out["l1"]["model"], held_out["l1"]["mean_action"]
        tiles += [
            Row("held-out samples", f"{held_out['samples']:,}", "held_out"),
            Row("L1 of the model", _said(l1, ".3f"), "l1"),
            Row("of the mean action's", _said(l1 / mean if l1 and mean else None, ".2f"), "ratio"),
            Row("exact bins", _said(held_out["accuracy"]["model"]["exact"], ".1%"), "exact"),
        ]
    mixes = ", ".join(manifest.mix or "no mix" for manifest in source.manifests) or "unknown"
    absent = {METRICS_FILE: source.has_curves, REPORT_FILE: report is not None}
    header = ("dataset", "trained on", "drawn", "scored", "L1", "mean action", "ratio", "exact", "within 5")
    return Overview(
        tiles=tuple(tiles),
        header=header,
        rows=tuple(_rows(source)),
        notes=(
            f"Run {source.name}, trained on mix {mixes}.",
            "Figures are those that the run left, on whole held-out episodes. L1 is in the codec's range "
            "(movements -1 to 1, gripper 0 to 1), over the dimensions that move.",
        ),
        warnings=(
            *(left_out(file) for file, there in absent.items() if not there),
            *not_finite(source.lines),
        ),
    )


def _rows(source: CardSource) -> Iterator[tuple[str, ...]]:
    scored = source.held_out["datasets"] if source.held_out else {}
    trained = {own.name: own for own in source.datasets}
    for name in dict.fromkeys([*trained, *scored]):
        own, drawn = scored.get(name), source.drawn.get(name)
        written = f"{trained[name].steps.written:,}" if name in trained else "-"
        head = (name, written, _said(drawn, ".1%"))
        if own is None:
            yield (*head, *["-"] * 6)
            continue
        l1, mean, hits = own["l1"]["model"], own["l1"]["mean_action"], own["accuracy"]["model"]
        ratio = _said(l1 / mean if l1 is not None and mean else None, ".2f")
        figures = (_said(l1, ".3f"), _said(mean, ".3f"), ratio)
        shares = (_said(hits["exact"], ".1%"), _said(hits["within_5"], ".1%"))
        yield (*head, f"{own['samples']:,}", *figures, *shares)


def _page(source: CardSource, predicted: Predicted | None, without: str) -> RunPage:
    held_out = source.held_out
    near = [] if held_out is None else list(_near(held_out))
    if predicted is not None:
        near.append((f"model, on {len(predicted.guesses):,} samples, finer", predicted.near))
    return RunPage(
        charts=tuple(charts(source.lines)),
        header=(*_HEADER, "loss") if held_out and held_out.get("loss") else _HEADER,
        scores=tuple(tuple(row) for row in rows(held_out)) if held_out else (),
        score_words=_score_words(source),
        datasets=tuple(_scores(source, held_out)) if held_out else (),
        near=tuple(near),
        near_words="Shares of the bins of all held-out samples, over the dimensions that move.",
        guesses=predicted.guesses if predicted else (),
        guess_words=predicted.words if predicted else without,
        facts=tuple(_facts(source)),
    )


def _score_words(source: CardSource) -> str:
    if source.report is None:
        return left_out(REPORT_FILE)
    if source.held_out is None:
        return "No episode was held out, so nothing was scored."
    return (
        "On held-out episodes. The mean action and the last action again look at no picture; shuffled images "
        "is the model, shown another sample's frames."
    )


def _scores(source: CardSource, report: dict[str, Any]) -> Iterator[DatasetScore]:
    for name, own in report["datasets"].items():
        l1 = {policy: own["l1"][policy] for policy in POLICIES if own["l1"].get(policy) is not None}
        most = max(l1.values(), default=0.0) or 1.0
        units, moving = own["l1_robot_units"], set(own["moving"])
        policies = [policy for policy in POLICIES if policy in units]
        names = dimension_names(source.card_of(name), len(units["model"]))
        yield DatasetScore(
            name=name,
            samples=own["samples"],
            bars=tuple(
                Bar(policy.replace("_", " "), LOOKS[policy], value / most, f"{value:.3f}")
                for policy, value in l1.items()
            ),
            header=tuple(policy.replace("_", " ") for policy in policies),
            near=dict(_near(own)).get("model", ()),
            units=tuple(
                (dimension, *(f"{units[policy][a]:.3g}" if a in moving else "—" for policy in policies))
                for a, dimension in enumerate(names)
            ),
        )


def _near(report: dict[str, Any]) -> Iterator[tuple[str, tuple[Share, ...]]]:
    for policy in POLICIES:
        hits = report["accuracy"].get(policy)
        if hits is None or hits["exact"] is None:
            continue
        within = [*(hits[name] for name in _WITHIN), 1.0]
        parts = np.diff([0.0, *within]).tolist()
        shares = (Share(label, part, f"{part:.1%}") for label, part in zip(_NEAR, parts, strict=True))
        yield policy.replace("_", " "), tuple(shares)


def _facts(source: CardSource) -> Iterator[Row]:
    report, config = source.report, source.config
    if report is not None:
        yield Row(
            "Steps", f"{count(report['steps'], 'step')} of {count(report['global_batch'], 'sample')} each"
        )
        yield Row("Loss", f"{report['mean_loss']:.4f} on average, {report['final_loss']:.4f} at the end")
        yield Row("Time", duration(report["train_seconds"]))
        yield Row("Ranks", f"{report['ranks']:,}, ZeRO stage {report['zero_stage']}")
    if config is not None:
        yield Row("Schedule", f"{config.train.schedule}, {config.train.precision}, seed {config.seed}")
    for name, version in source.versions.items():
        yield Row(name, version)


def _said(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
