"""The pages of a folder of RLDS datasets, downloaded by us or not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from convert.action_codec import encode
from convert.episodes import read_trajectory
from convert.plan import DatasetOnDisk, find_datasets, open_folders
from convert.prompt import Asking
from convert.statistics import action_stats
from oxe_mix.cards import load_cards
from oxe_mix.lock import Lock, LockedSplit
from oxe_mix.rlds import INFO_FILE, Episode
from oxe_mix.text import count, size
from oxe_mix.tfrecord import Record
from train_llava.dimensions import dimension_names
from train_llava.report.facts import card_facts, motion_of
from train_llava.report.figures import action_dimensions, length_histogram, reach
from train_llava.report.pictures import strip
from train_llava.report.records import drawn_records
from train_llava.report.sampling import MOST_EPISODES, MOST_STRIPES
from train_llava.report.values import DatasetPage, Dimension, Overview, Recorded, Row, Share, Told

_TOP = 5
_TOO_SHORT, _NO_INSTRUCTION = "too short for the recipe", "without an instruction"
_RECIPE = "lost to the recipe"


@dataclass(frozen=True, slots=True)
class DownloadedFolder:
    """A data folder, opened."""

    path: Path
    lock: Lock | None
    datasets: list[DatasetOnDisk]
    strangers: list[str]  # folders of datasets without a card
    seed: int

    def locked(self, own: DatasetOnDisk) -> list[LockedSplit]:
        """What the lock says of a dataset's splits; nothing without a lock."""
        datasets = self.lock.datasets if self.lock else ()
        return [split for one in datasets if one.name == own.card.name for split in one.splits]


@dataclass(slots=True)
class _Reading:
    """What was read of one dataset."""

    episodes: list[Recorded]
    num_records: int
    num_steps: int  # of the records
    told: Counter[str]  # episodes by their first instruction
    lost: Counter[str]  # episodes, and steps to the recipe
    problems: list[str]


def open_downloaded(path: Path, cards_folder: Path | None, seed: int) -> DownloadedFolder:
    """Raises: UserError when it holds no dataset with a card, or its download is not finished."""
    folders, cards = open_folders((path,)), load_cards(cards_folder)
    found = find_datasets(folders, None, cards, (), Asking())
    places = {own.folder for own in found}
    strangers = [
        str(info.parent.relative_to(path))
        for info in sorted(path.glob(f"*/*/{INFO_FILE}"))
        if info.parent not in places
    ]
    return DownloadedFolder(path, folders[0].lock, found, strangers, seed)


def overview(folder: DownloadedFolder, pages: list[DatasetPage]) -> Overview:
    """The first page: exact counts, from the lock and each dataset_info.json."""
    episodes = sum(_num_episodes(own) for own in folder.datasets)
    num_bytes = sum(_num_bytes(own) for own in folder.datasets)
    shards = sum(len(own.info.splits[name].shard_lengths) for own in folder.datasets for name in own.splits)
    tiles = (
        Row("datasets", f"{len(folder.datasets):,}", "datasets"),
        Row("episodes", f"{episodes:,}", "episodes"),
        Row("shards", f"{shards:,}", "shards"),
        Row("on disk", size(num_bytes), "bytes"),
    )
    lock = folder.lock
    origin = "No lock here: not downloaded by oxe-mix, so nothing was asked for."
    if lock is not None:
        origin = f"Downloaded by mix {lock.mix.name}, seed {lock.mix.seed}."
    notes = (
        origin,
        "All counts and shares are exact, from the lock and each dataset_info.json; charts, instructions and "
        f"quantiles are of the episodes that were read: of each dataset at most {MOST_EPISODES}, drawn with "
        f"seed {folder.seed}. Exact quantiles are what convert measures.",
    )
    header = ("dataset", "robot", "at the source", "asked", "taken", "come of it", "on disk", "size")
    rows = tuple(_row(folder, own, page) for own, page in zip(folder.datasets, pages, strict=True))
    warnings = tuple(f"{name}: has no card or is not of the mix; not read" for name in folder.strangers)
    return Overview(tiles, header, rows, notes, warnings)


