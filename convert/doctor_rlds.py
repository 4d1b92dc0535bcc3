"""Episodes of a data folder for `oxe-mix doctor`: a seeded sample of them, each read once."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from convert.action_codec import ActionStats
from convert.doctor_frames import track
from convert.doctor_gripper import gripper_column
from convert.doctor_summary import DatasetSummary, EpisodeSummary
from convert.episodes import instructions_of
from convert.plan import DatasetOnDisk
from convert.recipe import recorded, recorded_state
from convert.statistics import action_stats
from oxe_mix.cards import Card
from oxe_mix.errors import UserError
from oxe_mix.mods import Mod
from oxe_mix.rlds import INFO_FILE, Episode
from oxe_mix.tfrecord import RecordPlace, find_records, read_payload

# Below that, the lengths and checksums of all records are compared: they are read without the records.
_MOST_COMPARED = 20_000


@dataclass(frozen=True, slots=True)
class Sampling:
    """How many episodes of a dataset are looked at, None for all; the same ones for the same seed."""

    episodes: int | None
    seed: int

    def of(self, name: str, total: int) -> list[int]:
        """The numbers of the episodes of a dataset, in order."""
        if self.episodes is None or self.episodes >= total:
            return list(range(total))
        return sorted(random.Random(f"{self.seed} {name}").sample(range(total), self.episodes))


@dataclass(frozen=True, slots=True)
class _Shard:
    """A file of records, and which of them are wanted."""

    id: str  # NAME/SPLIT/SHARD
    file: Path
    length: int  # records, as dataset_info.json says
    wanted: tuple[int, ...]


@dataclass(slots=True)
class _Found:
    """What was read so far."""

    episodes: list[EpisodeSummary] = field(default_factory=list)
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    first_of: dict[tuple[int, int], str] = field(default_factory=dict)  # length and checksum of a record
    twins: list[tuple[str, str]] = field(default_factory=list)
    num_compared: int = 0


def summarize_rlds(
    dataset: DatasetOnDisk, sampling: Sampling, usual_width: int, seen: Callable[[], None]
) -> DatasetSummary:
    """Look at a sample of a dataset's episodes, of all its splits; `seen` is called after each.

    Nothing that is wrong with a record, a shard or a frame is raised: it is listed.
    """
    card, splits = dataset.card, {s.name: s.num_episodes for s in dataset.info.splits.values()}
    shards, found = _shards(dataset, sampling), _Found()
    compare_all = sum(splits.values()) <= _MOST_COMPARED
    for shard in shards:
        if shard.wanted or compare_all:
            _read_shard(shard, dataset, found, seen)
    return DatasetSummary(
        name=card.name,
        card=card,
        width=card.action.dims,
        usual_width=usual_width,
        of_episodes=sum(splits.values()),
        splits=splits,
        episodes=tuple(found.episodes),
        stats=stats_of(found.episodes, card),
        unreadable=tuple(found.unreadable),
        twins=tuple(found.twins),
        num_compared=found.num_compared,
        advised_mods=_not_applied(dataset),
    )


def stats_of(episodes: list[EpisodeSummary], card: Card) -> ActionStats | None:
    """Statistics of the steps that were looked at and are finite; None when there is none."""
    rows = [e.actions[np.isfinite(e.actions).all(axis=1)] for e in episodes]
    if not any(map(len, rows)):
        return None
    return action_stats(np.concatenate(rows), card.normalise_mask, len(rows))


def _shards(dataset: DatasetOnDisk, sampling: Sampling) -> list[_Shard]:
    lengths = [(s.name, i, n) for s in dataset.info.splits.values() for i, n in enumerate(s.shard_lengths)]
    wanted = np.array(sampling.of(dataset.card.name, sum(n for _, _, n in lengths)), np.int64)
    shards, start = [], 0
    for split, index, length in lengths:
        low, high = np.searchsorted(wanted, [start, start + length]).tolist()
        num_shards = len(dataset.info.splits[split].shard_lengths)
        shards.append(
            _Shard(
                id=f"{dataset.card.name}/{split}/{index}",
                file=dataset.folder / dataset.info.shard_file(split, index, num_shards),
                length=length,
                wanted=tuple((wanted[low:high] - start).tolist()),
            )
        )
        start += length
    return shards


def _read_shard(shard: _Shard, dataset: DatasetOnDisk, found: _Found, seen: Callable[[], None]) -> None:
    places: list[RecordPlace] = []
    try:
        with shard.file.open("rb") as stream:
            try:
                places.extend(find_records(stream, shard.file.name))
            except UserError as error:
                found.unreadable.append((shard.id, str(error)))
            _compare(shard, places, found)
            for number in shard.wanted:
                if number < len(places):
                    _read_episode(f"{shard.id}/{number}", dataset, found, partial(
                        read_payload, stream, places[number], shard.file.name
                    ))  # fmt: skip
                seen()
    except OSError as error:
        found.unreadable.append((shard.id, f"{shard.file.name}: cannot be read ({error.strerror})"))
        return
    if len(places) != shard.length:
        told = f"{shard.file.name}: {len(places)} records were found, {INFO_FILE} says {shard.length}"
        found.unreadable.append((shard.id, told))


def _compare(shard: _Shard, places: list[RecordPlace], found: _Found) -> None:
    """Records of equal length and checksum are the same episode."""
    for place in places:
        name = f"{shard.id}/{place.number}"
        first = found.first_of.setdefault((place.num_bytes, place.payload_crc), name)
        if first != name:
            found.twins.append((first, name))
    found.num_compared += len(places)


def _read_episode(name: str, dataset: DatasetOnDisk, found: _Found, payload: Callable[[], bytes]) -> None:
    try:
        found.episodes.append(summarize_episode(name, Episode(payload(), dataset.tree), dataset))
    except ValueError as error:  # of the record, its columns or a text: each says what it was
        found.unreadable.append((name, str(error)))


def summarize_episode(name: str, episode: Episode, dataset: DatasetOnDisk) -> EpisodeSummary:
    """An episode after its card's recipe, its frames as a few numbers.

    Raises: ValueError for columns that are not there or disagree in length.
    """
    card = dataset.card
    # What is not finite in the record stays so, and is found by its own check.
    with np.errstate(invalid="ignore", over="ignore"):
        kept, states = recorded(episode, card), recorded_state(episode, card)
    column, steps = gripper_column(card), kept.steps
    no_state: NDArray[np.float32] = np.zeros(0, np.float32)
    cameras = []
    for camera in dataset.cameras:
        frames = episode.slices(camera.key)[steps]
        cameras.append(track(camera.role, [partial(bytes, frame) for frame in frames], camera.feature.shape))
    return EpisodeSummary(
        id=name,
        steps=np.arange(steps.start, steps.stop, dtype=np.int64),
        actions=kept.actions,
        gripper_state=no_state if column is None else states[steps, column],
        bad_states=int((~np.isfinite(states[steps])).sum()),
        texts=tuple(instructions_of(episode, card.language)[steps]),
        cameras=tuple(cameras),
    )


def _not_applied(dataset: DatasetOnDisk) -> tuple[str, ...]:
    """The card's advice less the mods that the download applied, as a mix writes them."""
    lock = dataset.data.lock
    applied = lock.mods_of(dataset.card.name) if lock else ()
    return tuple(_as_in_a_mix(mod) for mod in dataset.card.mods if mod not in applied)


def _as_in_a_mix(mod: Mod) -> str:
    return mod if isinstance(mod, str) else json.dumps(mod.model_dump(mode="json")).replace('"', "")
