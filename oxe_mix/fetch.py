"""One shard, fetched and proved record by record: the whole work of one element of stage 1's Beam graph.

A shard is fetched into DATA/.partial under its place in the permutation, with a note of what was proved about
it. A kill at any moment leaves files with notes, which the next run trusts, or temporary files, which it does
not.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import google_crc32c

from oxe_mix.errors import UserError
from oxe_mix.files import atomic_write, read_json, write_json
from oxe_mix.lock import Lock
from oxe_mix.source import file_size, open_stream, transport_errors
from oxe_mix.tfrecord import TFRecordError, read_records

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
        return max(
            final.parent.glob(f"{final.name}-of-*"), key=lambda file: file.stat().st_mtime, default=None
        )


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
    except transport_errors() as error:
        raise UserError(f"{task.url}: not fetched ({type(error).__name__}: {error})") from error
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
    proved = (note.pop("url"), note.pop("of_episodes"), note["episodes"], note["num_bytes"])
    if proved != (task.url, task.of_episodes, task.episodes, file.stat().st_size):
        return None
    return ShardReport(**{**note, "fetched": False})


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
        if shard is None or task.note.exists():
            continue
        # The same shard of the same layout: a source that was cut anew since has other names and lengths.
        before = (shard.source_file, shard.of_episodes)
        if before == (task.url.rsplit("/", 1)[-1], task.of_episodes):
            report = ShardReport(
                task.dataset, task.split, task.index, shard.episodes, shard.num_bytes, shard.crc32c
            )
            _write_note(task, report)


def _write_note(task: ShardTask, report: ShardReport) -> None:
    write_json(task.note, {"url": task.url, "of_episodes": task.of_episodes, **asdict(report)})
