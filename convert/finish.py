"""The last step of stage 2: the shards' reports become codec, statistics, data.yaml and, last, the
manifest.
"""

from __future__ import annotations

import hashlib
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from convert.action_codec import CODEC_FILE, ActionCodec, write_codec
from convert.frames import INDEX_SUFFIX
from convert.lines import index_of
from convert.llava import CONVERSATIONS, IMAGES, VALIDATION
from convert.manifest import (
    Asked,
    ConvertedDataset,
    ConvertedFile,
    ConvertedFrames,
    Instructions,
    Manifest,
    Tally,
    write_manifest,
)
from convert.options import ConvertOptions
from convert.plan import DatasetOnDisk
from convert.report import HELD_OUT, WRITTEN, ShardReport
from convert.shards import ShardJob, read_stats
from convert.statistics import STATISTICS_FILE, openvla_layout
from oxe_mix import __version__
from oxe_mix.cards import Cards
from oxe_mix.errors import UserError
from oxe_mix.files import atomic_write, write_json
from oxe_mix.lock import LOCK_FILE
from oxe_mix.mix import Mix

CARDS = "cards"
ARRAY, ARRAY_VAL = "conversations.json", "val.json"
_NEAR_CONSTANT = 0.99
_TOP = 12


@dataclass(frozen=True, slots=True)
class Run:
    """What a conversion was asked to do, resolved."""

    options: ConvertOptions
    mix: Mix | None
    seed: int
    datasets: list[DatasetOnDisk]
    jobs: list[ShardJob]
    cards: Cards


def finish_conversion(run: Run, reports: list[ShardReport], scratch: Path) -> Manifest:
    """Write all that is made of the whole, the manifest last.

    Raises: UserError when no sample came of it.
    """
    out = run.options.out
    _remove_leftovers(run, reports)
    stats = {d.card.name: read_stats(scratch, d.card.name) for d in run.datasets}
    codec = ActionCodec(
        binning=run.options.rules.binning,
        action_dim=run.datasets[0].card.action.dims,
        chunk=run.options.rules.steps.chunk,
        asking=run.options.rules.asking,
        datasets={name: own.actions for name, own in stats.items()},
        states={name: own.states for name, own in stats.items() if own.states is not None},
        cameras={d.card.name: d.roles for d in run.datasets if d.roles != run.options.rules.asking.cameras},
    )
    write_codec(out, codec)
    write_json(out / STATISTICS_FILE, openvla_layout(stats))
    _write_cards(run)
    manifest = _manifest(run, reports)
    _write_data_yaml(run, "data.yaml", [file for d in manifest.datasets for file in d.files])
    _write_data_yaml(run, "data_val.yaml", [file for d in manifest.datasets for file in d.validation_files])
    _write_array(run, ARRAY, [file for d in manifest.datasets for file in d.files])
    _write_array(run, ARRAY_VAL, [file for d in manifest.datasets for file in d.validation_files])
    write_manifest(out, manifest)
    return manifest


def _manifest(run: Run, reports: list[ShardReport]) -> Manifest:
    options, out = run.options, run.options.out
    datasets = [_dataset(d, run, [r for r in reports if r.dataset == d.card.name]) for d in run.datasets]
    draws = [d.weight * d.steps.written for d in datasets]
    if not sum(draws):
        raise UserError(f"{out}: no step with an instruction is left to train on")
    weights = sum(d.weight for d in datasets)
    shares = [
        d.model_copy(update={"share": drawn / sum(draws), "weight_share": d.weight / weights})
        for d, drawn in zip(datasets, draws, strict=True)
    ]
    locks = [
        folder for folder in dict.fromkeys(d.data.path for d in run.datasets) if (folder / LOCK_FILE).exists()
    ]
    return Manifest(
        oxe_mix=__version__,
        mix=run.mix.name if run.mix else None,
        seed=run.seed,
        asked=Asked(
            val_fraction=options.val_fraction,
            statistics=options.rules.statistics,
            layout=options.rules.layout,
            images=options.images,
            resize=options.resize,
            chunk=options.chunk,
            chunk_end=options.chunk_end,
            stride=options.stride,
            steps_per_episode=options.steps_per_episode,
            drop_idle=options.drop_idle,
            on_bad_record=options.on_bad_record,
            only=options.only,
        ),
        lock_sha256=tuple(_sha256(folder / LOCK_FILE) for folder in locks),
        codec_sha256=_sha256(out / CODEC_FILE),
        missing=tuple(_missing(run, datasets)),
        datasets=tuple(shares),
    )


def _missing(run: Run, datasets: list[ConvertedDataset]) -> Iterator[str]:
    """What the user asked for and did not get."""
    for dataset in datasets:
        if not dataset.steps.written:
            yield f"{dataset.name}: no sample to train on"
        if run.options.val_fraction and not dataset.steps.held_out:
            yield f"{dataset.name}: no sample held out"


