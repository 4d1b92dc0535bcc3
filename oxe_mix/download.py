"""Stage 1: plan which records of which shards a mix needs, fetch each with proof, and leave valid RLDS
behind.

Each shard is fetched into DATA/.partial under its place in the permutation, with a note of what was proved
about it. Only when all are there do they get their final names, then dataset_info.json is rewritten, and the
lock comes last. A kill at any moment leaves files with notes, which the next run trusts, or temporary files,
which it does not. When a finished download grows, its shards keep their names until that moment; only the
`-of-n` in them changes.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import google_crc32c

from oxe_mix.cards import Card, Cards
from oxe_mix.errors import UserError
from oxe_mix.files import atomic_write, read_json, write_json
from oxe_mix.lock import Lock, LockedDataset, LockedShard, LockedSplit
from oxe_mix.mix import DatasetSpec, Mix
from oxe_mix.rlds import FEATURES_FILE, INFO_FILE, Split
from oxe_mix.selection import Pick, select
from oxe_mix.source import SourceDataset, file_size, open_dataset, open_stream
from oxe_mix.tfrecord import FRAME_BYTES, TFRecordError, read_records

PARTIAL = ".partial"


@dataclass(frozen=True, slots=True)
class ShardTask:
    """One source shard to fetch: what flows through Beam. Paths and addresses are text, small and
    picklable.
    """

    dataset: str
    split: str
    index: int  # place in the permutation, and so the number of the output shard
    url: str
    source_shard: int
    episodes: int
    of_episodes: int
    target: str  # where it is fetched to
    final: str  # its file name in the dataset's folder, up to the number of shards

    @property
    def note(self) -> Path:
        """Where the proof of a fetched shard is kept until the lock has it."""
        return Path(f"{self.target}.json")

    def on_disk(self) -> Path | None:
        """The newest whole file of this shard: just fetched, or already named as a shard of 3, of 5, …"""
        if Path(self.target).exists():
            return Path(self.target)
        final = Path(self.final)
        return next(iter(sorted(final.parent.glob(f"{final.name}-of-*"))), None)


@dataclass(frozen=True, slots=True)
class ShardReport:
    """A fetched shard: the file's size and checksum."""

    dataset: str
    split: str
    index: int
    episodes: int
    num_bytes: int
    crc32c: str
    fetched: bool = True  # False: it was already there and proved


@dataclass(frozen=True, slots=True)
class SplitPlan:
    """What a mix asks of one split, resolved against the source's metadata."""

    spec: DatasetSpec
    source: SourceDataset
    picks: tuple[Pick, ...]

    @property
    def split(self) -> Split:
        """The split at the source."""
        return self.source.info.splits[self.spec.split]

    @property
    def episodes(self) -> int:
        """Episodes to keep."""
        return sum(pick.num_episodes for pick in self.picks)

    @property
    def estimated_bytes(self) -> int:
        """Payload bytes to expect, at the split's mean episode size."""
        return round(self.split.num_bytes * self.episodes / self.split.num_episodes)

    def file(self, index: int, num_shards: int) -> str:
        """The name of output shard `index` when the split has `num_shards`."""
        return self.source.info.shard_file(self.spec.split, index, num_shards)

    def source_file(self, pick: Pick) -> str:
        """The name of a pick's shard at the source."""
        return self.source.info.shard_file(self.spec.split, pick.source_shard, len(self.split.shard_lengths))


def plan_download(mix: Mix, cards: Cards) -> list[SplitPlan]:
    """Read the metadata of every dataset of a mix and select its records; no data is read.

    Raises: UserError for a dataset, version or split that is not there, and for a card that does not fit the
    data.
    """
    return [_plan_split(mix, spec, cards) for spec in mix.datasets]


