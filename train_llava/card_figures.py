"""The sections of a model card that are figures: of held-out episodes, of the training, of the data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from convert.manifest import ConvertedDataset, Manifest, Tally
from oxe_mix.cards import Card
from oxe_mix.text import count, duration, size
from train_llava.batch import plan_batch
from train_llava.card_source import CardSource, left_out
from train_llava.config import METRICS_FILE, PARTS, RunConfig
from train_llava.dimensions import ARM, is_arm
from train_llava.markdown import code, items, plain, table
from train_llava.metrics import rows
from train_llava.result import CONFIG_FILE, DATA_MANIFEST, REPORT_FILE, VERSIONS_FILE

# Of the four policies the two that a reader compares dimension by dimension; evaluation.json has all.
_BY_DIMENSION = ("model", "mean_action")
_STATISTICS = {"all": "all episodes", "train": "the training episodes alone"}


def figures(source: CardSource) -> str:
    """How good the answers are, beside policies without eyes."""
    if source.report is None:
        return left_out(REPORT_FILE)
    report = source.held_out
    if report is None:
        return "The data holds no held-out episodes, so the model was not scored."
    held_out = sum(own.steps.held_out for own in source.datasets)
    of = f" of {held_out:,}" if held_out >= report["samples"] and held_out else ""
    losses = ("loss",) if report.get("loss") else ()
    header = ("policy", "L1", "of mean's", "exact bin", "within 1", "within 5", "gripper F1", *losses)
    parts = [
        f"On {report['samples']:,}{of} held-out samples, of whole episodes that training never saw. L1 is in "
        "the codec's range (movements -1 to 1, gripper 0 to 1); it and the shares of bins are over the "
        "dimensions that move. `shuffled images` is the model, shown another sample's frames; `mean action` "
        "and `repeat last` look at none.",
        table(header, [tuple(row) for row in rows(report)]),
        "The model by dataset:",
        _by_dataset(report),
        "L1 of each dimension in the robot's own units, over all held-out steps; — where it never changes:",
        _by_dimension(source, report),
    ]
    return "\n\n".join(parts)


def _by_dataset(report: dict[str, Any]) -> str:
    header = (
        "dataset",
        "samples",
        "L1",
        "of mean's",
        "exact bin",
        "within 1",
        "within 5",
        "F1 closed",
        "F1 open",
    )
    lines = []
    for name, own in report["datasets"].items():
        l1, mean = own["l1"]["model"], own["l1"]["mean_action"]
        hits, gripper = own["accuracy"]["model"], own["gripper_f1"]["model"] or {}
        lines.append(
            (
                code(name),
                f"{own['samples']:,}",
                _said(l1, ".3f"),
                _said(l1 / mean if mean else None, ".2f"),
                *(_said(hits[within], ".1%") for within in ("exact", "within_1", "within_5")),
                *(_said(gripper.get(state), ".2f") for state in ("closed", "open")),
            )
        )
    return table(header, lines)


def _by_dimension(source: CardSource, report: dict[str, Any]) -> str:
    names = list(report["datasets"])
    width = len(next(iter(report["datasets"].values()))["l1_robot_units"]["model"])
    lines = []
    for name in names:
        own = report["datasets"][name]
        for policy in _BY_DIMENSION:
            values = own["l1_robot_units"][policy]
            cells = (f"{v:.3g}" if a in own["moving"] else "—" for a, v in enumerate(values))
            lines.append((code(name), policy.replace("_", " "), *cells))
    return table(("dataset", "policy", *_dimensions(source, names, width)), lines, left=2)


def _dimensions(source: CardSource, names: list[str], width: int) -> tuple[str, ...]:
    """What the dimensions are called: only an arm's that all datasets share have names."""
    cards = [source.card_of(name) for name in names]
    return ARM if all(is_arm(card, width) for card in cards) else tuple(map(str, range(width)))


