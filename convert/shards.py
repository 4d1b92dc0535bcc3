"""One shard of stage 2: read it once for statistics, once for conversations; write one finished output shard.

Each function here is the whole work of one element of the Beam graph: it opens one shard and keeps one
episode's frames in memory at a time. Output appears under its final name only when it is whole.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import IO, Any

import numpy as np

from convert.action_codec import ActionStats, clipped, encode
from convert.episodes import Trajectory, read_trajectory
from convert.images import frame_suffix
from convert.llava import CONVERSATIONS, IMAGES, VALIDATION, Place, conversation, json_line
from convert.recipe import standardize
from convert.statistics import action_stats
from oxe_mix.cards import Card
from oxe_mix.errors import UserError
from oxe_mix.files import atomic_write, read_model, write_json
from oxe_mix.record_mods import RecordMods
from oxe_mix.rlds import FEATURES_FILE, Episode, parse_features
from oxe_mix.selection import uniform_hash
from oxe_mix.tfrecord import read_records

NO_INSTRUCTION, TOO_SHORT, RECIPE, FILTERED = "no_instruction", "too_short", "recipe", "filtered_by_mods"


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
    mods: RecordMods = field(default_factory=RecordMods)  # the mix's, where the download did not apply them

    @property
    def stem(self) -> str:
        """The name of this shard's outputs."""
        return f"{self.card.name}-{self.split}-{self.index:05d}-of-{self.num_shards:05d}"

    def holds_out(self, episode: int) -> bool:
        """Whether an episode is for validation."""
        place = (self.seed, self.card.name, self.split, self.source_shard, episode)
        return uniform_hash(*place) < self.held_out_below or (self.holds_out_first and episode == 0)


@dataclass(slots=True)
class ShardCounts:
    """What went in and what came out of one shard; in = written + held out + dropped, for episodes and
    steps.
    """

    dataset: str
    split: str
    index: int
    episodes: Counter[str] = field(default_factory=Counter)
    steps: Counter[str] = field(default_factory=Counter)
    image_bytes: int = 0
    clipped: list[int] = field(default_factory=list)  # per dimension, over the written and held-out steps


def collect_actions(job: ShardJob, folder: Path) -> str:
    """First pass: every action of a shard, saved for the exact statistics; returns the file.

    Raises: UserError for a damaged shard or record, with its number.
    """
    actions, num_records, num_trajectories = [np.zeros((0, job.card.action.dims), np.float32)], 0, 0
    # Frames are not read here, so of the mods only the filters count.
    for number, (episode, kept) in enumerate(_episodes(job, job.mods.filters)):
        num_records = number + 1
        if kept:
            with _placed(job, number):
                actions.append(standardize(episode, job.card).actions)
            num_trajectories += 1
    if num_records != job.num_episodes:
        raise UserError(
            f"{job.file}: holds {num_records} episodes, dataset_info.json says {job.num_episodes}"
        )
    file = folder / f"{job.stem}.npz"
    with atomic_write(file) as stream:
        np.savez(stream, actions=np.concatenate(actions), num_trajectories=np.array(num_trajectories))
    return str(file)


def merge_actions(card: Card, files: list[str], folder: Path) -> str:
    """Between the passes: one dataset's statistics from the saved actions of all its shards; returns the
    file.
    """
    parts = [np.load(file) for file in sorted(files)]
    trajectories = sum(int(part["num_trajectories"]) for part in parts)
    try:
        stats = action_stats(
            np.concatenate([part["actions"] for part in parts]), card.normalise_mask, trajectories
        )
    except ValueError as error:
        raise UserError(f"{card.name}: {error}") from error
    file = folder / f"{card.name}.json"
    write_json(file, stats.model_dump(mode="json"))
    return str(file)


def read_stats(file: str) -> ActionStats:
    """The statistics that `merge_actions` wrote."""
    return read_model(ActionStats, Path(file), "action statistics")


