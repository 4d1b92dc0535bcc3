"""What `oxe-mix download` does, in order, and what it prints."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from oxe_mix.cards import Cards, load_cards
from oxe_mix.engine import LOCAL, Engine
from oxe_mix.errors import UserError
from oxe_mix.fetch import RETRIES_LOG
from oxe_mix.finish import clean_up, finish_download, is_whole, refuse_foreign_data
from oxe_mix.lock import LOCK_FILE, Lock, lock_bytes, parse_lock, refuse_other_mix
from oxe_mix.mix import Mix, load_mix
from oxe_mix.plan import SplitPlan, effective, plan_download
from oxe_mix.plan_text import missing_words, plan_json, plan_table
from oxe_mix.progress import Goal, Sample, progress
from oxe_mix.schedule import Scheduled, find_files, schedule
from oxe_mix.shards import PARTIAL, ShardReport
from oxe_mix.source_file import Patience
from oxe_mix.target import Target, next_step, open_target
from oxe_mix.text import complain, count, say, size, warn


@dataclass(frozen=True, slots=True)
class DownloadOptions:
    """What the user typed."""

    mix: Path
    out: str
    sources: tuple[str, ...] = ()
    max_gb: float | None = None
    dry_run: bool = False
    cards: Path | None = None
    jobs: int = 8
    patience: Patience = field(default_factory=Patience)
    json: bool = False


def run_download(options: DownloadOptions, engine: Engine) -> int:
    """Download a mix into a folder.

    Returns: the exit code: 0 when all that was asked is there, 1 when shards are missing.
    Raises: UserError for what the user can mend.
    """
    if engine.runner != LOCAL:
        from pipelines.runner import check_engine

        check_engine(engine)
    cards = load_cards(options.cards)
    mix = _asked(options, load_mix(options.mix, cards))
    target = open_target(_absolute(options.out))
    with nullcontext() if options.dry_run else target.hold("download"):
        return _download(options, engine, target, mix, cards)


def _download(options: DownloadOptions, engine: Engine, target: Target, mix: Mix, cards: Cards) -> int:
    lock = _binding_lock(target)
    budget = mix.max_gb or any(spec.max_gb for spec in mix.datasets)
    if lock is not None and not budget:
        refuse_other_mix(target.root, lock, mix)
        if is_whole(lock, mix, target):
            return _nothing_to_do(options, target, lock)
    plans = plan_download(mix, cards, options.patience)
    mix = effective(mix, plans)
    if lock is not None and budget:
        refuse_other_mix(target.root, lock, mix)
        if is_whole(lock, mix, target):
            return _nothing_to_do(options, target, lock)
    run, shards = _Run(options, engine, target, plans), schedule(plans, target, lock)
    run.show_plan(shards)
    refuse_foreign_data(plans, shards, lock, target)
    return 0 if options.dry_run else run.fetch_and_finish(shards, mix, lock)


def _binding_lock(target: Target) -> Lock | None:
    """The lock of a target; one of a download that never got a byte binds nobody."""
    lock = parse_lock(target.read(LOCK_FILE), f"{target.root}/{LOCK_FILE}")
    if lock is None or lock.complete or lock.datasets or _has_shards(target.sizes(PARTIAL)):
        return lock
    return None


def _has_shards(sizes: dict[str, int]) -> bool:
    # A note outlives its shard's wait: the shard may have its final name already.
    return any(num and name.endswith((".tfrecord", ".tfrecord.json", ".part")) for name, num in sizes.items())


def _asked(options: DownloadOptions, mix: Mix) -> Mix:
    if options.sources:
        sources = tuple(_absolute(source) for source in options.sources)
        mix = mix.with_source(sources if len(sources) > 1 else sources[0])
    if options.max_gb is None:
        return mix
    if not options.max_gb > 0:
        raise UserError(f"--max-gb {options.max_gb:g}: a budget is more than 0")
    return mix.model_copy(update={"max_gb": options.max_gb})


def _nothing_to_do(options: DownloadOptions, target: Target, lock: Lock) -> int:
    waiting = _waiting(target).num_bytes
    if not waiting and not options.dry_run:
        clean_up(target, lock)
    if options.json:
        event = {"event": "done", "result": target.root, "fetched_shards": 0, "missing": []}
        say(json.dumps({**event, "waiting_bytes": waiting}))
        return 0
    say(f"{target.root}: mix {lock.mix.name!r} is already here, whole; nothing to do")
    if waiting:
        words = "of a larger mix that was not finished: download that again, or delete the folder"
        say(f"{target.root}/{PARTIAL} holds {size(waiting)} {words}")
    say(f"next: {next_step(target.root)}")
    return 0


@dataclass(frozen=True, slots=True)
class _Run:
    """One download under way."""

    options: DownloadOptions
    engine: Engine
    target: Target
    plans: list[SplitPlan]

    def fetch_and_finish(self, shards: list[Scheduled], mix: Mix, lock: Lock | None) -> int:
        """Fetch what is not there, and give all of it its final names."""
        from pipelines.download import fetch_all

        start, target = time.monotonic(), self.target
        unfinished = Lock(complete=False, mix=mix, datasets=lock.datasets if lock else ())
        if lock is None:
            self._write_lock(unfinished)
        tasks = [one.task for one in shards if one.report is None]
        goal = Goal("download", "shard", len(tasks), sum(one.needed_bytes for one in shards))
        with progress(goal, _sampler(target, len(tasks)), "json" if self.options.json else "auto"):
            reports, failures = fetch_all(tasks, self.options.jobs, self.engine, self.options.patience)
        if failures:
            return self._some_missing(failures, len(shards) - len(tasks) + len(reports), len(shards))
        fetched = {(report.dataset, report.split, report.index): report for report in reports}
        shards = find_files(shards, fetched, target)
        # From here on names change, so until the new lock is written no reader may take the folder for whole.
        self._write_lock(unfinished)
        done = finish_download(mix, self.plans, shards, target)
        self._write_lock(done)
        clean_up(target, done)
        self._summary(done, reports, time.monotonic() - start)
        return 0

    def show_plan(self, shards: list[Scheduled]) -> None:
        """Say what is asked for; refuse what the disk would not hold."""
        if self.options.json:
            say(json.dumps(plan_json(self.plans)))
        else:
            say(plan_table(self.plans))
        for line in missing_words(self.plans):
            warn(line)
        needed = sum(one.needed_bytes for one in shards)
        free = self.target.free_bytes()
        if not self.options.json:
            fits = "the target has no limit" if free is None else f"disk free {size(free)}"
            say(f"still to fetch about {size(needed)}, {fits}")
        if free is not None and needed > free:
            raise UserError(
                f"{self.target.root}: the disk would not hold this: {size(needed)} needed, "
                f"{size(free)} free; ask for less with --max-gb {free / 1.1e9:.3g}, or choose another --out"
            )

    def _write_lock(self, lock: Lock) -> None:
        self.target.write(LOCK_FILE, lock_bytes(lock))

    def _some_missing(self, failures: list[str], done: int, asked: int) -> int:
        complain("\n".join(failures))
        if self.options.json:
            say(json.dumps({"event": "incomplete", "shards": done, "of_shards": asked, "missing": failures}))
        else:
            say(f"{done} of {count(asked, 'shard')} fetched; the next run fetches only the missing")
        return 1

    def _summary(self, lock: Lock, reports: list[ShardReport], seconds: float) -> None:
        splits = [split for dataset in lock.datasets for split in dataset.splits]
        taken, left = sum(split.taken for split in splits), sum(split.episodes for split in splits)
        retries = sum(report.retries for report in reports)
        fetched = sum(report.fetched_bytes for report in reports)
        if self.options.json:
            event: dict[str, Any] = {"event": "done", "result": self.target.root, "asked_episodes": taken}
            event |= {"episodes": left, "dropped": {"mods": taken - left}, "missing": []}
            event |= {"fetched_shards": len(reports), "fetched_bytes": fetched, "retries": retries}
            say(json.dumps({**event, "seconds": round(seconds, 1)}))
            return
        dropped = f"dropped by mods {taken - left:,}" if taken != left else "dropped 0"
        shards = sum(len(split.shards) for split in splits)
        say(
            f"asked {count(taken, 'episode')} in {count(shards, 'shard')}, done {left:,}, {dropped}; "
            f"fetched {count(len(reports), 'shard')}, {size(fetched)}, {seconds:.1f} s"
            + (f", retries {retries}" if retries else "")
        )
        say(f"result: {self.target.root}\nnext: {next_step(self.target.root)}")


def _sampler(target: Target, num_tasks: int) -> Callable[[], Sample]:
    """How far a download is, read off its target: so it counts for any number of processes and machines."""
    before = _waiting(target)

    def sample() -> Sample:
        now = _waiting(target)
        log = target.read(RETRIES_LOG) or b""
        return Sample(
            done=min(num_tasks, max(0, now.done - before.done)),
            num_bytes=max(0, now.num_bytes - before.num_bytes),
            retries=log.count(b"\n"),
        )

    return sample


def _waiting(target: Target) -> Sample:
    sizes = target.sizes(PARTIAL)
    shards = {name: num for name, num in sizes.items() if name.endswith((".tfrecord", ".part"))}
    return Sample(sum(name.endswith(".tfrecord") for name in shards), sum(shards.values()))


def _absolute(place: str) -> str:
    """A folder given relative to the working folder means the same place wherever it is read later."""
    return place if "://" in place else str(Path(place).resolve())
