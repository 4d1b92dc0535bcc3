"""One shard, fetched and proved record by record: the whole work of one element of stage 1's Beam graph.

Bytes go into a `.part` file in the target's workspace. Whatever ends an attempt, what is there is read back
to its last whole record, and the next attempt asks the source for the bytes behind that. A finished shard
gets a note of what was proved about it, which the next run trusts until the lock has it.
"""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from oxe_mix.errors import UserError
from oxe_mix.files import read_json, write_json
from oxe_mix.shards import PARTIAL, ShardReport, ShardTask
from oxe_mix.source_file import (
    CHUNK,
    Patience,
    SourceError,
    SourceFile,
    TransientError,
    crc32c_check,
    pause,
    scheme,
)
from oxe_mix.target import open_target
from oxe_mix.text import count
from oxe_mix.tfrecord import RecordScanner, TFRecordError, frame, read_records
from oxe_mix.transport import open_range
from oxe_mix.writing import writing

RETRIES_LOG = f"{PARTIAL}/retries.log"
# A shard that is taken in part is asked for in ranges: what its episodes should weigh and a little more.
_MARGIN = 1.05
_DAMAGE_RETRIES = 2


def fetch_shard(task: ShardTask, patience: Patience) -> ShardReport:
    """Fetch one shard, prove every record on the way, apply the mods, and put it in its place to wait.

    Raises: SourceError when no copy of the shard can be had, TFRecordError when it is damaged, both with its
        address; TargetError when the target cannot be written.
    """
    target = open_target(task.out)
    if task.noted is not None and _still_whole(task, task.noted):
        target.write(task.note, task.note_of(task.noted))
        return task.noted
    folder, _, stem = task.name.rpartition("/")
    with target.workspace(folder) as workspace, writing(task.out):
        work = _Work(task, patience, workspace / f"{stem}.part")
        scanner = work.fetch()
        file = work.file
        if task.mods:
            file = work.file.with_suffix(".modded")
            scanner = _apply_mods(task, work.file, file)
        report = ShardReport(
            dataset=task.dataset,
            split=task.split,
            index=task.index,
            taken=task.episodes,
            episodes=scanner.num_records,
            num_bytes=scanner.end,
            crc32c=f"{scanner.crc:08x}",
            source=work.seen,
            fetched_bytes=work.fetched_bytes,
            retries=work.retries,
        )
        # The note first: a kill between the two leaves a whole part, which costs one reading to prove again.
        target.write(task.note, task.note_of(report))
        target.place(file, task.name)
        work.clean_up()
    return report


def _still_whole(task: ShardTask, noted: ShardReport) -> bool:
    """Read a finished shard again, after the machine has started anew."""
    scanner = RecordScanner(task.name)
    with open_target(task.out).open(task.name) as stream, suppress(TFRecordError):
        while chunk := stream.read(CHUNK):
            scanner.feed(chunk)
    return (scanner.end, f"{scanner.crc:08x}") == (noted.num_bytes, noted.crc32c)


