"""Which datasets in a data folder are converted, with which weight, and the shards that makes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from convert.shards import ShardJob
from oxe_mix.card_check import check_fits
from oxe_mix.cards import Card, Cards
from oxe_mix.errors import UserError
from oxe_mix.lock import LOCK_FILE, Lock, read_lock
from oxe_mix.mix import DatasetSpec, Mix
from oxe_mix.mods import Mod
from oxe_mix.record_mods import RecordMods, resolve
from oxe_mix.rlds import FEATURES_FILE, INFO_FILE, DatasetInfo, parse_dataset_info, parse_features


@dataclass(frozen=True, slots=True)
class DatasetOnDisk:
    """One dataset of a data folder and what the mix wants of it."""

    card: Card
    folder: Path
    info: DatasetInfo
    splits: tuple[str, ...]
    weight: float
    mods: RecordMods  # of the mix; what a download applied already is not among them


def read_finished_lock(data: Path) -> Lock | None:
    """The lock of a data folder, None without one. Raises: UserError when the download is not finished."""
    lock = read_lock(data)
    if lock is not None and not lock.complete:
        raise UserError(f"{data / LOCK_FILE}: the download is not finished; run oxe-mix download again")
    return lock


def find_datasets(data: Path, mix: Mix | None, lock: Lock | None, cards: Cards) -> list[DatasetOnDisk]:
    """The datasets of a mix in a data folder, or every one with a card when there is no mix.

    Raises: UserError when the folder or one of the mix's datasets is not there, or a card does not fit the
    data.
    """
    if not data.is_dir():
        raise UserError(
            f"{data}: no such folder; give --data a folder of RLDS datasets, or download one first"
        )
    specs = list(mix.datasets) if mix is not None else _everything(data, cards)
    folders = {spec.name: _folder(data, cards.get(spec.name), spec.version) for spec in specs}
    missing = [name for name, folder in folders.items() if folder is None]
    if missing:
        what = "none of the mix's datasets" if len(missing) == len(folders) else "only part of the mix"
        raise UserError(
            f"{data}: holds {what}; missing: {', '.join(missing)}; run oxe-mix download, or mend --data"
        )
    applied = {spec.name: lock.mods_of(spec.name) if lock else () for spec in specs}
    return [
        _read(folder, [spec for spec in specs if spec.name == name], cards, applied[name])
        for name, folder in folders.items()
        if folder is not None
    ]


def _everything(data: Path, cards: Cards) -> list[DatasetSpec]:
    """Every NAME/VERSION with a card, weight 1."""
    specs: list[DatasetSpec] = []
    for info in sorted(data.glob(f"*/*/{INFO_FILE}")):
        card = cards.find(info.parts[-3])
        if card is not None and any(spec.name == card.name for spec in specs):
            raise UserError(
                f"{data}: holds {card.name} more than once; say with --mix which version you mean"
            )
        if card is not None:
            specs.append(DatasetSpec(name=card.name, version=info.parts[-2], fraction=1.0))
    if not specs:
        raise UserError(f"{data}: no NAME/VERSION/{INFO_FILE} of a dataset that has a card")
    return specs


def _folder(data: Path, card: Card, version: str) -> Path | None:
    found = [data / name / version for name in card.names if (data / name / version / INFO_FILE).exists()]
    if len(found) > 1:
        raise UserError(
            f"{data}: {found[0].parent.name} and {found[1].parent.name} are one dataset; keep one of them"
        )
    return found[0] if found else None


def _read(folder: Path, own: list[DatasetSpec], cards: Cards, applied: tuple[Mod, ...]) -> DatasetOnDisk:
    card = cards.get(own[0].name)
    info = parse_dataset_info((folder / INFO_FILE).read_text(), str(folder / INFO_FILE))
    features = folder / FEATURES_FILE
    if not features.exists():
        raise UserError(f"{features}: no such file; this copy of {card.name} is not complete")
    tree = parse_features(features.read_text(), str(features))
    check_fits(card, cards.file_of(card), tree, str(features))
    for spec in own:
        if spec.split not in info.splits:
            raise UserError(f"{folder}: no split {spec.split!r}; it has: {', '.join(info.splits)}")
    mods = resolve(_left(own[0].mods, applied, folder), tree, str(features))
    return DatasetOnDisk(card, folder, info, tuple(spec.split for spec in own), own[0].weight, mods)


def _left(asked: tuple[Mod, ...], applied: tuple[Mod, ...], folder: Path) -> tuple[Mod, ...]:
    """The mods that are still to be applied.

    Raises: UserError when the download applied one that this mix does not ask for: it cannot be undone.
    """
    undone = [mod for mod in applied if mod not in asked]
    if undone:
        raise UserError(
            f"{folder}: was downloaded with mod {undone[0]}, which this mix does not have; "
            "add it to the mix, or download again into another folder"
        )
    return tuple(mod for mod in asked if mod not in applied)


def shard_jobs(
    dataset: DatasetOnDisk, out: Path, lock: Lock | None, seed: int, val_fraction: float
) -> list[ShardJob]:
    """The shards of a dataset as jobs.

    Raises: UserError when a shard that dataset_info.json lists is not there.
    """
    shards = []
    for split in dataset.splits:
        lengths = dataset.info.splits[split].shard_lengths
        sources = (lock.source_shards(dataset.card.name, split) if lock else None) or list(
            range(len(lengths))
        )
        for index, (length, source_shard) in enumerate(zip(lengths, sources, strict=True)):
            file = dataset.folder / dataset.info.shard_file(split, index, len(lengths))
            if not file.exists():
                raise UserError(f"{file}: not there, though {INFO_FILE} lists it; this copy is not complete")
            shards.append((split, index, len(lengths), length, source_shard, str(file)))
    # Of each dataset at least one episode is held out: the first of its first shard, which growing keeps.
    several = sum(length for _, _, _, length, _, _ in shards) > 1
    return [
        ShardJob(
            card=dataset.card,
            split=split,
            index=index,
            num_shards=num_shards,
            num_episodes=length,
            file=file,
            out=str(out),
            source_shard=source_shard,
            seed=seed,
            held_out_below=val_fraction,
            holds_out_first=several and val_fraction > 0 and (split, index) == shards[0][:2],
            mods=dataset.mods,
        )
        for split, index, num_shards, length, source_shard, file in shards
    ]
