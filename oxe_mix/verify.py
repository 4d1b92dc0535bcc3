"""`oxe-mix verify`: is what lies in a data folder what it says it is? Every byte is read, nothing is changed.

Works on any folder of RLDS datasets; one with a lock is held to the lock as well.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

from oxe_mix.card_check import check_fits
from oxe_mix.cards import Cards, load_cards
from oxe_mix.errors import UserError
from oxe_mix.finish import locked_files
from oxe_mix.lock import LOCK_FILE, Lock, LockedShard, parse_lock
from oxe_mix.progress import Goal, Sample, progress
from oxe_mix.rlds import FEATURES_FILE, INFO_FILE, SAFE_NAME, DatasetInfo, parse_dataset_info, parse_features
from oxe_mix.source_file import CHUNK
from oxe_mix.target import Target, next_step, open_target
from oxe_mix.text import complain, count, say, size, table
from oxe_mix.tfrecord import FRAME_BYTES, RecordScanner


@dataclass(slots=True)
class DatasetCheck:
    """What was found in one dataset's folder."""

    folder: str
    shards: int = 0
    records: int = 0
    num_bytes: int = 0
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Shard:
    """A file to read, and what dataset_info.json and the lock say of it."""

    folder: str
    split: str
    name: str
    records: int
    locked: LockedShard | None


def run_verify(data: str, cards_folder: Path | None, jobs: int, *, as_json: bool) -> int:
    """Read and check a data folder.

    Returns: the exit code: 0 when all is well, 1 when something is wrong.
    Raises: UserError when there is nothing to check.
    """
    start, target = time.monotonic(), open_target(data, follow_links=True)
    lock = parse_lock(target.read(LOCK_FILE), f"{data}/{LOCK_FILE}")
    checks = verify(target, lock, load_cards(cards_folder), jobs, as_json=as_json)
    problems = [problem for check in checks for problem in check.problems]
    if lock is not None and not lock.complete:
        problems.insert(0, f"{data}/{LOCK_FILE}: the download is not finished; run oxe-mix download again")
    problems += [f"{data}/{name}: {why}" for name, why in target.closed_folders().items()]
    if as_json:
        say(json.dumps({"event": "verified", "problems": problems, "datasets": [asdict(c) for c in checks]}))
        return int(bool(problems))
    say(_report(checks, locked=lock is not None))
    if problems:
        complain("\n".join(problems))
    records = sum(check.records for check in checks)
    read = size(sum(check.num_bytes for check in checks))
    say(
        f"{count(records, 'record')} in {count(sum(check.shards for check in checks), 'shard')}, {read}, "
        f"{count(len(problems), 'problem')}, {time.monotonic() - start:.1f} s"
    )
    mend = "remove the files named above and run oxe-mix download again: it fetches only what is missing"
    say(f"next: {mend if problems else next_step(data)}")
    return int(bool(problems))


def verify(
    target: Target, lock: Lock | None, cards: Cards, jobs: int, *, as_json: bool = False
) -> list[DatasetCheck]:
    """Check every dataset of a data folder; each problem is a line with its place.

    Raises: UserError when the folder holds no dataset.
    """
    sizes = target.sizes("")
    checks, shards = _folders(target, lock, sizes), list[_Shard]()
    for folder, check in checks.items():
        if _is_dataset(check):
            inside = {n: b for n, b in sizes.items() if n.startswith(f"{folder}/")}
            shards += _look_at(check, target, lock, cards, inside)
    seen, guard = Sample(0), threading.Lock()

    def read(shard: _Shard) -> None:
        nonlocal seen
        problem, scanner = _read(shard, target)
        check = checks[shard.folder]
        with guard:
            check.shards += 1
            check.records += scanner.num_records
            check.num_bytes += scanner.end
            check.problems += problem
            seen = Sample(seen.done + 1, seen.num_bytes + scanner.end)

    total = sum(sizes.get(f"{shard.folder}/{shard.name}", 0) for shard in shards)
    goal = Goal("verify", "shard", len(shards), total)
    with progress(goal, lambda: seen, "json" if as_json else "auto"), ThreadPoolExecutor(jobs) as pool:
        list(pool.map(read, shards))
    for check in checks.values():
        check.problems.sort()
    return list(checks.values())


def _folders(target: Target, lock: Lock | None, sizes: dict[str, int]) -> dict[str, DatasetCheck]:
    """What lies in a data folder: datasets, and folders that look like one and are none, with the reason.

    Raises: UserError when there is neither, unless a download is unfinished or something cannot be read.
    """
    found = {name.rpartition("/")[0] for name in sizes if f"/{name}".endswith(f"/{INFO_FILE}")}
    locked = [dataset.folder for dataset in lock.datasets] if lock else []
    checks = {folder: DatasetCheck(folder) for folder in sorted({*found, *locked} - {""})}
    for folder, check in checks.items():
        parts = folder.split("/")
        if any(part.startswith(".") for part in parts):
            check.notes.append("hidden, not read")
        elif not all(map(SAFE_NAME.fullmatch, parts)):
            words = "no name for a dataset; only letters, digits, '-', '_' and '.'"
            check.problems.append(f"{target.root}/{folder}: {words}")
        elif len(parts) == 1:
            check.notes.append("not NAME/VERSION, not read")
    unfinished = lock is not None and not lock.complete
    if unfinished or target.closed_folders() or any(c.problems or _is_dataset(c) for c in checks.values()):
        return checks
    above = {1: "; it is the folder of one dataset, give the one above", 0: "; give the folder two above"}
    depth = min((len(f.split("/")) if f else 0 for f in found if not f.startswith(".")), default=2)
    words = above.get(depth, "; give a folder of RLDS datasets")
    raise UserError(f"{target.root}: no NAME/VERSION/{INFO_FILE} here{words}")


