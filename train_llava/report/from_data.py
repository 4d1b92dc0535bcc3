"""The pages of the datasets of a data folder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from convert.action_codec import encode
from convert.episodes import read_trajectory
from convert.plan import DatasetOnDisk
from convert.statistics import action_stats
from oxe_mix.errors import UserError
from oxe_mix.rlds import Episode
from oxe_mix.text import count, size
from train_llava.dimensions import dimension_names
from train_llava.report.data_folder import DownloadedFolder, num_bytes, num_episodes, num_shards
from train_llava.report.facts import card_facts, motion_of
from train_llava.report.figures import action_dimensions, length_histogram, reach, shortest_to_longest
from train_llava.report.pictures import Room, strips_of
from train_llava.report.records import drawn_records
from train_llava.report.sampling import MOST_STRIPES
from train_llava.report.values import DatasetPage, Dimension, Recorded, Row, Share, Told

_TOP = 12
_TOO_SHORT, _NO_INSTRUCTION = "too short for the recipe", "without an instruction"
_RECIPE = "lost to the recipe"


@dataclass(slots=True)
class _Reading:
    """What was read of one dataset."""

    episodes: list[Recorded] = field(default_factory=list)
    num_records: int = 0
    num_steps: int = 0  # of the records
    told: Counter[str] = field(default_factory=Counter)  # episodes by their first instruction
    lost: Counter[str] = field(default_factory=Counter)  # episodes, and steps to the recipe
    damage: dict[str, None] = field(default_factory=dict)  # a line for each, in order


def dataset_page(folder: DownloadedFolder, own: DatasetOnDisk, episodes: int, room: Room) -> DatasetPage:
    """The page of one dataset; so many of its episodes are shown, each in its room of the page.

    Nothing that is wrong with a record or a frame is raised: it is listed.
    """
    card, read = own.card, _read(folder, own, episodes)
    dimensions = _dimensions(own, read.episodes)
    motion = motion_of(card, card.action.dims)
    shown = [one for one in read.episodes[:episodes] if one.frames]
    strips = tuple(strips_of(shown, motion, room, read.damage))
    lengths = [len(one.steps) for one in read.episodes]
    has_gripper = not card.normalise_mask[-1]
    return DatasetPage(
        name=card.name,
        robot=card.robot,
        read=_read_words(folder, own, read),
        counts=_counts(own),
        shares=tuple(_shares(folder, own)),
        dropped=tuple(_dropped(folder, own, read)),
        dimensions=dimensions,
        statistics="Quantiles and the clipped share are of the episodes that were read, after the recipe. "
        "Becoming bins clips a movement at the quantiles, a gripper at 0 and 1.",
        grippers=tuple((one.id, one.actions[:, -1]) for one in read.episodes[:MOST_STRIPES])
        if has_gripper
        else (),
        lengths=length_histogram(lengths),
        length_words=f"Steps that the recipe keeps, of {count(len(lengths), 'episode')}"
        f"{shortest_to_longest(lengths)}.",
        told=_told(read),
        strips=strips,
        motion=motion,
        reach=reach(read.episodes, motion),
        facts=card_facts(card, own.spec.recipe),
        problems=tuple(_problems(read, dimensions)),
        damage=tuple(read.damage),
    )


def _read(folder: DownloadedFolder, own: DatasetOnDisk, shown: int) -> _Reading:
    """Episodes in the order in which they were drawn; the first so many keep their frames."""
    read = _Reading()
    for place, payload in drawn_records(own, shown, folder.seed):
        id_ = f"{own.card.name}/{place.split}/{place.shard}/{place.number}"
        if isinstance(payload, UserError):
            read.damage[str(payload)] = None
            continue
        try:
            one = _recorded(own, id_, payload, keeps_frames=len(read.episodes) < shown, read=read)
        except ValueError as error:
            read.damage[f"{id_}: {error}"] = None
            continue
        if one is not None:
            read.episodes.append(one)
    return read


def _recorded(
    own: DatasetOnDisk, id_: str, payload: bytes, *, keeps_frames: bool, read: _Reading
) -> Recorded | None:
    episode = Episode(payload, own.tree)
    trajectory = read_trajectory(episode, own.card, state=False)
    num = len(trajectory.actions)
    read.num_records, read.num_steps = read.num_records + 1, read.num_steps + episode.num_steps
    read.lost[_RECIPE] += episode.num_steps - num
    if not num:
        read.lost[_TOO_SHORT] += 1
        return None
    read.told[trajectory.first_instruction] += 1
    steps = trajectory.first_step + np.arange(num)
    views = [episode.slices(camera.key) for camera in own.cameras] if keeps_frames else []
    return Recorded(
        id=id_,
        instruction=trajectory.first_instruction,
        steps=steps,
        actions=trajectory.actions.astype(np.float64),
        frames=tuple(partial(_frames, views, step) for step in steps.tolist()) if views else (),
    )


def _frames(views: list[list[memoryview]], step: int) -> tuple[bytes, ...]:
    return tuple(bytes(view[step]) for view in views)


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


def _read_words(folder: DownloadedFolder, own: DatasetOnDisk, read: _Reading) -> str:
    steps = count(sum(len(one.steps) for one in read.episodes), "step")
    total = num_episodes(own)
    if read.num_records == total > 0:
        return f"All {count(total, 'episode')} read, {steps} after the recipe."
    return (
        f"{read.num_records:,} of {count(total, 'episode')} read, {steps} after the recipe, drawn with seed "
        f"{folder.seed}."
    )


def _counts(own: DatasetOnDisk) -> tuple[Row, ...]:
    cameras = ", ".join(f"{camera.role}: {'/'.join(camera.key)}" for camera in own.cameras)
    return (
        Row("Episodes on disk", f"{num_episodes(own):,}", "episodes"),
        Row("Shards", f"{num_shards(own):,}", "shards"),
        Row("Size", size(num_bytes(own)), "bytes"),
        Row("Splits", ", ".join(own.splits), "splits"),
        Row("Cameras, left to right", cameras or "none"),
    )


def _shares(folder: DownloadedFolder, own: DatasetOnDisk) -> Iterator[Share]:
    splits = folder.locked(own)
    if not splits:
        return
    of, taken = sum(split.of_episodes for split in splits), sum(split.taken for split in splits)
    asked, left = folder.asked(own), sum(split.episodes for split in splits)
    yield Share("asked for, after any --max-gb", asked / of, f"{asked / of:.2%} of {of:,} episodes")
    yield Share(
        "taken: whole episodes, at least one, before mods", taken / of, f"{taken:,}, {taken / of:.2%}"
    )
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