def _row(folder: DownloadedFolder, own: DatasetOnDisk, page: DatasetPage) -> tuple[str, ...]:
    splits = folder.locked(own)
    on_disk = (f"{_num_episodes(own):,}", size(_num_bytes(own)))
    if not splits:
        return (own.card.name, page.robot, "unknown", "-", "-", "-", *on_disk)
    of, taken = sum(split.of_episodes for split in splits), sum(split.taken for split in splits)
    return (
        own.card.name,
        page.robot,
        f"{of:,}",
        f"{_asked(folder, own) / of:.2%}",
        f"{taken:,}",
        f"{taken / of:.2%}",
        *on_disk,
    )


def dataset_page(folder: DownloadedFolder, own: DatasetOnDisk, episodes: int, share: int) -> DatasetPage:
    """The page of one dataset; so many of its episodes are shown, with frames of `share` bytes each.

    Raises: UserError for a record that is damaged or a frame that cannot be decoded.
    """
    card, read = own.card, _read(folder, own, episodes)
    dimensions = _dimensions(own, read.episodes)
    motion = motion_of(card, card.action.dims)
    has_gripper = not card.normalise_mask[-1]
    return DatasetPage(
        name=card.name,
        robot=card.robot,
        read=_read_words(folder, own, read),
        counts=_counts(own),
        shares=tuple(_shares(folder, own)),
        dropped=tuple(_dropped(folder, own, read)),
        dimensions=dimensions,
        statistics="Quantiles and the clipped share are of the episodes that were read, after the recipe; "
        "what lies outside the quantiles is clipped when it becomes bins.",
        grippers=tuple((one.id, one.actions[:, -1]) for one in read.episodes[:MOST_STRIPES])
        if has_gripper
        else (),
        lengths=length_histogram([len(one.steps) for one in read.episodes]),
        length_words=f"Steps that the recipe keeps, of {count(len(read.episodes), 'episode')}.",
        told=_told(read),
        strips=tuple(strip(one, motion, share) for one in read.episodes[:episodes] if one.frames),
        motion=motion,
        reach=reach(read.episodes, motion),
        facts=card_facts(card, own.spec.recipe),
        problems=tuple(_problems(read, dimensions)),
    )


def _read(folder: DownloadedFolder, own: DatasetOnDisk, shown: int) -> _Reading:
    """Episodes in the order in which they were drawn; the first so many keep their frames."""
    read = _Reading([], 0, 0, Counter(), Counter(), [])
    for place, record in drawn_records(own, shown, folder.seed):
        id_ = f"{own.card.name}/{place.split}/{place.shard}/{place.number}"
        try:
            one = _recorded(own, id_, record, keeps_frames=len(read.episodes) < shown, read=read)
        except ValueError as error:
            read.problems.append(f"{id_}: {error}")
            continue
        if one is not None:
            read.episodes.append(one)
    return read


def _recorded(
    own: DatasetOnDisk, id_: str, record: Record, *, keeps_frames: bool, read: _Reading
) -> Recorded | None:
    episode = Episode(record.payload, own.tree)
    trajectory = read_trajectory(episode, own.card, state=False)
    num = len(trajectory.actions)
    read.num_records, read.num_steps = read.num_records + 1, read.num_steps + episode.num_steps
    read.lost[_RECIPE] += episode.num_steps - num
    if not num:
        read.lost[_TOO_SHORT] += 1
        return None
    read.told[trajectory.first_instruction] += 1
    steps = trajectory.first_step + np.arange(num)
    frames = episode.slices(own.cameras[0].key) if keeps_frames and own.cameras else []
    return Recorded(
        id=id_,
        instruction=trajectory.first_instruction,
        steps=steps,
        actions=trajectory.actions.astype(np.float64),
        frames=tuple(partial(bytes, frames[step]) for step in steps) if frames else (),
    )


def _dimensions(own: DatasetOnDisk, read: list[Recorded]) -> tuple[Dimension, ...]:
    if not read:
        return ()
    actions = np.concatenate([one.actions for one in read])
    stats = action_stats(actions.astype(np.float32), own.card.normalise_mask, len(read))
    names = dimension_names(own.card, own.card.action.dims)
    return action_dimensions(actions, encode(actions, stats), stats, names, "uniform256")