def _dataset(dataset: DatasetOnDisk, run: Run, reports: list[ShardReport]) -> ConvertedDataset:
    episodes: Counter[str] = sum((r.episodes for r in reports), Counter())
    steps: Counter[str] = sum((r.steps for r in reports), Counter())
    samples = steps[WRITTEN] + steps[HELD_OUT]
    width = dataset.card.action.dims
    lost = [sum(column) for column in zip(*(r.clipped for r in reports if r.clipped), strict=True)]
    return ConvertedDataset(
        name=dataset.card.name,
        version=dataset.folder.name,
        folder=str(dataset.folder.relative_to(dataset.data.path)),
        splits=dataset.splits,
        recipe=dataset.spec.recipe,
        cameras=dataset.roles,
        weight=dataset.weight,
        weight_share=0.0,
        share=0.0,
        episodes=_tally(episodes),
        steps=_tally(steps),
        images=sum(r.num_images for r in reports),
        image_bytes=sum(r.image_bytes for r in reports),
        clipped=tuple(n / samples for n in lost) if samples else (0.0,) * width,
        near_constant=_near_constant(reports, samples),
        instructions=_instructions(reports),
        bad_records=tuple(record for r in reports for record in r.bad),
        files=tuple(r.train_file for r in reports if r.train_file),
        validation_files=tuple(r.val_file for r in reports if r.val_file),
        frames=tuple(_frames(job, report) for job, report in _pairs(run, reports)),
    )


def _pairs(run: Run, reports: list[ShardReport]) -> list[tuple[ShardJob, ShardReport]]:
    jobs = {(job.card.name, job.split, job.index): job for job in run.jobs}
    return [(jobs[report.dataset, report.split, report.index], report) for report in reports]


def _frames(job: ShardJob, report: ShardReport) -> ConvertedFrames:
    return ConvertedFrames(
        path=str(job.frames.relative_to(job.out)),
        images=report.num_images,
        bytes=report.image_bytes,
        crc32c=report.image_crc32c,
    )


def _near_constant(reports: list[ShardReport], samples: int) -> tuple[int, ...]:
    histograms = [r.histogram for r in reports if r.histogram]
    dimensions = zip(*histograms, strict=True)
    fullest = [max(sum(bins) for bins in zip(*own, strict=True)) for own in dimensions]
    return tuple(a for a, n in enumerate(fullest) if n >= _NEAR_CONSTANT * samples)


def _instructions(reports: list[ShardReport]) -> Instructions:
    told: Counter[str] = sum((r.instructions for r in reports), Counter())
    top = sorted(told.items(), key=lambda item: (-item[1], item[0]))[:_TOP]
    return Instructions(
        distinct=len(told),
        unlabelled_samples=sum(r.num_unlabelled for r in reports),
        most_repeated=dict(top),
    )


def _tally(counter: Counter[str]) -> Tally:
    known = ("in", WRITTEN, HELD_OUT)
    dropped = {reason: n for reason, n in sorted(counter.items()) if reason not in known and n}
    return Tally(total=counter["in"], written=counter[WRITTEN], held_out=counter[HELD_OUT], dropped=dropped)


def _remove_leftovers(run: Run, reports: list[ShardReport]) -> None:
    """What an earlier conversion into the same folder wrote and this one did not."""
    out = run.options.out.absolute()
    lines = {out / file.path for r in reports for file in (r.train_file, r.val_file) if file}
    frames = {job.frames for job in run.jobs}
    wanted = lines | {index_of(file) for file in lines} | frames
    wanted |= {file.with_suffix(INDEX_SUFFIX) for file in frames if file.suffix == ".tar"}
    for folder in (CONVERSATIONS, VALIDATION, IMAGES):
        for old in (out / folder).glob("*"):
            if old.is_file() and old not in wanted:
                old.unlink()
    for old in (out / IMAGES).glob("*/*/*"):
        if old not in wanted:
            shutil.rmtree(old)
    for old in [*(out / IMAGES).glob("*/*"), *(out / IMAGES).glob("*")]:
        if old.is_dir() and not any(old.iterdir()):
            old.rmdir()


def _write_cards(run: Run) -> None:
    """The datasets' cards as they were: what the numbers mean goes with them, to the checkpoint too."""
    folder = run.options.out / CARDS
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for dataset in run.datasets:
        with atomic_write(folder / f"{dataset.card.name}.yaml") as stream:
            stream.write(run.cards.file_of(dataset.card).read_bytes())


def _write_data_yaml(run: Run, name: str, files: list[ConvertedFile]) -> None:
    """LLaVA-NeXT's `data_path` form. Absolute paths: its loader resolves relative ones against the working
    folder. It reads no tars, so these have none.
    """
    out = run.options.out
    entries = [
        {"json_path": str((out / file.path).resolve()), "sampling_strategy": "all"}
        for file in files
        if file.samples and run.options.rules.layout == "files"
    ]
    if not entries:
        (out / name).unlink(missing_ok=True)
        return
    with atomic_write(out / name) as stream:
        stream.write(yaml.safe_dump({"datasets": entries}, sort_keys=False).encode())


def _write_array(run: Run, name: str, files: list[ConvertedFile]) -> None:
    """All samples as one JSON array, for tools that want that; copied line by line, never held in memory."""
    out = run.options.out
    if not run.options.array or not any(file.samples for file in files):
        (out / name).unlink(missing_ok=True)
        return
    with atomic_write(out / name) as stream:
        between = b"[\n"
        for file in files:
            with (out / file.path).open("rb") as lines:
                for line in lines:
                    stream.write(between + line.rstrip(b"\n"))
                    between = b",\n"
        stream.write(b"\n]\n")


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
