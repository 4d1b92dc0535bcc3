"""What a conversion says at its end: asked, done, dropped by reason, and what one should know of the data."""

from __future__ import annotations

from collections import Counter

from convert.manifest import ConvertedDataset, Manifest
from oxe_mix.text import count, size, table

_CLIPPED = 0.05
_REPEATED = 0.5
_LISTED = 5


def summary(manifest: Manifest, seconds: float) -> str:
    """The table of datasets, what stands out, and the sums."""
    lines = [_table(manifest), *_notes(manifest)]
    reasons: Counter[str] = sum((Counter(d.steps.dropped) for d in manifest.datasets), Counter())
    why = ", ".join(f"{reason} {n:,}" for reason, n in sorted(reasons.items())) or "none"
    steps = sum(d.steps.total for d in manifest.datasets)
    kept = sum(d.steps.written + d.steps.held_out for d in manifest.datasets)
    images = sum(d.image_bytes for d in manifest.datasets)
    lines.append(
        f"asked {count(steps, 'step')} = done {kept:,} + dropped {steps - kept:,} ({why}); "
        f"images {size(images)}, {seconds:.1f} s, {kept / seconds:,.0f} samples/s"
    )
    return "\n".join(lines)


def _table(manifest: Manifest) -> str:
    header = (
        "dataset",
        "episodes",
        "steps in",
        "written",
        "held out",
        "dropped",
        "weight",
        "share",
        "clipped",
    )
    rows = [
        (
            d.name,
            f"{d.episodes.total:,}",
            f"{d.steps.total:,}",
            f"{d.steps.written:,}",
            f"{d.steps.held_out:,}",
            f"{sum(d.steps.dropped.values()):,}",
            f"{d.weight:g} ({d.weight_share:.1%})",
            f"{d.share:.1%}",
            f"{max(d.clipped):.1%}",
        )
        for d in manifest.datasets
    ]
    return table(header, rows)


def _notes(manifest: Manifest) -> list[str]:
    return [f"note: {d.name}: {note}" for d in manifest.datasets for note in _notes_on(d)]


def _notes_on(dataset: ConvertedDataset) -> list[str]:
    """What a researcher would want to know before training on it."""
    notes = []
    worst = max(dataset.clipped)
    if worst > _CLIPPED:
        notes.append(f"dimension {dataset.clipped.index(worst)}: {worst:.1%} of the values are clipped")
    if dataset.near_constant:
        which = ", ".join(map(str, dataset.near_constant))
        notes.append(f"dimensions near constant (99 % of the samples in one bin): {which}")
    told = dataset.instructions
    if told.unlabelled_samples:
        notes.append(
            f"{count(told.unlabelled_samples, 'sample')} without an instruction got its episode's first"
        )
    episodes = dataset.episodes.written + dataset.episodes.held_out
    if told.most_repeated and episodes > 1:
        text, times = next(iter(told.most_repeated.items()))
        if times > _REPEATED * episodes:
            notes.append(f"{times:,} of {count(episodes, 'episode')} have one instruction: {text!r}")
    listed = dataset.bad_records[:_LISTED]
    notes += [f"skipped {record.error}" for record in listed]
    if len(dataset.bad_records) > len(listed):
        notes.append(f"skipped {len(dataset.bad_records) - len(listed):,} more; manifest.json lists them all")
    return notes