class _Work:
    """The attempts at one shard. `seen` is what the source says of the file that the part comes from."""

    def __init__(self, task: ShardTask, patience: Patience, file: Path) -> None:
        self._task = task
        self._patience = patience
        self._origin = file.with_suffix(".origin")
        self.file = file
        self.seen = task.expected
        self.fetched_bytes = 0
        self.retries = 0

    def fetch(self) -> RecordScanner:
        """The whole of what was asked for, from the first copy that has it."""
        problems: list[UserError] = []
        for url in self._task.urls:
            try:
                return self._fetch_from(url)
            except (SourceError, TFRecordError) as error:
                problems.append(error)
        if len(problems) == 1:
            raise problems[0]
        raise SourceError("; ".join(map(str, problems)))

    def clean_up(self) -> None:
        """Remove what only unfinished shards need."""
        self.file.unlink(missing_ok=True)
        self._origin.unlink(missing_ok=True)

    def _fetch_from(self, url: str) -> RecordScanner:
        failures, reached = 0, -1
        while True:
            scanner = self._resume(url)
            failures, reached = (0 if scanner.end > reached else failures), scanner.end
            try:
                self._attempt(url, scanner)
                return scanner
            except (TransientError, TFRecordError) as error:
                failures += 1
                if failures > self._tries(url, error):
                    raise self._given_up(url, error) from error
                self._log_retry(url, error)
                pause(failures, error if isinstance(error, TransientError) else TransientError(str(error)))

    def _tries(self, url: str, error: Exception) -> int:
        if isinstance(error, TransientError):
            return self._patience.retries
        # Damage on the way passes, damage at the source stays.
        return 0 if scheme(url) == "file" else min(_DAMAGE_RETRIES, self._patience.retries)

    def _given_up(self, url: str, error: Exception) -> UserError:
        if isinstance(error, UserError):
            return error
        return SourceError(f"{url}: not fetched: {error} ({count(self._patience.retries, 'more try')})")

    def _resume(self, url: str) -> RecordScanner:
        """What earlier attempts and runs left of the shard, up to its last whole record."""
        task, scanner = self._task, RecordScanner(url, self._task.episodes)
        if task.prefix is not None and not self.file.exists():
            with open_target(task.out).open(task.prefix) as old, self.file.open("wb") as new:
                shutil.copyfileobj(old, new, CHUNK)
        if not self.file.exists():
            return scanner
        if self._origin.exists():
            self.seen = SourceFile(**read_json(self._origin, "what a source said of a file"))
        with self.file.open("rb") as stream, suppress(TFRecordError):
            while not scanner.full and (chunk := stream.read(CHUNK)):
                scanner.feed(chunk)
        scanner.rewind()
        os.truncate(self.file, scanner.end)
        return scanner

    def _attempt(self, url: str, scanner: RecordScanner) -> None:
        """Fetch from where the part ends to the last record asked for.

        Raises: TransientError or TFRecordError; the part is then to be resumed.
        """
        whole = self._task.episodes == self._task.of_episodes
        with self.file.open("ab") as out:
            while not scanner.full:
                start = out.tell()
                end = None if whole else self._range_end(start, scanner)
                with open_range(url, start, end, self._patience.stall_s) as stream:
                    self._prove_same(url, stream.file)
                    for chunk in stream.chunks:
                        # Written before it is proved: what is good of it is kept when the rest is not.
                        out.write(chunk)
                        used = scanner.feed(chunk)
                        self.fetched_bytes += used
                        if used < len(chunk):
                            out.truncate(out.tell() - len(chunk) + used)
                        if scanner.full and (used < len(chunk) or not whole):
                            break
                if out.tell() == start:
                    break
        scanner.close()
        self._prove(url, scanner, whole=whole)

    def _range_end(self, start: int, scanner: RecordScanner) -> int:
        """Where the next range of a shard that is taken in part ends."""
        task = self._task
        left = task.estimated_bytes * (task.episodes - scanner.num_records) / task.episodes
        return start + max(CHUNK, round(left * _MARGIN))

    def _prove_same(self, url: str, file: SourceFile) -> None:
        """All attempts and runs must see one and the same file."""
        if not file.differs(self.seen):
            self.seen = SourceFile(
                file.size if self.seen.size is None else self.seen.size, self.seen.check or file.check
            )
            if not self._origin.exists():
                write_json(self._origin, asdict(self.seen))
            return
        was, now = self.seen, file
        self.clean_up()
        self.seen = self._task.expected
        if now.differs(self._task.expected):
            raise SourceError(
                f"{url}: changed at the source: was {was}, is {now}; run again, into another --out"
            )
        raise TransientError(f"changed at the source since the last run: was {was}, is {now}; starting anew")

    def _prove(self, url: str, scanner: RecordScanner, *, whole: bool) -> None:
        """All records asked for are there, and of a shard taken whole nothing else is."""
        says = f"dataset_info.json says {self._task.of_episodes}"
        if not scanner.full:
            raise TFRecordError(f"{url}: holds {scanner.num_records} records, {says}")
        if not whole:
            return
        seen = self.seen
        if seen.size is not None and seen.size != scanner.end:
            raise TFRecordError(
                f"{url}: {seen.size:,} bytes long, its {scanner.num_records} records come to "
                f"{scanner.end:,}; {says}"
            )
        crc = crc32c_check(scanner.crc)
        if seen.differs(SourceFile(check=crc)):
            self.clean_up()
            raise TFRecordError(
                f"{url}: its bytes come to {crc}, the bucket says {seen.check}; fetch it again"
            )

    def _log_retry(self, url: str, error: Exception) -> None:
        self.retries += 1
        open_target(self._task.out).append(RETRIES_LOG, f"{url}: {error}\n")


def _apply_mods(task: ShardTask, raw: Path, modded: Path) -> RecordScanner:
    """Write what the mods leave of a raw shard; returns a scanner that saw the result."""
    scanner = RecordScanner(str(modded))
    with raw.open("rb") as stream, modded.open("wb") as out:
        for number, record in enumerate(read_records(stream, str(raw))):
            try:
                payload = task.mods.apply(record.payload)
            except ValueError as error:
                raise TFRecordError(f"{task.urls[0]}: record {number}: {error}") from error
            if payload is not None:
                framed = record.framed if payload is record.payload else frame(payload)
                scanner.feed(framed)
                out.write(framed)
    return scanner
