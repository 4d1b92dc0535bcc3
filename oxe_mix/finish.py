"""The last step of stage 1: when all shards are there they get their final names, dataset_info.json its true
numbers.

When a finished download grows, its shards keep their names until this moment; only the `-of-n` in them
changes. Safe to repeat: whatever part of it was done before a kill is found done.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from oxe_mix.errors import UserError
from oxe_mix.files import json_bytes
from oxe_mix.lock import Lock, LockedDataset, LockedShard, LockedSplit
from oxe_mix.mix import Mix
from oxe_mix.plan import SplitPlan
from oxe_mix.record_mods import resized_features
from oxe_mix.rlds import FEATURES_FILE, INFO_FILE, Split, parse_dataset_info, parse_features
from oxe_mix.schedule import Scheduled
from oxe_mix.shards import PARTIAL, ShardReport
from oxe_mix.target import Target
from oxe_mix.tfrecord import FRAME_BYTES

# Also while they are written, under a temporary name.
_METADATA = (INFO_FILE, FEATURES_FILE, f".{INFO_FILE}.", f".{FEATURES_FILE}.")


def finish_download(mix: Mix, plans: list[SplitPlan], shards: list[Scheduled], target: Target) -> Lock:
    """Give all shards their final names, rewrite each dataset_info.json, and return the lock to write.

    Safe to repeat: whatever part of it was done before a kill is found done.

    Raises: UserError, before anything is renamed, when mods left no record of a split.
    """
    of_split = {
        id(plan): [
            one for one in shards if (one.task.dataset, one.task.split) == (plan.spec.name, plan.spec.split)
        ]
        for plan in plans
    }
    for plan in plans:
        _refuse_empty(plan, of_split[id(plan)])
    # Flushed here and not one by one as they come: workers would wait for the disk instead of the network.
    for one in shards:
        if one.file is not None and one.file.startswith(PARTIAL):
            target.flush(one.file)
    datasets = []
    for name in dict.fromkeys(plan.spec.name for plan in plans):
        own = [plan for plan in plans if plan.spec.name == name]
        first, folder = own[0], own[0].folder
        splits = tuple(_finish_split(plan, of_split[id(plan)], target) for plan in own)
        features = resized_features(first.source.features_text, first.spec.mods)
        info = first.source.info.with_splits([_info_split(split) for split in splits])
        target.write(f"{folder}/{FEATURES_FILE}", features.encode())
        target.write(f"{folder}/{INFO_FILE}", json_bytes(info))
        datasets.append(
            LockedDataset(
                name=name,
                version=first.spec.version,
                folder=folder,
                source=first.source.folder,
                mods=first.spec.mods,
                splits=splits,
            )
        )
    return Lock(complete=True, mix=mix, datasets=tuple(datasets))


def locked_files(lock: Lock) -> Iterator[tuple[str, LockedShard]]:
    """Every file that a lock lists, below its target, with what it says of it."""
    for dataset in lock.datasets:
        for split in dataset.splits:
            for shard in split.shards:
                yield f"{dataset.folder}/{shard.file}", shard


def is_whole(lock: Lock, mix: Mix, target: Target) -> bool:
    """Whether a finished download of this very mix is all there: every shard of its size, and metadata that
    says of them what it has to.
    """
    if not lock.complete or lock.mix != mix:
        return False
    sizes: dict[str, int] = {}
    for dataset in lock.datasets:
        sizes |= target.sizes(dataset.folder)
    shards = all(sizes.get(file) == shard.num_bytes for file, shard in locked_files(lock))
    return shards and all(_is_described(dataset, target) for dataset in lock.datasets)


def refuse_foreign_data(
    plans: list[SplitPlan], shards: list[Scheduled], lock: Lock | None, target: Target
) -> None:
    """What no download here wrote is not ours to rename or replace: it may be the source itself.

    Ours is all of a dataset that a lock lists; and of one that is only asked for, what an interrupted finish
    has placed: metadata, and shards that have a note.
    """
    listed = {dataset.name for dataset in lock.datasets} if lock else set()
    asked = {spec.name for spec in lock.mix.datasets} if lock else set()
    waiting = target.sizes(PARTIAL)
    noted = {one.task.final: one.task.name for one in shards if one.task.note in waiting}

    def is_placed(file: str, num_bytes: int) -> bool:
        if file.rsplit("/", 1)[-1].startswith(_METADATA):
            return True
        name = noted.get(file.rsplit("-of-", 1)[0])
        # What is placed waits no longer; but a bucket copies before it removes.
        return name is not None and waiting.get(name, num_bytes) == num_bytes

    for plan in plans:
        name, place = plan.spec.name, f"{target.root}/{plan.folder}"
        files = {} if name in listed else target.sizes(plan.folder)
        if any(name not in asked or not is_placed(*file) for file in files.items()):
            raise UserError(f"{place}: holds data that no download here wrote; choose another --out")
        if Path(plan.source.folder.removeprefix("file://")).resolve() == Path(place).resolve():
            raise UserError(f"{place}: is the source itself; choose another --out")


def clean_up(target: Target, lock: Lock) -> None:
    """Remove the temporary home of a finished download, and what killed runs left half written."""
    target.remove(PARTIAL)
    for folder in ("", *(dataset.folder for dataset in lock.datasets)):
        target.sweep(folder)


def _is_described(dataset: LockedDataset, target: Target) -> bool:
    """Whether the metadata of a dataset is there, can be read, and lists the shards that the lock lists."""
    texts = [target.read(f"{dataset.folder}/{name}") for name in (INFO_FILE, FEATURES_FILE)]
    try:
        info_text, features = ((text or b"").decode() for text in texts)
        info = parse_dataset_info(info_text, INFO_FILE)
        parse_features(features, FEATURES_FILE)
    except ValueError:
        return False
    ours = info.with_splits([_info_split(split) for split in dataset.splits])
    return json_bytes(ours) == texts[0] and resized_features(features, dataset.mods) == features


def _refuse_empty(plan: SplitPlan, shards: list[Scheduled]) -> None:
    if sum(_report(one).episodes for one in shards) == 0:
        raise UserError(
            f"{plan.spec.name} ({plan.spec.split}): the mods left none of {plan.episodes} episodes, and a "
            "split without any cannot be read; raise the fraction in another --out"
        )


def _finish_split(plan: SplitPlan, shards: list[Scheduled], target: Target) -> LockedSplit:
    locked = []
    for index, (one, pick) in enumerate(zip(shards, plan.picks, strict=True)):
        report, file = _report(one), plan.file(index, len(plan.picks))
        if one.file != f"{plan.folder}/{file}":
            assert one.file is not None
            target.rename(one.file, f"{plan.folder}/{file}")
        locked.append(
            LockedShard(
                file=file,
                source_file=plan.source_name(pick),
                source_shard=pick.source_shard,
                source_bytes=report.source.size,
                source_check=report.source.check,
                of_episodes=pick.of_episodes,
                taken=report.taken,
                episodes=report.episodes,
                num_bytes=report.num_bytes,
                crc32c=report.crc32c,
            )
        )
    # A grown shard leaves its shorter self behind under the old name.
    names = {f"{plan.folder}/{shard.file}" for shard in locked}
    stem = f"{plan.folder}/{plan.source.info.name}-{plan.spec.split}.tfrecord-"
    for stale in target.sizes(plan.folder):
        if stale.startswith(stem) and stale not in names:
            target.remove(stale)
    return LockedSplit(
        split=plan.spec.split,
        of_episodes=plan.split.num_episodes,
        taken=plan.episodes,
        episodes=sum(shard.episodes for shard in locked),
        shards=tuple(locked),
    )


def _report(one: Scheduled) -> ShardReport:
    assert one.report is not None, f"{one.task.name} has no report"
    return one.report


def _info_split(split: LockedSplit) -> Split:
    payload = sum(shard.num_bytes - FRAME_BYTES * shard.episodes for shard in split.shards)
    return Split(split.split, tuple(shard.episodes for shard in split.shards), payload)
