"""One shard of stage 2: read it once for statistics, once for conversations; write one finished output shard.

Each function here is the whole work of one element of the Beam graph: it opens one shard and keeps one
episode's frames in memory at a time. Output appears under its final name only when it is whole, and what is
finished is not done again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

import google_crc32c
import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from convert.action_codec import ActionStats
from convert.frames import FolderWriter, TarWriter
from convert.lines import LineWriter, index_of
from convert.llava import CONVERSATIONS, IMAGES, VALIDATION, Place, conversation
from convert.manifest import BadRecord
from convert.options import Rules
from convert.recipe import proprioception, standardize
from convert.report import ShardReport, mark_of, read_report, write_report
from convert.samples import FILTERED, Camera, EpisodeSamples, SampleRecipe, samples_of
from convert.statistics import DatasetStats, column_stats
from oxe_mix import __version__
from oxe_mix.cards import Card
from oxe_mix.errors import UserError
from oxe_mix.files import atomic_write, read_model, write_json
from oxe_mix.record_mods import RecordMods
from oxe_mix.rlds import Episode, FeatureTree
from oxe_mix.selection import uniform_hash
from oxe_mix.shards import boot_id
from oxe_mix.tfrecord import Damage, TFRecordError, scan_records

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class ShardJob:
    """One source shard to convert: what flows through Beam. Paths are text."""

    card: Card
    split: str
    index: int
    num_shards: int
    num_episodes: int  # as dataset_info.json says
    file: str
    out: str
    source_shard: int  # its number at the source, so that held-out episodes stay the same when a mix grows
    seed: int
    held_out_below: float  # an episode is held out when its hash is below this
    holds_out_first: bool  # and the first one whatever its hash
    rules: Rules
    cameras: tuple[Camera, ...]
    tree: FeatureTree
    mods: RecordMods = field(default_factory=RecordMods)  # the mix's, where the download did not apply them

    @property
    def stem(self) -> str:
        """The name of this shard's outputs."""
        return f"{self.card.name}-{self.split}-{self.index:05d}-of-{self.num_shards:05d}"

    @property
    def frames(self) -> Path:
        """Where its frames go: a folder or a tar."""
        images = Path(self.out) / IMAGES
        if self.rules.layout == "tar":
            return images / f"{self.stem}.tar"
        return images / self.card.name / self.split / str(self.index)

    @property
    def mark(self) -> str:
        """Of all that decides what this shard becomes, but the statistics. The machine's boot is part of it:
        what was not yet on the disk when the power went is not trusted.
        """
        stat = Path(self.file).stat()
        return mark_of(self, stat.st_size, stat.st_mtime_ns, __version__, boot_id())

    def holds_out(self, episode: int) -> bool:
        """Whether an episode is for validation."""
        return self.rank(episode) < self.held_out_below or (self.holds_out_first and episode == 0)

    def rank(self, *place: int) -> float:
        """A number in [0, 1) for an episode, or a step of one, that stays the same when a mix grows."""
        return uniform_hash(self.seed, self.card.name, self.split, self.source_shard, *place)