def convert_shard(job: ShardJob, stats: ActionStats) -> ShardCounts:
    """Second pass: conversations and frames of one shard, written whole or not at all.

    Raises: UserError for a damaged shard, record or frame, with its number.
    """
    counts = ShardCounts(job.card.name, job.split, job.index, clipped=[0] * job.card.action.dims)
    out = Path(job.out)
    final = out / IMAGES / job.card.name / job.split / str(job.index)
    images = final.with_name(f".{job.index}.tmp")
    shutil.rmtree(images, ignore_errors=True)
    images.mkdir(parents=True)
    output = _Output(job, stats, images, counts)
    train, held_out = (out / folder / f"{job.stem}.jsonl" for folder in (CONVERSATIONS, VALIDATION))
    with atomic_write(train) as train_lines, atomic_write(held_out) as val_lines:
        for number, (episode, kept) in enumerate(_episodes(job, job.mods)):
            if not kept:
                counts.episodes.update(["in", FILTERED])
                counts.steps.update({"in": episode.num_steps, FILTERED: episode.num_steps})
                continue
            with _placed(job, number):
                trajectory = read_trajectory(episode, job.card)
                kind = _count(trajectory, counts, held_out=job.holds_out(number))
                if kind in ("written", "held_out"):
                    lines = val_lines if kind == "held_out" else train_lines
                    output.write(number, trajectory, lines)
        shutil.rmtree(final, ignore_errors=True)
        images.rename(final)
    return counts


def _count(trajectory: Trajectory, counts: ShardCounts, *, held_out: bool) -> str:
    """Book an episode and its steps under what becomes of them; returns what becomes of the episode."""
    kept = len(trajectory.actions)
    kind = "held_out" if held_out else "written"
    if kept == 0:
        kind = TOO_SHORT
    elif not trajectory.labelled:
        kind = NO_INSTRUCTION
    counts.episodes.update(["in", kind])
    counts.steps.update(
        {"in": trajectory.num_source_steps, RECIPE: trajectory.num_source_steps - kept, kind: kept}
    )
    return kind


@dataclass(frozen=True, slots=True)
class _Output:
    """Where the frames of a shard go, and the statistics that its actions are encoded with."""

    job: ShardJob
    stats: ActionStats
    images: Path
    counts: ShardCounts

    def write(self, number: int, trajectory: Trajectory, lines: IO[bytes]) -> None:
        """Write an episode: a file per frame, a line per step."""
        job, counts = self.job, self.counts
        bins = encode(trajectory.actions, self.stats)
        lost = clipped(trajectory.actions, self.stats).sum(axis=0)
        counts.clipped = [before + int(own) for before, own in zip(counts.clipped, lost, strict=True)]
        for t, frame in enumerate(trajectory.frames):
            place = Place(job.card.name, job.split, job.index, number, trajectory.first_step + t)
            image = place.image(frame_suffix(frame))
            (self.images / Path(image).name).write_bytes(frame)
            counts.image_bytes += len(frame)
            lines.write(json_line(conversation(place, image, trajectory.instruction(t), bins[t])))


def _episodes(job: ShardJob, mods: RecordMods) -> Iterator[tuple[Episode, bool]]:
    """The episodes of a shard after the mods, and whether these keep it."""
    features = Path(job.file).parent / FEATURES_FILE
    tree = parse_features(features.read_text(), str(features))
    with Path(job.file).open("rb") as stream:
        for number, record in enumerate(read_records(stream, job.file)):
            with _placed(job, number):
                payload = mods.apply(record.payload) if mods else record.payload
                episode = Episode(record.payload if payload is None else payload, tree)
            yield episode, payload is not None


@contextmanager
def _placed(job: ShardJob, number: int) -> Iterator[None]:
    """Say in which record of which shard a value was wrong."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{job.file}: record {number}: {error}") from error


def counts_to_json(counts: ShardCounts) -> dict[str, Any]:
    """As it comes back through Beam."""
    return {field.name: getattr(counts, field.name) for field in fields(counts)}


def counts_from_json(value: dict[str, Any]) -> ShardCounts:
    """The inverse of `counts_to_json`."""
    return ShardCounts(**{**value, "episodes": Counter(value["episodes"]), "steps": Counter(value["steps"])})