def _told(read: _Reading) -> Told:
    labelled = {text: num for text, num in read.told.items() if text}
    top = sorted(labelled.items(), key=lambda item: (-item[1], item[0]))[:_TOP]
    return Told(len(labelled), tuple(top), len(read.episodes), is_exact=False)


def _num_episodes(own: DatasetOnDisk) -> int:
    return sum(own.info.splits[name].num_episodes for name in own.splits)


def _num_bytes(own: DatasetOnDisk) -> int:
    return sum(own.info.splits[name].num_bytes for name in own.splits)


def _asked(folder: DownloadedFolder, own: DatasetOnDisk) -> float:
    """Episodes that the mix asks for, as a share of each split: no whole number."""
    assert folder.lock is not None
    fractions = {spec.split: spec.fraction for spec in folder.lock.mix.datasets if spec.name == own.card.name}
    return sum(fractions.get(split.split, 0.0) * split.of_episodes for split in folder.locked(own))


def _read_words(folder: DownloadedFolder, own: DatasetOnDisk, read: _Reading) -> str:
    steps = count(sum(len(one.steps) for one in read.episodes), "step")
    total = _num_episodes(own)
    if read.num_records == total:
        return f"All {count(total, 'episode')} read, {steps} after the recipe."
    return (
        f"{read.num_records:,} of {count(total, 'episode')} read, {steps} after the recipe, drawn with seed "
        f"{folder.seed}."
    )


def _counts(own: DatasetOnDisk) -> tuple[Row, ...]:
    shards = sum(len(own.info.splits[name].shard_lengths) for name in own.splits)
    camera = own.cameras[0] if own.cameras else None
    return (
        Row("Episodes on disk", f"{_num_episodes(own):,}", "episodes"),
        Row("Shards", f"{shards:,}", "shards"),
        Row("Size", size(_num_bytes(own)), "bytes"),
        Row("Splits", ", ".join(own.splits)),
        Row("Camera shown", "none" if camera is None else f"{camera.role}: {'/'.join(camera.key)}"),
    )


def _shares(folder: DownloadedFolder, own: DatasetOnDisk) -> Iterator[Share]:
    splits = folder.locked(own)
    if not splits:
        return
    of, taken = sum(split.of_episodes for split in splits), sum(split.taken for split in splits)
    asked, left = _asked(folder, own), sum(split.episodes for split in splits)
    yield Share("asked for", asked / of, f"{asked / of:.2%} of {of:,} episodes")
    yield Share("taken: whole episodes, at least one", taken / of, f"{taken:,}, {taken / of:.2%}")
    if left != taken:
        yield Share("left by the mods", left / of, f"{left:,}, {left / of:.2%}")


def _dropped(folder: DownloadedFolder, own: DatasetOnDisk, read: _Reading) -> Iterator[Share]:
    splits = folder.locked(own)
    taken, left = sum(split.taken for split in splits), sum(split.episodes for split in splits)
    if taken > left:
        yield _part("episodes: by the mods", taken - left, taken)
    if read.lost[_RECIPE]:
        yield _part(f"steps read: {_RECIPE}", read.lost[_RECIPE], read.num_steps)
    if read.lost[_TOO_SHORT]:
        yield _part(f"episodes read: {_TOO_SHORT}", read.lost[_TOO_SHORT], read.num_records)
    if read.told[""]:
        yield _part(f"episodes read: {_NO_INSTRUCTION}", read.told[""], read.num_records)


def _part(label: str, number: int, of: int) -> Share:
    return Share(label, number / of, f"{number:,} of {of:,} ({number / of:.1%})")


def _problems(read: _Reading, dimensions: tuple[Dimension, ...]) -> Iterator[str]:
    if not read.episodes:
        yield "No episode could be read."
    still = [one.name for one in dimensions if one.is_constant]
    if still:
        yield f"Never changing in what was read: {', '.join(still)}."
    yield from (f"Not shown: {problem}" for problem in read.problems)