class Collected(BaseModel):
    """What the first pass found in a shard, beside the actions."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    mark: str
    num_trajectories: int


def collect_actions(job: ShardJob, scratch: Path) -> None:
    """First pass: every action of a shard, and every state where it is asked for, saved column by column for
    the exact statistics.

    Raises: UserError for a damaged shard or record, with its number, unless such are skipped.
    """
    report, columns = scratch / f"{job.stem}.collected.json", scratch / f"{job.stem}.actions.npy"
    mark = job.mark
    if columns.exists() and report.exists() and read_model(Collected, report, "our own notes").mark == mark:
        return
    rows, bad = [np.zeros((0, job.card.action.dims), np.float32)], list[BadRecord]()
    # Frames are not read here, so of the mods only the filters count.
    for number, values in _episodes(job, job.mods.filters, partial(_rows, job), bad):
        if values is not None and not (job.rules.statistics == "train" and job.holds_out(number)):
            rows.append(values)
    report.unlink(missing_ok=True)  # killed here, no note of other columns may stand beside these
    with atomic_write(columns, flush=False) as stream:
        np.save(stream, np.ascontiguousarray(np.concatenate(rows[1:] or rows).T))
    write_json(report, Collected(mark=mark, num_trajectories=len(rows) - 1).model_dump(mode="json"))


def _rows(job: ShardJob, _: int, episode: Episode, kept_by_mods: bool) -> NDArray[np.float32] | None:
    """Actions of an episode, and states behind them, [T, A + S]; None when the mods drop it."""
    if not kept_by_mods:
        return None
    kept = standardize(episode, job.card)
    if not job.rules.asking.state:
        return kept.actions
    return np.concatenate([kept.actions, proprioception(episode, job.card)[kept.steps]], axis=1)


def merge_actions(jobs: list[ShardJob], scratch: Path) -> None:
    """Between the passes: one dataset's statistics from the saved actions of all its shards.

    Raises: UserError when no step is left.
    """
    card = jobs[0].card
    stems = sorted(job.stem for job in jobs)
    notes = [read_model(Collected, scratch / f"{stem}.collected.json", "our own notes") for stem in stems]
    parts = [np.load(scratch / f"{stem}.actions.npy", mmap_mode="r") for stem in stems]
    parts = [part for part in parts if part.shape[1]] or parts[:1]
    num_trajectories, num_actions = sum(note.num_trajectories for note in notes), card.action.dims

    def stats(first: int, end: int, mask: tuple[bool, ...]) -> ActionStats:
        columns = (np.concatenate([part[a] for part in parts]) for a in range(first, end))
        return column_stats(columns, mask, num_trajectories)

    num_states = len(parts[0]) - num_actions
    try:
        own = DatasetStats(
            actions=stats(0, num_actions, card.normalise_mask),
            states=stats(num_actions, len(parts[0]), (True,) * num_states) if num_states else None,
        )
    except ValueError as error:
        raise UserError(f"{card.name}: {error}") from error
    write_json(stats_file(scratch, card.name), own.model_dump(mode="json"))


def stats_file(scratch: Path, name: str) -> Path:
    """Where a dataset's statistics wait for the second pass."""
    return scratch / f"{name}.stats.json"


def read_stats(scratch: Path, name: str) -> DatasetStats:
    """The statistics that `merge_actions` wrote."""
    return read_model(DatasetStats, stats_file(scratch, name), "our own notes")


def report_file(scratch: Path, job: ShardJob) -> Path:
    """Where the report of a finished shard stands."""
    return scratch / f"{job.stem}.report.json"


def convert_shard(job: ShardJob, scratch: Path) -> None:
    """Second pass: conversations and frames of one shard, written whole or not at all, and a report of it.

    Raises: UserError for a damaged shard, record or frame, with its number, unless such are skipped.
    """
    stats = read_stats(scratch, job.card.name)
    mark = mark_of(job.mark, stats.model_dump_json())
    done = read_report(report_file(scratch, job))
    if done is not None and done.mark == mark and _is_there(job, done):
        return
    report_file(scratch, job).unlink(missing_ok=True)
    report = ShardReport(mark=mark, dataset=job.card.name, split=job.split, index=job.index)
    out, name = Path(job.out), f"{job.stem}.jsonl"
    with ExitStack() as stack:
        frames: FolderWriter | TarWriter
        frames = TarWriter(job.frames) if job.rules.layout == "tar" else FolderWriter(job.frames)
        stack.enter_context(frames)
        num_tarred = len(job.cameras) if job.rules.layout == "tar" else 0
        train, val = (
            stack.enter_context(
                LineWriter(out, f"{folder}/{name}", num_tarred, keep_empty=folder == CONVERSATIONS)
            )
            for folder in (CONVERSATIONS, VALIDATION)
        )
        shard = _Output(job, frames, report)
        recipe = SampleRecipe(job.card, job.rules, stats, job.cameras)
        work = partial(_samples, job, recipe)
        for number, samples in _episodes(job, job.mods, work, report.bad):
            held_out = job.holds_out(number)
            report.count(samples, held_out=held_out)
            shard.write(number, samples, val if held_out else train)
    report.count_bad()
    report.train_file, report.val_file = train.written, val.written
    write_report(report_file(scratch, job), report)


