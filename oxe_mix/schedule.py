"""What is left to do of a plan: a task for every shard, and what earlier runs have finished of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from oxe_mix.errors import UserError
from oxe_mix.lock import Lock, LockedShard
from oxe_mix.plan import SplitPlan
from oxe_mix.selection import Pick
from oxe_mix.shards import PARTIAL, ShardReport, ShardTask, read_note
from oxe_mix.source_file import SourceFile
from oxe_mix.target import Target


@dataclass(frozen=True, slots=True)
class Scheduled:
    """A shard of a plan: its task, the report of the run that finished it, and where it is then. A file
    without a report is to be read again.
    """

    task: ShardTask
    report: ShardReport | None = None
    file: str | None = None
    needed_bytes: int = 0  # that are not there yet, about


def schedule(plans: list[SplitPlan], target: Target, lock: Lock | None) -> list[Scheduled]:
    """Every shard of the plans in their order, with what is already there and proved.

    Raises: UserError for a shard that changed at the source since the lock was written.
    """
    locked = _locked_shards(lock)
    waiting = target.sizes(PARTIAL)
    placed: dict[str, dict[str, int]] = {}  # by the name up to the number of shards
    for folder in dict.fromkeys(plan.folder for plan in plans):
        for name, size in target.sizes(folder).items():
            placed.setdefault(name.rsplit("-of-", 1)[0], {})[name] = size
    out = []
    for plan in plans:
        for index, pick in enumerate(plan.picks):
            task = _task(plan, index, pick, target)
            # Waiting, or already named as a shard of 3, of 5, …
            here = {**_waiting(task, waiting), **placed.get(task.final, {})}
            old = locked.get((task.dataset, task.split, index))
            found = _look_up(task, old, here, target)
            missing = max(0, task.estimated_bytes - waiting.get(task.part, 0))
            out.append(found if found.file else replace(found, needed_bytes=missing))
    return out


def find_files(
    scheduled: list[Scheduled], reports: dict[tuple[str, str, int], ShardReport], target: Target
) -> list[Scheduled]:
    """The same shards with the reports of what was fetched since, and where each file is now."""
    waiting = target.sizes(PARTIAL)
    out = []
    for one in scheduled:
        key = (one.task.dataset, one.task.split, one.task.index)
        report = reports.get(key)
        if report is None:
            out.append(one)
        else:
            file = _of_size(_waiting(one.task, waiting), report.num_bytes)
            assert file is not None, f"{one.task.name} was fetched and is gone"
            out.append(Scheduled(one.task, report, file))
    return out


def _task(plan: SplitPlan, index: int, pick: Pick, target: Target) -> ShardTask:
    file = plan.source_name(pick)
    folder = f"{PARTIAL}/{plan.spec.name}/{plan.spec.version}/{plan.spec.split}"
    return ShardTask(
        dataset=plan.spec.name,
        split=plan.spec.split,
        index=index,
        urls=tuple(f"{place}/{file}" for place in (plan.source.folder, *plan.source.mirrors)),
        source_shard=pick.source_shard,
        episodes=pick.num_episodes,
        of_episodes=pick.of_episodes,
        estimated_bytes=plan.pick_bytes(pick),
        expected=plan.source_file(pick),
        out=target.root,
        name=f"{folder}/{index:05d}.tfrecord",
        final=f"{plan.folder}/{plan.file(index, 0).removesuffix('-of-00000')}",
        mods=plan.mods,
    )


def _locked_shards(lock: Lock | None) -> dict[tuple[str, str, int], tuple[str, LockedShard]]:
    """Every shard of a lock, with the folder that it came from."""
    datasets = lock.datasets if lock else ()
    return {
        (dataset.name, split.split, index): (dataset.source, shard)
        for dataset in datasets
        for split in dataset.splits
        for index, shard in enumerate(split.shards)
    }


def _waiting(task: ShardTask, sizes: dict[str, int]) -> dict[str, int]:
    return {name: sizes[name] for name in (task.name, task.note) if name in sizes}


def _of_size(files: dict[str, int], num_bytes: int) -> str | None:
    return next(
        (name for name, size in files.items() if size == num_bytes and not name.endswith(".json")), None
    )


def _look_up(
    task: ShardTask, locked: tuple[str, LockedShard] | None, here: dict[str, int], target: Target
) -> Scheduled:
    if task.note in here:
        noted = read_note(task, target.read(task.note) or b"")
        file = _of_size(here, noted[0].num_bytes) if noted else None
        if noted is not None and file is not None:
            report, trusted = noted
            # A file that has its final name was flushed before it got it.
            if trusted or target.durable or file != task.name:
                return Scheduled(task, report, file)
            return Scheduled(task, file=file)
    if locked is None:
        return Scheduled(task)
    folder, old = locked
    source = SourceFile(old.source_bytes, old.source_check)
    if folder != task.urls[0].rsplit("/", 1)[0]:
        source = source.anywhere
    before = (old.source_file, old.of_episodes)
    if before != (task.urls[0].rsplit("/", 1)[-1], task.of_episodes) or source.differs(task.expected):
        raise UserError(
            f"{task.urls[0]}: changed at the source since {target.root} was downloaded "
            f"(was {old.source_file}, {source}; is {task.expected}); choose another --out"
        )
    file = _of_size(here, old.num_bytes)
    if file is None:
        return Scheduled(task)
    if old.taken == task.episodes:
        return Scheduled(task, _report(task, old, source), file)
    # The first records are there; but not as the source has them where mods have changed them.
    growing = replace(task, prefix=None if task.mods else file)
    return Scheduled(replace(growing, expected=source) if task.expected == SourceFile() else growing)


def _report(task: ShardTask, old: LockedShard, source: SourceFile) -> ShardReport:
    return ShardReport(
        task.dataset, task.split, task.index, old.taken, old.episodes, old.num_bytes, old.crc32c, source
    )
