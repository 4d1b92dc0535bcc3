"""What `oxe-mix convert` does, in order, and what it prints."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml

from convert.action_codec import CODEC_FILE, ActionCodec, ActionStats, write_codec
from convert.llava import CONVERSATIONS, IMAGES, VALIDATION
from convert.manifest import MANIFEST_FILE, ConvertedDataset, ConvertedFile, Manifest, Tally, write_manifest
from convert.plan import DatasetOnDisk, find_datasets, read_finished_lock, shard_jobs
from convert.shards import ShardCounts, ShardJob, read_stats
from convert.statistics import STATISTICS_FILE, openvla_layout
from oxe_mix import __version__
from oxe_mix.cards import load_cards
from oxe_mix.engine import Engine
from oxe_mix.errors import UserError
from oxe_mix.files import BUSY_FILE, atomic_write, folder_lock, sweep, write_json
from oxe_mix.lock import LOCK_FILE
from oxe_mix.mix import Mix, load_mix
from oxe_mix.progress import Goal, Sample, progress
from oxe_mix.text import complain, count, say, size, table

_PARTIAL = ".partial"


@dataclass(frozen=True, slots=True)
class ConvertOptions:
    """The options of the command."""

    to: str
    mix: Path | None
    data: Path
    out: Path
    val_fraction: float
    cards: Path | None
    workers: int | None


@dataclass(frozen=True, slots=True)
class _Run:
    """What a conversion was asked to do, resolved."""

    options: ConvertOptions
    mix: Mix | None
    datasets: list[DatasetOnDisk]
    jobs: list[ShardJob]


def run_convert(options: ConvertOptions) -> int:
    """Convert a data folder.

    Returns: the exit code: 0 when all of it arrived, 1 when a shard failed.
    Raises: UserError for what the user can mend.
    """
    from pipelines.convert import convert_all

    start = time.monotonic()
    run = _resolve(options)
    out, scratch = options.out, options.out / _PARTIAL
    _refuse_other_folder(out)
    with folder_lock(out, "conversion"):
        # Until the new manifest is there, nobody may take what lies here for a result.
        (out / MANIFEST_FILE).unlink(missing_ok=True)
        sweep(out)
        scratch.mkdir(exist_ok=True)
        total = len(run.jobs)
        with progress(Goal("convert", "shard reading", 2 * total), _passes_done(run, time.time())):
            counts, failures = convert_all(run.jobs, scratch, Engine(workers=options.workers))
        if failures:
            complain("\n".join(failures))
            say(f"{len(counts)} of {count(total, 'shard')} converted; {out} is no result yet")
            return 1
        manifest = _finish(
            run, counts, {d.card.name: read_stats(str(scratch / f"{d.card.name}.json")) for d in run.datasets}
        )
        shutil.rmtree(scratch)
    seconds = time.monotonic() - start
    say(_summary(manifest, seconds))
    say(f"result: {out}\nnext: make train LLAVA={out}")
    return 0


def _resolve(options: ConvertOptions) -> _Run:
    if options.to != "llava":
        raise UserError(f"--to {options.to}: unknown format; known: llava")
    if not 0 <= options.val_fraction < 1:
        raise UserError(f"--val-fraction {options.val_fraction:g} is not in [0, 1)")
    cards = load_cards(options.cards)
    lock = read_finished_lock(options.data) if options.data.is_dir() else None
    mix = load_mix(options.mix, cards) if options.mix is not None else (lock.mix if lock else None)
    datasets = find_datasets(options.data, mix, lock, cards)
    widths = {dataset.card.action.dims for dataset in datasets}
    if len(widths) > 1:
        raise UserError(
            f"actions of widths {sorted(widths)} cannot share one codec; make a mix for each width"
        )
    seed = mix.seed if mix is not None else 0
    jobs = [job for d in datasets for job in shard_jobs(d, options.out, lock, seed, options.val_fraction)]
    return _Run(options, mix, datasets, jobs)


def _passes_done(run: _Run, start: float) -> Callable[[], Sample]:
    """Counts the shards that have been read once and those that have been read twice since `start`."""
    out = run.options.out
    once = [out / _PARTIAL / f"{job.stem}.npz" for job in run.jobs]
    twice = [out / CONVERSATIONS / f"{job.stem}.jsonl" for job in run.jobs]

    def done() -> Sample:
        return Sample(sum(file.exists() and file.stat().st_mtime >= start for file in (*once, *twice)))

    return done


def _refuse_other_folder(out: Path) -> None:
    """Only a folder that is empty or was made by a conversion is written into; what that one left is
    replaced.
    """
    if (out / LOCK_FILE).exists():
        raise UserError(f"{out}: holds a download; choose another --out")
    if not out.is_dir() or (out / BUSY_FILE).exists():
        return
    strange = next(out.iterdir(), None)
    if strange is not None:
        raise UserError(f"{out}: holds other things ({strange.name}); choose another --out")


def _finish(run: _Run, counts: list[ShardCounts], stats: dict[str, ActionStats]) -> Manifest:
    out, width = run.options.out, run.datasets[0].card.action.dims
    _remove_leftovers(run)
    write_codec(out, ActionCodec(action_dim=width, datasets=stats))
    write_json(out / STATISTICS_FILE, openvla_layout(stats))
    written = {
        d.card.name: _dataset(d, run, [c for c in counts if c.dataset == d.card.name]) for d in run.datasets
    }
    draws = {name: d.weight * d.steps.written for name, d in written.items()}
    total = sum(draws.values())
    if total == 0:
        raise UserError(f"{run.options.data}: no step with an instruction is left to train on")
    lock = run.options.data / LOCK_FILE
    manifest = Manifest(
        oxe_mix=__version__,
        mix=run.mix.name if run.mix else None,
        seed=run.mix.seed if run.mix else 0,
        val_fraction=run.options.val_fraction,
        lock_sha256=_sha256(lock) if lock.exists() else None,
        codec_sha256=_sha256(out / CODEC_FILE),
        datasets=tuple(d.model_copy(update={"share": draws[name] / total}) for name, d in written.items()),
    )
    _write_data_yaml(out / "data.yaml", [file for d in manifest.datasets for file in d.files])
    _write_data_yaml(out / "data_val.yaml", [file for d in manifest.datasets for file in d.validation_files])
    write_manifest(out, manifest)
    return manifest


def _dataset(dataset: DatasetOnDisk, run: _Run, counts: list[ShardCounts]) -> ConvertedDataset:
    episodes: Counter[str] = sum((c.episodes for c in counts), Counter())
    steps: Counter[str] = sum((c.steps for c in counts), Counter())
    kept = steps["written"] + steps["held_out"]
    lost = [sum(column) for column in zip(*(c.clipped for c in counts), strict=True)]
    jobs = [job for job in run.jobs if job.card.name == dataset.card.name]
    return ConvertedDataset(
        name=dataset.card.name,
        version=dataset.folder.name,
        folder=str(dataset.folder.relative_to(run.options.data)),
        splits=dataset.splits,
        weight=dataset.weight,
        share=0.0,
        episodes=_tally(episodes),
        steps=_tally(steps),
        image_bytes=sum(c.image_bytes for c in counts),
        clipped=tuple(n / kept if kept else 0.0 for n in lost),
        files=_files(run.options.out, CONVERSATIONS, jobs),
        validation_files=_files(run.options.out, VALIDATION, jobs),
    )


def _tally(counter: Counter[str]) -> Tally:
    known = ("in", "written", "held_out")
    dropped = {reason: n for reason, n in sorted(counter.items()) if reason not in known and n}
    return Tally(
        total=counter["in"], written=counter["written"], held_out=counter["held_out"], dropped=dropped
    )


def _files(out: Path, folder: str, jobs: list[ShardJob]) -> tuple[ConvertedFile, ...]:
    files = []
    for job in jobs:
        path = f"{folder}/{job.stem}.jsonl"
        text = (out / path).read_bytes()
        if text or folder == CONVERSATIONS:
            files.append(
                ConvertedFile(path=path, samples=text.count(b"\n"), sha256=hashlib.sha256(text).hexdigest())
            )
        else:
            # A shard without a held-out episode leaves no file behind.
            (out / path).unlink()
    return tuple(files)


def _remove_leftovers(run: _Run) -> None:
    """What an earlier conversion into the same folder wrote and this one did not."""
    out = run.options.out
    lines = {f"{job.stem}.jsonl" for job in run.jobs}
    shards = {out / IMAGES / job.card.name / job.split / str(job.index) for job in run.jobs}
    for file in [*(out / CONVERSATIONS).iterdir(), *(out / VALIDATION).iterdir()]:
        if file.name not in lines:
            file.unlink()
    for folder in (out / IMAGES).glob("*/*/*"):
        if folder not in shards:
            shutil.rmtree(folder)


def _write_data_yaml(file: Path, files: list[ConvertedFile]) -> None:
    """LLaVA-NeXT's `data_path` form. Absolute paths: its loader resolves relative ones against the working
    folder.
    """
    entries = [
        {"json_path": str((file.parent / f.path).resolve()), "sampling_strategy": "all"}
        for f in files
        if f.samples
    ]
    if not entries:
        file.unlink(missing_ok=True)
        return
    with atomic_write(file) as stream:
        stream.write(yaml.safe_dump({"datasets": entries}, sort_keys=False).encode())


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _summary(manifest: Manifest, seconds: float) -> str:
    rows = []
    for d in manifest.datasets:
        dropped = sum(d.steps.dropped.values())
        counts = (d.steps.total, d.steps.written, d.steps.held_out, dropped)
        rows.append(
            (
                d.name,
                f"{d.episodes.total:,}",
                *(f"{n:,}" for n in counts),
                f"{d.share:.1%}",
                f"{max(d.clipped):.1%}",
            )
        )
    header = ("dataset", "episodes", "steps in", "written", "held out", "dropped", "share", "most clipped")
    reasons: Counter[str] = sum((Counter(d.steps.dropped) for d in manifest.datasets), Counter())
    why = ", ".join(f"{reason} {n:,}" for reason, n in sorted(reasons.items())) or "none"
    steps = sum(d.steps.total for d in manifest.datasets)
    kept = sum(d.steps.written + d.steps.held_out for d in manifest.datasets)
    images = sum(d.image_bytes for d in manifest.datasets)
    return (
        f"{table(header, rows)}\n"
        f"asked {count(steps, 'step')} = done {kept:,} + dropped {steps - kept:,} ({why}); "
        f"images {size(images)}, {seconds:.1f} s, {kept / seconds:,.0f} frames/s"
    )
