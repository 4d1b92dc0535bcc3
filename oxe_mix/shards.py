"""Shards on their way: the task to fetch one, and the report of one that was fetched."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from oxe_mix.record_mods import RecordMods
from oxe_mix.source_file import CHUNK, SourceFile, source_file_from_json
from oxe_mix.target import Target
from oxe_mix.tfrecord import RecordScanner, TFRecordError

# Below a target: where shards wait, with a note each, until all of them are there.
PARTIAL = ".partial"


@dataclass(frozen=True, slots=True)
class ShardTask:
    """One source shard to fetch: what flows through Beam. Paths and addresses are text, small and
    picklable.
    """

    dataset: str
    split: str
    index: int  # place in the permutation, and so the number of the output shard
    urls: tuple[str, ...]  # the same file in every copy, in the order in which they are tried
    source_shard: int
    episodes: int  # to take
    of_episodes: int
    estimated_bytes: int
    expected: SourceFile  # what the source's listing, or the lock, says of the file
    out: str  # the target
    name: str  # below it: where the shard waits until all are there
    final: str  # below it: its file name in the dataset's folder, up to the number of shards
    mods: RecordMods = field(default_factory=RecordMods)
    prefix: str | None = None  # below the target: a file with the shard's first records, of an earlier mix

    @property
    def note(self) -> str:
        """Where the proof of a fetched shard is kept until the lock has it."""
        return f"{self.name}.json"

    @property
    def part(self) -> str:
        """What there is of it while it is fetched."""
        return f"{self.name}.part"

    @property
    def identity(self) -> dict[str, object]:
        """What makes an earlier run's work on this shard this shard."""
        return {
            "source_file": self.urls[0].rsplit("/", 1)[-1],
            "of_episodes": self.of_episodes,
            "taken": self.episodes,
            "mods": asdict(self.mods),
        }

    def note_of(self, report: ShardReport) -> bytes:
        """The note to leave about this shard."""
        return json.dumps({**self.identity, "boot": boot_id(), "report": asdict(report)}).encode()


@dataclass(frozen=True, slots=True)
class ShardReport:
    """A fetched shard: the file's size and checksum, and what the source said of its own."""

    dataset: str
    split: str
    index: int
    taken: int  # records taken at the source
    episodes: int  # records on disk, after mods
    num_bytes: int
    crc32c: str
    source: SourceFile
    fetched_bytes: int = 0  # by this run; 0: it was already there and proved
    retries: int = 0


def boot_id() -> str:
    """Changes whenever this machine starts; what was written before but never flushed may be gone."""
    file = Path("/proc/sys/kernel/random/boot_id")
    return file.read_text().strip() if file.exists() else ""


def read_note(task: ShardTask, text: bytes) -> tuple[ShardReport, bool] | None:
    """The report of a shard that an earlier run finished, and whether its file can be trusted unread.

    None when that run finished another shard, or the source has changed the file since.
    """
    try:
        note = json.loads(text)
        report, boot = report_from_json(note.pop("report")), note.pop("boot")
    except (ValueError, TypeError, KeyError, AttributeError):
        return None  # of another version of this program, or of nobody
    if note != json.loads(json.dumps(task.identity)) or report.source.differs(task.expected):
        return None
    return replace(report, fetched_bytes=0, retries=0), boot == boot_id()


def finished_before(task: ShardTask, target: Target) -> ShardReport | None:
    """The report of a shard that is there: of a run before the machine last started, or of this very task,
    which Beam may run again.
    """
    noted = read_note(task, target.read(task.note) or b"")
    if noted is None:
        return None
    report, trusted = noted
    if target.sizes(task.name.rpartition("/")[0]).get(task.name) != report.num_bytes:
        return None
    if trusted or target.durable:
        return report
    if not _still_whole(task, report, target):
        return None
    target.write(task.note, task.note_of(report))
    return report


def _still_whole(task: ShardTask, noted: ShardReport, target: Target) -> bool:
    """Read a finished shard again, after the machine has started anew."""
    scanner = RecordScanner(task.name)
    with target.open(task.name) as stream, suppress(TFRecordError):
        while chunk := stream.read(CHUNK):
            scanner.feed(chunk)
    return (scanner.end, f"{scanner.crc:08x}") == (noted.num_bytes, noted.crc32c)


def report_from_json(value: dict[str, Any]) -> ShardReport:
    """The inverse of `dataclasses.asdict`."""
    return ShardReport(**{**value, "source": source_file_from_json(value["source"])})