def _is_dataset(check: DatasetCheck) -> bool:
    return not check.problems and not check.notes


def _look_at(
    check: DatasetCheck, target: Target, lock: Lock | None, cards: Cards, sizes: dict[str, int]
) -> list[_Shard]:
    """Check a dataset's metadata; returns the shards that are there to be read."""
    where = f"{target.root}/{check.folder}"
    try:
        texts = {name: _text(target, f"{check.folder}/{name}") for name in (INFO_FILE, FEATURES_FILE)}
        info = parse_dataset_info(texts[INFO_FILE], f"{where}/{INFO_FILE}")
        _fits_card(check, cards, texts[FEATURES_FILE], where)
    except UserError as error:
        check.problems.append(str(error))
        return []
    locked = dict(locked_files(lock)) if lock else {}
    listed = list(_listed(check.folder, info, locked))
    for shard in listed:
        if f"{shard.folder}/{shard.name}" not in sizes:
            check.problems.append(f"{where}/{shard.name}: not there, though {INFO_FILE} lists it")
    names = {f"{shard.folder}/{shard.name}" for shard in listed}
    expected = {name for name in locked if name.startswith(f"{check.folder}/")}
    for name in sorted({n for n in sizes if ".tfrecord-" in n} - names):
        check.problems.append(f"{target.root}/{name}: {INFO_FILE} does not list it")
    for name in sorted(expected - names):
        check.problems.append(f"{target.root}/{name}: the lock lists it, {INFO_FILE} does not")
    _weigh(check, info, sizes, where)
    return [shard for shard in listed if f"{shard.folder}/{shard.name}" in sizes]


def _text(target: Target, name: str) -> str:
    content = target.read(name)
    if content is None:
        raise UserError(f"{target.root}/{name}: not there")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{target.root}/{name}: is no text ({error})") from error


def _fits_card(check: DatasetCheck, cards: Cards, features: str, where: str) -> None:
    card = cards.find(check.folder.split("/")[-2])
    tree = parse_features(features, f"{where}/{FEATURES_FILE}")
    if card is None:
        check.notes.append("no card")
    else:
        check_fits(card, cards.file_of(card), tree, f"{where}/{FEATURES_FILE}")


def _listed(folder: str, info: DatasetInfo, locked: dict[str, LockedShard]) -> Iterator[_Shard]:
    for split in info.splits.values():
        for index, records in enumerate(split.shard_lengths):
            name = info.shard_file(split.name, index, len(split.shard_lengths))
            yield _Shard(folder, split.name, name, records, locked.get(f"{folder}/{name}"))


def _weigh(check: DatasetCheck, info: DatasetInfo, sizes: dict[str, int], where: str) -> None:
    """numBytes of a split is the payloads of its files, when all of them are there."""
    for split in info.splits.values():
        num = len(split.shard_lengths)
        names = [f"{check.folder}/{info.shard_file(split.name, i, num)}" for i in range(num)]
        if not all(name in sizes for name in names):
            continue
        payload = sum(sizes[name] for name in names) - FRAME_BYTES * split.num_episodes
        if payload != split.num_bytes:
            check.problems.append(
                f"{where}/{INFO_FILE}: numBytes of {split.name} is {split.num_bytes:,}, "
                f"its files hold {payload:,}"
            )


def _read(shard: _Shard, target: Target) -> tuple[list[str], RecordScanner]:
    """Read one shard to its end; what is wrong with it, and a scanner that saw it."""
    name = f"{target.root}/{shard.folder}/{shard.name}"
    scanner = RecordScanner(name)
    try:
        with target.open(f"{shard.folder}/{shard.name}") as stream:
            while chunk := stream.read(CHUNK):
                scanner.feed(chunk)
        scanner.close()
    except UserError as error:  # of the records, or of the way to them
        return [str(error)], scanner
    except OSError as error:
        return [f"{name}: cannot be read ({error})"], scanner
    if scanner.num_records != shard.records:
        said = f"holds {scanner.num_records} records, {INFO_FILE} says {shard.records}"
        return [f"{name}: {said}"], scanner
    locked = shard.locked
    if locked is not None and (locked.num_bytes, locked.crc32c) != (scanner.end, f"{scanner.crc:08x}"):
        return [
            f"{name}: {scanner.end:,} bytes with crc32c {scanner.crc:08x}, "
            f"the lock says {locked.num_bytes:,} with {locked.crc32c}"
        ], scanner
    return [], scanner


def _report(checks: list[DatasetCheck], *, locked: bool) -> str:
    rows = [
        (
            check.folder,
            f"{check.shards:,}",
            f"{check.records:,}",
            size(check.num_bytes),
            count(len(check.problems), "problem") if check.problems else _verdict(check),
        )
        for check in checks
    ]
    if not rows:
        return "no dataset is there yet"
    words = "" if locked else f"\nno {LOCK_FILE} here, so files are held to {INFO_FILE} alone"
    return table(("dataset", "shards", "records", "read", "verdict"), rows) + words


def _verdict(check: DatasetCheck) -> str:
    return ", ".join([*(["ok"] if check.shards or not check.notes else []), *check.notes])