def training(source: CardSource, curves: str) -> str:
    """Steps, batches, rates, time and loss."""
    parts = []
    lines = [*_plan_lines(source), *_went_lines(source)]
    for file, there in ((CONFIG_FILE, source.config), (REPORT_FILE, source.report)):
        if there is None:
            parts.append(left_out(file))
    parts += [items(lines)] if lines else []
    parts.append(f"![Curves of the run]({curves})" if source.has_curves else left_out(METRICS_FILE))
    return "\n\n".join(parts)


def _plan_lines(source: CardSource) -> Iterator[str]:
    config, report = source.config, source.report
    if config is None:
        return
    own = config.train
    if report is not None:
        drawn = report["steps"] * report["global_batch"]
        yield (
            f"**Steps:** {report['steps']:,} of {count(report['global_batch'], 'sample')}, {drawn:,} drawn: "
            f"{drawn / report['samples']:.2f} epochs of {report['samples']:,}"
        )
        yield f"**Batch:** {plan_batch(config, report['ranks'])}"
    rates = ((part.replace("_", " "), own.learning_rates[part]) for part in PARTS)
    yield f"**Learning rates:** {', '.join(f'{part} {_rate(rate)}' for part, rate in rates)}"
    yield f"**Schedule:** {own.schedule}, warm-up over {own.warmup_ratio:.1%} of the steps"
    yield (
        f"**Optimizer:** AdamW, beta2 {own.adam_beta2:g}, weight decay {own.weight_decay:g}, gradients "
        f"clipped at {own.max_grad_norm:g}"
    )
    yield f"**Precision:** {own.precision}; seed {config.seed}"
    yield f"**Loss:** {_loss(config)}"
    augment = config.data.augment
    strengths = "none" if augment is None else ", ".join(f"{name} {value}" for name, value in augment)
    yield f"**Augmentation of frames:** {plain(strengths)}"


def _loss(config: RunConfig) -> str:
    own, text = config.train.loss, "cross-entropy of the answer's tokens and the end of turn, of nothing else"
    if own.neighbour_sigma:
        text += f", smoothed over near bins (sigma {own.neighbour_sigma:g})"
    if own.dimension_weights is not None:
        text += f", dimensions weighted {', '.join(f'{weight:g}' for weight in own.dimension_weights)}"
    return text


def _went_lines(source: CardSource) -> Iterator[str]:
    report, lines = source.report, [line for line in source.lines if "loss" in line]
    if report is not None:
        mean, last = (_said(report[name], ".4f") for name in ("mean_loss", "final_loss"))
        yield f"**Machines:** {count(report['ranks'], 'rank')}, DeepSpeed ZeRO stage {report['zero_stage']}"
        yield f"**Training loss:** {mean} on average, {last} at the end"
        yield f"**Time:** {_time(report['train_seconds'], sum(line['seconds'] for line in lines))}"
    if lines:
        rate, wait = (_median(lines, name) for name in ("samples_per_s", "data_wait_share"))
        yield f"**Speed:** {rate:,.1f} samples/s, {wait:.1%} of the time waiting for data (medians)"


def _median(lines: list[dict[str, Any]], name: str) -> float:
    return float(np.median([line[name] for line in lines]))


def _time(last_start: float, logged: float) -> str:
    """Of all starts together, as the log has it, when there were several."""
    # What is between two lines is in both figures; saving and the start itself may be in one alone.
    if logged <= 1.1 * last_start:
        return f"{duration(last_start)} of training"
    return f"{duration(logged)} of training, {duration(last_start)} of it since the last start"


def data(source: CardSource) -> str:
    """What went in, what came out of it, and what is known of it."""
    if not source.manifests:
        return left_out(DATA_MANIFEST)
    parts = [items(_conversion(own) for own in source.manifests), _samples(source), _dropped(source.datasets)]
    known = {own.name: list(_known(own, source.card_of(own.name))) for own in source.datasets}
    lists = [f"- {code(name)}\n{items(lines, level=1)}" for name, lines in known.items() if lines]
    if lists:
        parts += ["What is known of the datasets, by their cards and by what was counted:", "\n".join(lists)]
    return "\n\n".join(parts)


