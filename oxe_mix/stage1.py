"""What `oxe-mix download` does, in order, and what it prints."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from oxe_mix.cards import load_cards
from oxe_mix.errors import UserError
from oxe_mix.fetch import ShardReport, ShardTask, note_locked
from oxe_mix.files import folder_lock
from oxe_mix.finish import clean_up, finish_download, locked_files
from oxe_mix.lock import Lock, read_lock, refuse_other_mix, write_lock
from oxe_mix.mix import Mix, load_mix
from oxe_mix.plan import SplitPlan, plan_download, shard_tasks
from oxe_mix.progress import progress
from oxe_mix.text import complain, count, say, size, table


def run_download(
    mix_file: Path,
    out: Path,
    *,
    source: str | None,
    dry_run: bool,
    cards_folder: Path | None,
    workers: int | None,
) -> int:
    """Download a mix into a folder.

    Returns: the exit code: 0 when all that was asked is there, 1 when shards are missing.
    Raises: UserError for what the user can mend.
    """
    cards = load_cards(cards_folder)
    mix = load_mix(mix_file, cards)
    if source is not None:
        mix = mix.with_source(_absolute(source))
    if dry_run:
        plans = plan_download(mix, cards)
        say(_plan_table(plans))
        _refuse_full_disk(plans, shard_tasks(plans, out), out)
        return 0
    with folder_lock(out, "download"):
        lock = read_lock(out)
        if lock is not None:
            refuse_other_mix(out, lock, mix)
            if lock.complete and lock.mix == mix and _all_there(lock, out):
                say(f"{out}: mix {mix.name!r} is already here, whole; nothing to do\nnext: {_next(out)}")
                return 0
        plans = plan_download(mix, cards)
        say(_plan_table(plans))
        return _fetch_and_finish(mix, plans, out, lock, workers)


def _fetch_and_finish(
    mix: Mix, plans: list[SplitPlan], out: Path, lock: Lock | None, workers: int | None
) -> int:
    from pipelines.download import fetch_all

    start = time.monotonic()
    tasks = shard_tasks(plans, out)
    if lock is None or lock.complete:
        _refuse_foreign_data(plans, lock, out)
    _refuse_full_disk(plans, tasks, out)
    if lock is None:
        write_lock(out, Lock(complete=False, mix=mix))
    else:
        note_locked(tasks, lock)
    with progress("download", "shards", len(tasks), lambda: sum(task.note.exists() for task in tasks)):
        reports, failures = fetch_all(tasks, sum(plan.estimated_bytes for plan in plans), workers)
    if failures:
        complain("\n".join(failures))
        say(f"{len(reports)} of {count(len(tasks), 'shard')} fetched; the next run fetches only the missing")
        return 1
    # From here on names change, so until the new lock is written no reader may take the folder for whole.
    write_lock(out, Lock(complete=False, mix=mix))
    done = finish_download(mix, plans, tasks, reports, out)
    write_lock(out, done)
    clean_up(out, done)
    say(_summary(plans, reports, time.monotonic() - start))
    say(f"result: {out}\nnext: {_next(out)}")
    return 0


def _refuse_foreign_data(plans: list[SplitPlan], lock: Lock | None, out: Path) -> None:
    """What the lock does not name is not ours to rename or replace: it may be the source itself."""
    own = {dataset.name for dataset in lock.datasets} if lock else set()
    for plan in plans:
        folder = plan.folder(out)
        if plan.spec.name not in own and folder.exists() and any(folder.iterdir()):
            raise UserError(f"{folder}: holds data that no download here wrote; choose another --out")


def _all_there(lock: Lock, data: Path) -> bool:
    return all(
        file.exists() and file.stat().st_size == shard.num_bytes for file, shard in locked_files(lock, data)
    )


def _plan_table(plans: list[SplitPlan]) -> str:
    rows = [
        (
            plan.spec.name,
            plan.spec.split,
            f"{plan.episodes:,} of {plan.split.num_episodes:,}",
            f"{len(plan.picks)} of {len(plan.split.shard_lengths)}",
            size(plan.estimated_bytes),
        )
        for plan in plans
    ]
    episodes, shards = sum(p.episodes for p in plans), sum(len(p.picks) for p in plans)
    total = size(sum(plan.estimated_bytes for plan in plans))
    rows.append(("total", "", f"{episodes:,}", f"{shards:,}", total))
    return table(("dataset", "split", "episodes", "shards", "about"), rows)


def _refuse_full_disk(plans: list[SplitPlan], tasks: list[ShardTask], out: Path) -> None:
    here = sum(file.stat().st_size for task in tasks if (file := task.on_disk()))
    needed = sum(plan.estimated_bytes for plan in plans) - here
    free = shutil.disk_usage(next(p for p in (out, *out.resolve().parents) if p.exists())).free
    say(f"still to fetch about {size(max(0, needed))}, disk free {size(free)}")
    if needed > free:
        raise UserError(f"{out}: the disk would not hold this; lower the fractions or choose another --out")


def _summary(plans: list[SplitPlan], reports: list[ShardReport], seconds: float) -> str:
    asked, done = sum(plan.episodes for plan in plans), sum(report.episodes for report in reports)
    fetched = [report.num_bytes for report in reports if report.fetched]
    return (
        f"asked {count(asked, 'episode')} in {count(len(reports), 'shard')}, done {done:,}, "
        f"dropped {asked - done}; "
        f"fetched {count(len(fetched), 'shard')}, {size(sum(fetched))}, {seconds:.1f} s"
    )


def _absolute(source: str) -> str:
    """A folder given relative to the working folder means the same place wherever the lock is read later."""
    return source if "://" in source else str(Path(source).resolve())


def _next(out: Path) -> str:
    return f"oxe-mix convert --to llava --data {out}"