def _plan_split(mix: Mix, spec: DatasetSpec, cards: Cards) -> SplitPlan:
    card: Card = cards.get(spec.name)
    source = open_dataset(mix.source_of(spec), card, spec.version)
    cards.check_against(card, source.features, f"{source.folder}/{FEATURES_FILE}")
    split = source.info.splits.get(spec.split)
    if split is None:
        known = ", ".join(source.info.splits)
        raise UserError(
            f"{spec.name} {spec.version}: no split {spec.split!r} at {source.folder}; it has: {known}"
        )
    try:
        return SplitPlan(spec, source, tuple(select(source.info, split, spec.fraction, mix.seed)))
    except ValueError as error:
        raise UserError(str(error)) from error


def shard_tasks(plans: list[SplitPlan], data: Path) -> list[ShardTask]:
    """One task per shard, in the order of the mix."""
    return [
        ShardTask(
            dataset=plan.spec.name,
            split=plan.spec.split,
            index=index,
            url=f"{plan.source.folder}/{plan.source_file(pick)}",
            source_shard=pick.source_shard,
            episodes=pick.num_episodes,
            of_episodes=pick.of_episodes,
            target=str(
                data
                / PARTIAL
                / plan.spec.name
                / plan.spec.version
                / plan.spec.split
                / f"{index:05d}.tfrecord"
            ),
            final=str(_folder(plan, data) / plan.file(index, 0).removesuffix("-of-00000")),
        )
        for plan in plans
        for index, pick in enumerate(plan.picks)
    ]


def fetch_shard(task: ShardTask) -> ShardReport:
    """Fetch one shard, prove every record on the way, and put it in place under its temporary home.

    A shard that an earlier run finished is not fetched again.

    Raises: UserError when the shard is not there or is damaged, with its address, the record and the offset.
    """
    target = Path(task.target)
    done = _finished(task)
    if done:
        return done
    crc, num_bytes, episodes = google_crc32c.Checksum(), 0, 0
    try:
        with open_stream(task.url) as stream, atomic_write(target) as out:
            for record in read_records(stream, task.url):
                out.write(record.framed)
                crc.update(record.framed)
                num_bytes += len(record.framed)
                episodes += 1
                # Of a shard that is taken in part nothing beyond the last record asked for is read.
                if episodes == task.episodes < task.of_episodes:
                    break
            _prove_count(task, episodes, num_bytes)
    except FileNotFoundError as error:
        raise UserError(
            f"{task.url}: not there, though dataset_info.json lists it; the source is not complete"
        ) from error
    report = ShardReport(task.dataset, task.split, task.index, episodes, num_bytes, crc.hexdigest().decode())
    _write_note(task, report)
    return report


def _prove_count(task: ShardTask, episodes: int, num_bytes: int) -> None:
    if episodes != task.episodes:
        raise TFRecordError(
            f"{task.url}: holds {episodes} records, dataset_info.json says {task.of_episodes}"
        )
    if task.episodes == task.of_episodes and (size := file_size(task.url)) != num_bytes:
        raise TFRecordError(
            f"{task.url}: {size:,} bytes long, its records come to {num_bytes:,}; fetch it again"
        )


def _finished(task: ShardTask) -> ShardReport | None:
    """The report of a shard that is already on disk and proved, None when it must be fetched."""
    file = task.on_disk()
    if file is None or not task.note.exists():
        return None
    note = read_json(task.note, "the note of a fetched shard")
    same = (note.pop("url"), note.pop("of_episodes"), note["episodes"]) == (
        task.url,
        task.of_episodes,
        task.episodes,
    )
    return (
        ShardReport(**{**note, "fetched": False})
        if same and file.stat().st_size == note["num_bytes"]
        else None
    )


def note_locked(tasks: list[ShardTask], lock: Lock) -> None:
    """Note what a finished download already holds, so that growing or mending it fetches only the
    difference.
    """
    locked = {
        (d.name, s.split, i): shard
        for d in lock.datasets
        for s in d.splits
        for i, shard in enumerate(s.shards)
    }
    for task in tasks:
        shard = locked.get((task.dataset, task.split, task.index))
        if shard is not None and shard.source_shard == task.source_shard and not task.note.exists():
            report = ShardReport(
                task.dataset, task.split, task.index, shard.episodes, shard.num_bytes, shard.crc32c
            )
            _write_note(task, report)