def _conversion(manifest: Manifest) -> str:
    asked, mix = manifest.asked, "no mix" if manifest.mix is None else f"mix {code(manifest.mix)}"
    missing = f"; **missing:** {', '.join(map(plain, manifest.missing))}" if manifest.missing else ""
    return (
        f"{mix}, seed {manifest.seed}, {count(len(manifest.datasets), 'dataset')}; "
        f"{asked.val_fraction:.1%} of the episodes held out; statistics of {_STATISTICS[asked.statistics]}; "
        f"answers of {count(asked.chunk, 'action')}, a sample every {_every(asked.stride)}{missing}"
    )


def _every(stride: int) -> str:
    return "step" if stride == 1 else f"{stride} steps"


def _samples(source: CardSource) -> str:
    header = ("dataset", "version", "episodes", "steps", "trained on", "held out", "images", "asked", "drawn")
    drawn = dict(source.drawn)
    lines: list[tuple[str, ...]] = [
        (
            code(own.name),
            plain(own.version),
            f"{own.episodes.total:,}",
            f"{own.steps.total:,}",
            f"{own.steps.written:,}",
            f"{own.steps.held_out:,}",
            size(own.image_bytes),
            f"{own.share:.1%}",
            _said(drawn.pop(own.name, None), ".1%"),
        )
        for own in source.datasets
    ]
    # What is left was drawn from LLaVA data, which has no manifest.
    lines += [(code(name), *["-"] * 7, f"{share:.1%}") for name, share in drawn.items()]
    note = (
        "`asked` is the share of the draws among the datasets of one folder, `drawn` that in all of training."
    )
    return f"{table(header, lines, left=2)}\n\n{note}"


def _dropped(datasets: list[ConvertedDataset]) -> str:
    lines = [
        f"{code(own.name)}: {'; '.join(said)}"
        for own in datasets
        if (said := [*_reasons("steps", own.steps), *_reasons("episodes", own.episodes)])
    ]
    return f"Dropped, by reason:\n\n{items(lines)}" if lines else "Nothing was dropped."


def _reasons(what: str, tally: Tally) -> Iterator[str]:
    if tally.dropped:
        reasons = ", ".join(f"{code(reason)} {number:,}" for reason, number in sorted(tally.dropped.items()))
        yield f"{what}: {reasons} of {tally.total:,}"


def _known(own: ConvertedDataset, card: Card | None) -> Iterator[str]:
    if own.bad_records:
        yield f"{count(len(own.bad_records), 'bad record')} skipped"
    if max(own.clipped) > 0:
        yield f"up to {max(own.clipped):.1%} of a dimension's values lie outside what bins can say"
    if own.near_constant:
        yield f"hardly ever changing: dimensions {', '.join(str(a + 1) for a in own.near_constant)}"
    if card is None:
        return
    if own.recipe == "corrected" and card.corrected is not None:
        yield f"corrected recipe: {plain(card.corrected.differs)}"
    yield from map(plain, card.notes)
    yield from (f"defect: {plain(defect.what)} ({plain(defect.source)})" for defect in card.defects)


def origin(source: CardSource) -> str:
    """What it was made with, and of what."""
    parts = []
    if source.versions:
        rows_ = [(plain(name), plain(version)) for name, version in source.versions.items()]
        parts.append(table(("package", "version"), rows_, left=2))
    else:
        parts.append(left_out(VERSIONS_FILE))
    locks = [("lock of a download", sha) for manifest in source.manifests for sha in manifest.lock_sha256]
    hashes = [*((code(name), sha) for name, sha in source.hashes.items()), *locks]
    if hashes:
        parts.append(table(("file", "SHA-256"), [(name, code(sha)) for name, sha in hashes], left=2))
    return "\n\n".join(parts)


def _rate(rate: float | None) -> str:
    return "frozen" if rate is None else f"{rate:g}"


def _said(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
