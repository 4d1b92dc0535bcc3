"""`oxe-mix pack`: a folder of episodes as a user keeps it becomes a valid RLDS dataset, by the user's card.

The whole dataset appears at once: it is written beside its place and renamed. Which episodes share a shard
depends on the source alone, so the same source gives the same bytes, whatever was killed on the way.
"""

from __future__ import annotations

import shlex
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from oxe_mix.card_check import check_fits
from oxe_mix.cards import Card, load_card
from oxe_mix.errors import UserError
from oxe_mix.files import atomic_write, folder_lock, write_json
from oxe_mix.pack_card import Wanted, dotted, wanted_by
from oxe_mix.pack_csv import STEPS_FILE, Columns
from oxe_mix.pack_frames import FrameFormat, read_frame
from oxe_mix.pack_record import Layout, record, save_features
from oxe_mix.pack_report import NumbersReport
from oxe_mix.pack_source import EpisodeFolder, Recording, find_episodes, read_recording
from oxe_mix.progress import Goal, Sample, progress
from oxe_mix.rlds import FEATURES_FILE, INFO_FILE, DatasetInfo, Split, parse_dataset_info, parse_features
from oxe_mix.text import count, say, size, table
from oxe_mix.tfrecord import frame
from oxe_mix.writing import writing

_MODULE = "oxe_mix.pack"  # in dataset_info.json: who made this
_SCRATCH = ".pack"
_MAX_RECORD = (1 << 31) - 1  # bytes that protobuf puts into one message
_SHOWN = 20  # lines of problems; the rest are counted
_READERS = 8  # frames read and proved at the same time


@dataclass(frozen=True, slots=True)
class PackOptions:
    """The options of the command."""

    episodes: Path
    card: Path
    out: Path
    shard_mb: float


@dataclass(frozen=True, slots=True)
class _Shard:
    split: str
    episodes: tuple[EpisodeFolder, ...]


@dataclass(frozen=True, slots=True)
class _Plan:
    """What is to be written, known before anything is."""

    options: PackOptions
    card: Card
    layout: Layout
    first: EpisodeFolder  # its columns and frames are what the others are held to
    shards: list[_Shard]
    num_bytes: int

    @property
    def target(self) -> Path:
        """The folder of the dataset."""
        return self.options.out / self.card.name / self.card.version

    @property
    def num_episodes(self) -> int:
        return sum(len(shard.episodes) for shard in self.shards)


@dataclass(slots=True)
class _Written:
    """What is written so far: payload bytes and steps by split, and what the numbers look like."""

    numbers: NumbersReport
    num_bytes: dict[str, int]
    steps: dict[str, int]
    episodes: int = 0


def run_pack(options: PackOptions) -> int:
    """Pack a folder of episodes.

    Returns: the exit code, 0.
    Raises: UserError with a line for each thing that is wrong with the source, or for a target that holds
        something else.
    """
    start, plan = time.monotonic(), _plan(options)
    _refuse_other(plan.target)
    with folder_lock(options.out, "command"), writing(str(options.out)):
        scratch = options.out / _SCRATCH
        # What a killed run left.
        shutil.rmtree(scratch, ignore_errors=True)
        try:
            written = _write(plan, scratch / "new")
            _replace(plan.target, scratch)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    say(_summary(plan, written, time.monotonic() - start))
    return 0


def _plan(options: PackOptions) -> _Plan:
    """Read all of the source but its frames. Raises: UserError for all that is wrong with it."""
    if options.shard_mb <= 0:
        raise UserError(f"--shard-mb {options.shard_mb:g} is not above 0")
    card = load_card(options.card)
    wanted, episodes = wanted_by(card, options.card), find_episodes(options.episodes)
    first = episodes[0]
    own = read_recording(first.path, wanted, None)
    formats = {camera: read_frame(files[0])[1] for camera, files in own.frames.items()}
    sizes, problems, seen = dict[str, int](), list[str](), Sample(0)
    with progress(Goal("pack: read", "episode", len(episodes)), lambda: seen):
        for number, episode in enumerate(episodes):
            try:
                sizes[episode.name] = _size(episode, wanted, (first.path / STEPS_FILE, own.columns))
            except UserError as error:
                problems += str(error).splitlines()
            seen = Sample(number + 1)
    _refuse(problems)
    shards = list(_shards(episodes, sizes, options.shard_mb * 1e6))
    return _Plan(options, card, Layout(wanted, own.columns, formats), first, shards, sum(sizes.values()))


def _size(episode: EpisodeFolder, wanted: Wanted, first: tuple[Path, Columns]) -> int:
    num_bytes = read_recording(episode.path, wanted, first).num_bytes
    if num_bytes > _MAX_RECORD:
        raise UserError(
            f"{episode.path}: {size(num_bytes)}, a record holds {size(_MAX_RECORD)}; cut it in two"
        )
    return num_bytes


def _shards(episodes: list[EpisodeFolder], sizes: dict[str, int], limit: float) -> Iterator[_Shard]:
    """Episodes in their order, a new shard where the next one would go over `limit` bytes."""
    own: list[EpisodeFolder] = []
    for episode in episodes:
        total = sum(sizes[one.name] for one in own) + sizes[episode.name]
        if own and (episode.split != own[0].split or total > limit):
            yield _Shard(own[0].split, tuple(own))
            own = []
        own.append(episode)
    yield _Shard(own[0].split, tuple(own))