def _write_note(task: ShardTask, report: ShardReport) -> None:
    write_json(task.note, {"url": task.url, "of_episodes": task.of_episodes, **asdict(report)})


def finish_download(
    mix: Mix, plans: list[SplitPlan], tasks: list[ShardTask], reports: list[ShardReport], data: Path
) -> Lock:
    """Give all shards their final names, rewrite each dataset_info.json, and return the lock to write.

    Safe to repeat: whatever part of it was done before a kill is found done.
    """
    report_of = {(r.dataset, r.split, r.index): r for r in reports}
    fetched = {(t.dataset, t.split, t.index): (t, report_of[t.dataset, t.split, t.index]) for t in tasks}
    datasets = []
    for name in dict.fromkeys(plan.spec.name for plan in plans):
        own = [plan for plan in plans if plan.spec.name == name]
        folder = _folder(own[0], data)
        folder.mkdir(parents=True, exist_ok=True)
        splits = [_finish_split(plan, fetched, data) for plan in own]
        with atomic_write(folder / FEATURES_FILE) as stream:
            stream.write(own[0].source.features_text.encode())
        write_json(
            folder / INFO_FILE, own[0].source.info.with_splits([_info_split(split) for split in splits])
        )
        datasets.append(
            LockedDataset(
                name=name,
                version=own[0].spec.version,
                folder=str(folder.relative_to(data)),
                source=own[0].source.folder,
                splits=tuple(splits),
            )
        )
    return Lock(complete=True, mix=mix, datasets=tuple(datasets))


def _finish_split(
    plan: SplitPlan, fetched: dict[tuple[str, str, int], tuple[ShardTask, ShardReport]], data: Path
) -> LockedSplit:
    shards = []
    for index, pick in enumerate(plan.picks):
        task, report = fetched[plan.spec.name, plan.spec.split, index]
        file = plan.file(index, len(plan.picks))
        _rename(task, _folder(plan, data) / file)
        shards.append(
            LockedShard(
                file=file,
                source_file=plan.source_file(pick),
                source_shard=pick.source_shard,
                episodes=pick.num_episodes,
                of_episodes=pick.of_episodes,
                num_bytes=report.num_bytes,
                crc32c=report.crc32c,
            )
        )
    return LockedSplit(
        split=plan.spec.split,
        episodes=plan.episodes,
        of_episodes=plan.split.num_episodes,
        shards=tuple(shards),
    )


def _rename(task: ShardTask, final: Path) -> None:
    newest = task.on_disk()
    assert newest is not None, f"{task.target} was fetched and is gone"
    if newest != final:
        newest.replace(final)
    # A grown shard leaves its shorter self behind under the old name.
    for stale in final.parent.glob(f"{Path(task.final).name}-of-*"):
        if stale != final:
            stale.unlink()


def _info_split(split: LockedSplit) -> Split:
    payload = sum(shard.num_bytes - FRAME_BYTES * shard.episodes for shard in split.shards)
    return Split(split.split, tuple(shard.episodes for shard in split.shards), payload)


def locked_files(lock: Lock, data: Path) -> Iterator[tuple[Path, LockedShard]]:
    """Every file that a lock lists, with what it says of it."""
    for dataset in lock.datasets:
        for split in dataset.splits:
            for shard in split.shards:
                yield data / dataset.folder / shard.file, shard


def clean_up(data: Path) -> None:
    """Remove the temporary home of a finished download."""
    shutil.rmtree(data / PARTIAL, ignore_errors=True)


def _folder(plan: SplitPlan, data: Path) -> Path:
    return data / plan.spec.name / plan.spec.version
