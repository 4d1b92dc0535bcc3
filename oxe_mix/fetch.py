"""One shard, fetched and proved record by record: the whole work of one element of stage 1's Beam graph.

Bytes go into a `.part` file in the target's workspace. Whatever ends an attempt, what is there is read back
to its last whole record, and the next attempt asks the source for the bytes behind that. A finished shard
gets a note of what was proved about it, which the next run trusts until the lock has it.
"""

from __future__ import annotations

import fcntl
import functools
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

from oxe_mix.errors import UserError
from oxe_mix.files import read_json, write_json
from oxe_mix.shards import PARTIAL, ShardReport, ShardTask, finished_before
from oxe_mix.source_file import (
    CHUNK,
    Patience,
    SourceError,
    SourceFile,
    TransientError,
    crc32c_check,
    pause,
    scheme,
    source_file_from_json,
)
from oxe_mix.target import open_target
from oxe_mix.tfrecord import RecordScanner, TFRecordError, frame, read_records
from oxe_mix.transport import open_range
from oxe_mix.writing import writing

RETRIES_LOG = f"{PARTIAL}/retries.log"
# A shard that is taken in part is asked for in ranges: what its episodes should weigh and a little more.
_MARGIN = 1.05
_DAMAGE_RETRIES = 2
_LONGEST_WAIT_S = 5.0  # for another process that writes the same shard


def fetch_shard(task: ShardTask, patience: Patience) -> ShardReport:
    """Fetch one shard, prove every record on the way, apply the mods, and put it in its place to wait.

    Raises: SourceError when no copy of the shard can be had, TFRecordError when it is damaged, both with its
        address; TargetError when the target cannot be written.
    """
    target = open_target(task.out)
    folder, _, stem = task.part.rpartition("/")
    with target.workspace(folder) as workspace, writing(task.out), _alone(task, workspace / stem):
        if (finished := finished_before(task, target)) is not None:
            return finished
        work = _Work(task, patience, workspace / stem)
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


@contextmanager
def _alone(task: ShardTask, part: Path) -> Iterator[None]:
    """Keep a shard for one process: the workers of a killed command may outlive it for a moment."""
    until = time.monotonic() + _LONGEST_WAIT_S
    with part.with_suffix(".lock").open("w") as stream:
        while True:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > until:
                    raise UserError(
                        f"{task.out}/{task.name}: another process still writes this shard; "
                        "run again when that one has ended"
                    ) from error
                time.sleep(0.1)
        yield


class _Work:
    """The attempts at one shard."""

    def __init__(self, task: ShardTask, patience: Patience, file: Path) -> None:
        self._task = task
        self._patience = patience
        self._origin = file.with_suffix(".origin")
        self._known = self._expected()  # by address: what it says of the file that the part comes from
        self.file = file
        self.fetched_bytes = 0
        self.retries = 0

    @property
    def seen(self) -> SourceFile:
        """What the first address says of the file, and what others say that holds there, too."""
        files = [file if url == self._task.urls[0] else file.anywhere for url, file in self._known.items()]
        return functools.reduce(SourceFile.merged, files)

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
        tries = self._patience.retries
        words = "1 more try" if tries == 1 else f"{tries:,} more tries"
        return SourceError(f"{url}: not fetched: {error} ({words})")

    def _expected(self) -> dict[str, SourceFile]:
        return {self._task.urls[0]: self._task.expected}

    def _resume(self, url: str) -> RecordScanner:
        """What earlier attempts and runs left of the shard, up to its last whole record."""
        task, scanner = self._task, RecordScanner(url, self._task.episodes)
        if task.prefix is not None and not self.file.exists():
            with open_target(task.out).open(task.prefix) as old, self.file.open("wb") as new:
                shutil.copyfileobj(old, new, CHUNK)
        if not self.file.exists():
            return scanner
        # One that is not ours, or of another version of this program, counts as absent.
        with suppress(UserError, TypeError, AttributeError):
            said = read_json(self._origin, "what a source said of a file")
            self._known |= {at: source_file_from_json(file) for at, file in said.items()}
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
        was = _contradicted(self._known, url, file)
        if was is None:
            before, now = self._known.get(url), self._known.get(url, SourceFile()).merged(file)
            if now != before or not self._origin.exists():
                self._known[url] = now
                write_json(self._origin, {at: asdict(known) for at, known in self._known.items()})
            return
        self.clean_up()
        self._known = self._expected()
        if _contradicted(self._known, url, file) is not None:
            raise SourceError(
                f"{url}: changed at the source: was {was}, is {file}; run again, into another --out"
            )
        raise TransientError(f"changed at the source since the last run: was {was}, is {file}; starting anew")

    def _prove(self, url: str, scanner: RecordScanner, *, whole: bool) -> None:
        """All records asked for are there, and of a shard taken whole nothing else is."""
        says = f"dataset_info.json says {self._task.of_episodes}"
        if not scanner.full:
            raise TFRecordError(f"{url}: holds {scanner.num_records} records, {says}")
        if not whole:
            return
        size = self.seen.size
        if size is not None and size != scanner.end:
            raise TFRecordError(
                f"{url}: {size:,} bytes long, its {scanner.num_records} records come to "
                f"{scanner.end:,}; {says}"
            )
        crc = crc32c_check(scanner.crc)
        for said in self._known.values():
            if said.differs(SourceFile(check=crc)):
                self.clean_up()
                raise TFRecordError(
                    f"{url}: its bytes come to {crc}, the bucket says {said.check}; fetch it again"
                )

    def _log_retry(self, url: str, error: Exception) -> None:
        self.retries += 1
        open_target(self._task.out).append(RETRIES_LOG, f"{url}: {error}\n")


def _contradicted(known: dict[str, SourceFile], url: str, file: SourceFile) -> SourceFile | None:
    """What is known that a file at `url` does not agree with."""
    comparable = (said if at == url else said.anywhere for at, said in known.items())
    return next((said for said in comparable if file.differs(said)), None)


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