def _write(plan: _Plan, folder: Path) -> _Written:
    """Write the dataset into a folder, dataset_info.json last.

    Raises: UserError for frames that are wrong, and for a card that does not fit the columns.
    """
    folder.mkdir(parents=True)
    save_features(plan.layout, folder)
    tree = parse_features((folder / FEATURES_FILE).read_text(), FEATURES_FILE)
    check_fits(plan.card, plan.options.card, tree, str(plan.first.path / STEPS_FILE))
    done = _Written(NumbersReport(plan.layout.columns, plan.card.action_kind), {}, {})
    goal, problems = Goal("pack", "episode", plan.num_episodes, plan.num_bytes), list[str]()
    info = _info(plan.card)
    with (
        progress(goal, lambda: Sample(done.episodes, sum(done.num_bytes.values()))),
        ThreadPoolExecutor(_READERS) as pool,
    ):
        for split in dict.fromkeys(shard.split for shard in plan.shards):
            own = [shard for shard in plan.shards if shard.split == split]
            done.num_bytes[split] = done.steps[split] = 0
            for index, shard in enumerate(own):
                with atomic_write(folder / info.shard_file(split, index, len(own))) as stream:
                    for episode in shard.episodes:
                        try:
                            stream.write(frame(_payload(episode, plan, done, pool)))
                        except UserError as error:
                            problems += str(error).splitlines()
    _refuse(problems)
    write_json(folder / INFO_FILE, info.with_splits(_splits(plan, done)))
    return done


def _payload(episode: EpisodeFolder, plan: _Plan, done: _Written, pool: ThreadPoolExecutor) -> bytes:
    """One episode's record, booked in `done`."""
    layout = plan.layout
    own = read_recording(episode.path, layout.wanted, (plan.first.path / STEPS_FILE, layout.columns))
    payload = record(own, _frames(own, layout.formats, pool), episode.name, layout.wanted.language)
    done.numbers.add(own.steps)
    done.num_bytes[episode.split] += len(payload)
    done.steps[episode.split] += own.steps.num_steps
    done.episodes += 1
    return payload


def _frames(
    own: Recording, formats: dict[str, FrameFormat], pool: ThreadPoolExecutor
) -> dict[str, list[bytes]]:
    """The frames of an episode by camera.

    Raises: UserError, a line for the first wrong one of each camera.
    """
    frames, problems = dict[str, list[bytes]](), list[str]()
    for camera, files in own.frames.items():
        check = _checked(formats[camera])
        try:
            frames[camera] = list(pool.map(check, files))
        except UserError as error:
            problems.append(str(error))
    _refuse(problems)
    return frames


def _checked(expected: FrameFormat) -> Callable[[Path], bytes]:
    def check(file: Path) -> bytes:
        data, form = read_frame(file)
        if form != expected:
            raise UserError(f"{file}: {form}, but this camera's first frame is {expected}")
        return data

    return check


def _refuse(problems: list[str]) -> None:
    if problems:
        left = len(problems) - _SHOWN
        more = [f"and {count(left, 'problem')} more; mend these first"] if left > 0 else []
        raise UserError("\n".join([*problems[:_SHOWN], *more]))


def _refuse_other(target: Path) -> None:
    """Only what an earlier run wrote is replaced."""
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    file = target / INFO_FILE
    if target.is_dir() and file.exists():
        info = parse_dataset_info(file.read_text(), str(file))
        names = {INFO_FILE, FEATURES_FILE}
        for split in info.splits.values():
            num = len(split.shard_lengths)
            names |= {info.shard_file(split.name, i, num) for i in range(num)}
        if info.raw.get("moduleName") == _MODULE and {path.name for path in target.iterdir()} <= names:
            return
    raise UserError(f"{target}: holds something that pack did not write; choose another --out or version")


def _replace(target: Path, scratch: Path) -> None:
    """Put the new dataset into its place; the old one goes first, whole."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        target.rename(scratch / "old")
    (scratch / "new").rename(target)


def _splits(plan: _Plan, done: _Written) -> list[Split]:
    lengths = {
        split: tuple(len(shard.episodes) for shard in plan.shards if shard.split == split)
        for split in done.num_bytes
    }
    return [Split(split, lengths[split], num_bytes) for split, num_bytes in done.num_bytes.items()]


def _info(card: Card) -> DatasetInfo:
    raw = {
        "citation": "",
        "description": f"{card.robot}, packed from a folder of episodes by oxe-mix pack.",
        "fileFormat": "tfrecord",
        "moduleName": _MODULE,
        "name": card.name,
        "releaseNotes": {card.version: "Packed."},
        "version": card.version,
    }
    return DatasetInfo(card.name, card.version, {}, raw)


def _summary(plan: _Plan, done: _Written, seconds: float) -> str:
    options, layout = plan.options, plan.layout
    splits = [
        (
            s.name,
            f"{s.num_episodes:,}",
            f"{done.steps[s.name]:,}",
            f"{len(s.shard_lengths):,}",
            size(s.num_bytes),
        )
        for s in _splits(plan, done)
    ]
    cameras = ", ".join(f"{camera} {form}" for camera, form in layout.formats.items())
    unused = ", ".join(filter(None, layout.columns.unused)) or "none"
    steps = sum(done.steps.values())
    return "\n".join(
        [
            f"{done.numbers}\n\n{table(('split', 'episodes', 'steps', 'shards', 'size'), splits)}\n",
            f"cameras: {cameras}; instruction: {dotted(layout.wanted.language)}; columns left out: {unused}",
            f"asked {count(plan.num_episodes, 'episode')}, packed {done.episodes:,}: {count(steps, 'step')}, "
            f"{size(sum(done.num_bytes.values()))}, {seconds:.1f} s",
            f"result: {plan.target}",
            f"next: oxe-mix convert --data {shlex.quote(str(options.out))} "
            f"--cards {shlex.quote(str(options.card.parent))} --out llava",
        ]
    )