def _is_there(job: ShardJob, report: ShardReport) -> bool:
    """Whether what a report tells of still lies in the folder."""
    files = [Path(job.out) / file.path for file in (report.train_file, report.val_file) if file]
    return job.frames.exists() and all(file.exists() and index_of(file).exists() for file in files)


def _samples(
    job: ShardJob, recipe: SampleRecipe, number: int, episode: Episode, kept_by_mods: bool
) -> EpisodeSamples:
    if not kept_by_mods:
        dropped = Counter({FILTERED: episode.num_steps})
        return EpisodeSamples(episode.num_steps, dropped, FILTERED)
    return samples_of(episode, recipe, partial(job.rank, number))


@dataclass(frozen=True, slots=True)
class _Output:
    """Where the frames and lines of a shard go."""

    job: ShardJob
    frames: FolderWriter | TarWriter
    report: ShardReport

    def write(self, number: int, samples: EpisodeSamples, lines: LineWriter) -> None:
        """Write an episode: its frames, and a line per step."""
        job, report = self.job, self.report
        single, mark = len(job.cameras) == 1, "." if job.rules.layout == "tar" else "-"
        num_bytes, crc32c = 0, report.image_crc32c
        for n, step in enumerate(samples.steps):
            place = Place(job.card.name, job.split, job.index, number, step)
            images, offsets = [], []
            for camera, values in zip(job.cameras, samples.frames, strict=True):
                suffix, frame = values[n]
                name = place.image(suffix if single else f"{mark}{camera.role}{suffix}")
                offset = self.frames.add(name, frame)
                images.append(name)
                offsets += [offset, len(frame)] if job.rules.layout == "tar" else []
                crc32c = google_crc32c.extend(crc32c, frame)
                num_bytes += len(frame)
            lines.add(conversation(place, images, samples.questions[n], samples.bins[n]), offsets)
        report.num_images += len(samples.steps) * len(job.cameras)
        report.image_bytes += num_bytes
        report.image_crc32c = crc32c


def _episodes(
    job: ShardJob, mods: RecordMods, work: Callable[[int, Episode, bool], _T], bad: list[BadRecord]
) -> Iterator[tuple[int, _T]]:
    """The number of each record, and what `work` makes of its number, its episode, and whether the mods keep
    it. A record that is damaged, or that `work` refuses, ends the run, or is booked in `bad`.

    Raises: UserError with shard, record number and offset.
    """
    num_records = 0
    with Path(job.file).open("rb") as stream:
        for record in scan_records(stream, job.file):
            num_records, num_steps = record.number + 1, 0
            try:
                if isinstance(record, Damage):
                    raise record.error
                payload = mods.apply(record.payload) if mods else record.payload
                episode = Episode(record.payload if payload is None else payload, job.tree)
                num_steps = episode.num_steps
                result = work(record.number, episode, payload is not None)
            except TFRecordError as error:
                _refuse(job, bad, BadRecord.of(record, num_steps, str(error)))
            except ValueError as error:
                where = f"{job.file}: record {record.number} at byte {record.offset}"
                _refuse(job, bad, BadRecord.of(record, num_steps, f"{where}: {error}"))
            else:
                yield record.number, result
    wrong = f"{job.file}: holds {num_records} episodes, dataset_info.json says {job.num_episodes}"
    if num_records > job.num_episodes:
        raise UserError(wrong)
    for number in range(num_records, job.num_episodes):
        _refuse(job, bad, BadRecord(record=number, error=wrong))


def _refuse(job: ShardJob, bad: list[BadRecord], record: BadRecord) -> None:
    """Book a broken record. Raises: UserError when it is not to be skipped, or one too many."""
    if job.rules.max_bad is None:
        raise UserError(record.error)
    bad.append(record)
    if len(bad) > job.rules.max_bad:
        raise UserError(f"{record.error}; with it more than --max-bad {job.rules.max_bad} records are broken")
