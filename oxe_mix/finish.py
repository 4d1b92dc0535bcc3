"""The last step of stage 1: when all shards are there they get their final names, dataset_info.json its true
numbers.

When a finished download grows, its shards keep their names until this moment; only the `-of-n` in them
changes. Safe to repeat: whatever part of it was done before a kill is found done.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from oxe_mix.fetch import PARTIAL, ShardReport, ShardTask
from oxe_mix.files import atomic_write, sweep, write_json
from oxe_mix.lock import Lock, LockedDataset, LockedShard, LockedSplit
from oxe_mix.mix import Mix
from oxe_mix.plan import SplitPlan
from oxe_mix.rlds import FEATURES_FILE, INFO_FILE, Split
from oxe_mix.tfrecord import FRAME_BYTES


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
        folder = own[0].folder(data)
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
        _rename(task, plan.folder(data) / file)
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
    # A grown shard leaves its shorter self behind under the old name, a source cut anew whole old shards.
    names = {shard.file for shard in shards}
    for stale in plan.folder(data).glob(f"{plan.source.info.name}-{plan.spec.split}.tfrecord-*"):
        if stale.name not in names:
            stale.unlink()
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


def _info_split(split: LockedSplit) -> Split:
    payload = sum(shard.num_bytes - FRAME_BYTES * shard.episodes for shard in split.shards)
    return Split(split.split, tuple(shard.episodes for shard in split.shards), payload)


def locked_files(lock: Lock, data: Path) -> Iterator[tuple[Path, LockedShard]]:
    """Every file that a lock lists, with what it says of it."""
    for dataset in lock.datasets:
        for split in dataset.splits:
            for shard in split.shards:
                yield data / dataset.folder / shard.file, shard


def clean_up(data: Path, lock: Lock) -> None:
    """Remove the temporary home of a finished download, and what killed runs left half written."""
    shutil.rmtree(data / PARTIAL, ignore_errors=True)
    sweep(data, *(data / dataset.folder for dataset in lock.datasets))
