"""Which datasets in a data folder are converted, with which weight, and the shards that makes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from convert.episodes import cameras_of
from convert.options import Rules
from convert.prompt import CAMERA_ROLES, Asking, CameraRole
from convert.samples import Camera
from convert.shards import ShardJob
from oxe_mix.card_check import check_fits
from oxe_mix.cards import Card, Cards
from oxe_mix.errors import UserError
from oxe_mix.files import read_text
from oxe_mix.lock import LOCK_FILE, Lock, read_lock
from oxe_mix.mix import DatasetSpec, Mix
from oxe_mix.mods import Mod
from oxe_mix.record_mods import RecordMods, resolve
from oxe_mix.rlds import (
    FEATURES_FILE,
    INFO_FILE,
    DatasetInfo,
    FeatureTree,
    parse_dataset_info,
    parse_features,
)


@dataclass(frozen=True, slots=True)
class DataFolder:
    """A folder of RLDS datasets, NAME/VERSION each, downloaded here or not."""

    path: Path
    lock: Lock | None


@dataclass(frozen=True, slots=True)
class DatasetOnDisk:
    """One dataset of a data folder and what the mix wants of it."""

    card: Card  # with the recipe that the mix asks for
    spec: DatasetSpec  # of its first split
    data: DataFolder
    folder: Path
    info: DatasetInfo
    tree: FeatureTree
    splits: tuple[str, ...]
    cameras: tuple[Camera, ...]  # of those asked for
    mods: RecordMods  # of the mix; what a download applied already is not among them

    @property
    def roles(self) -> tuple[CameraRole, ...]:
        """What the cameras of this dataset are, in the order of a question's frames."""
        return tuple(camera.role for camera in self.cameras)

    @property
    def weight(self) -> float:
        """P(dataset) in training is proportional to it times the written samples."""
        return self.spec.weight


def open_folders(paths: tuple[Path, ...]) -> list[DataFolder]:
    """The data folders of a conversion.

    Raises: UserError for one that is not there or whose download is not finished.
    """
    for path in paths:
        if not path.is_dir():
            raise UserError(
                f"{path}: no such folder; give --data a folder of RLDS datasets, or download one first"
            )
    return [DataFolder(path, read_finished_lock(path)) for path in paths]


def read_finished_lock(data: Path) -> Lock | None:
    """The lock of a data folder, None without one. Raises: UserError when the download is not finished."""
    lock = read_lock(data)
    if lock is not None and not lock.complete:
        raise UserError(f"{data / LOCK_FILE}: the download is not finished; run oxe-mix download again")
    return lock


def find_datasets(
    folders: list[DataFolder], mix: Mix | None, cards: Cards, only: tuple[str, ...], asking: Asking
) -> list[DatasetOnDisk]:
    """The datasets of a mix in some data folders. Without a mix: what each folder's lock asks for, else all
    in it that have a card.

    Raises: UserError when one of the mix's datasets is not there, or in two folders, or a card does not fit
    the data.
    """
    specs = list(mix.datasets) if mix is not None else own_specs(folders, cards)
    specs = _only(specs, only, cards)
    names = list(dict.fromkeys(spec.name for spec in specs))
    places = {spec.name: _places(folders, cards.get(spec.name), spec.version) for spec in specs}
    missing = [name for name in names if not places[name]]
    if missing:
        what = "none of the mix's datasets" if len(missing) == len(names) else "only part of the mix"
        where = ", ".join(str(folder.path) for folder in folders)
        raise UserError(
            f"{where}: holds {what}; missing: {', '.join(missing)}; run oxe-mix download, or mend --data"
        )
    return [
        _read(places[name][0], [spec for spec in specs if spec.name == name], cards, asking) for name in names
    ]


def find_each(folder: DataFolder, cards: Cards) -> tuple[list[DatasetOnDisk], dict[str, UserError]]:
    """The datasets that a folder asks for itself, with all their cameras, and what is wrong with each that
    cannot be opened: its card, or its metadata.

    Raises: UserError when it asks for none.
    """
    found, wrong = list[DatasetOnDisk](), dict[str, UserError]()
    for name in dict.fromkeys(spec.name for spec in own_specs([folder], cards)):
        try:
            found += find_datasets([folder], None, cards, (name,), Asking(cameras=CAMERA_ROLES))
        except UserError as error:
            wrong[name] = error
    return found, wrong


def own_specs(folders: list[DataFolder], cards: Cards) -> list[DatasetSpec]:
    """What the folders ask for themselves, when no mix says it.

    Raises: UserError when that is nothing, or one dataset twice.
    """
    specs: list[DatasetSpec] = []
    for folder in folders:
        own = list(folder.lock.mix.datasets) if folder.lock else _everything(folder.path, cards)
        known = {spec.name for spec in specs}
        twice = next((spec.name for spec in own if spec.name in known), None)
        if twice:
            raise UserError(f"{folder.path}: {twice} is in another --data folder, too; keep one of them")
        specs += own
    if not specs:
        where = ", ".join(str(folder.path) for folder in folders)
        raise UserError(f"{where}: no NAME/VERSION/{INFO_FILE} of a dataset that has a card")
    return specs


def _only(specs: list[DatasetSpec], only: tuple[str, ...], cards: Cards) -> list[DatasetSpec]:
    names = {cards.get(name).name for name in only}
    absent = sorted(names - {spec.name for spec in specs})
    if absent:
        known = ", ".join(dict.fromkeys(spec.name for spec in specs))
        raise UserError(f"--only {absent[0]}: not among what is to be converted: {known}")
    return [spec for spec in specs if not only or spec.name in names]


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
    return specs


def _places(folders: list[DataFolder], card: Card, version: str) -> list[tuple[DataFolder, Path]]:
    """Where a dataset lies: in one place at most, under one of its names."""
    found = [
        (folder, folder.path / name / version)
        for folder in folders
        for name in card.names
        if (folder.path / name / version / INFO_FILE).exists()
    ]
    if len(found) > 1:
        raise UserError(f"{found[0][1]} and {found[1][1]} are one dataset; keep one of them")
    return found


def _read(
    place: tuple[DataFolder, Path], own: list[DatasetSpec], cards: Cards, asking: Asking
) -> DatasetOnDisk:
    data, folder = place
    card = cards.get(own[0].name)
    info = parse_dataset_info(read_text(folder / INFO_FILE, "RLDS metadata"), str(folder / INFO_FILE))
    features = folder / FEATURES_FILE
    if not features.exists():
        raise UserError(f"{features}: no such file; this copy of {card.name} is not complete")
    tree = parse_features(read_text(features, "TFDS features"), str(features))
    check_fits(card, cards.file_of(card), tree, str(features))
    for spec in own:
        if spec.split not in info.splits:
            raise UserError(f"{folder}: no split {spec.split!r}; it has: {', '.join(info.splits)}")
    applied = data.lock.mods_of(card.name) if data.lock else ()
    return DatasetOnDisk(
        card=card.with_recipe(own[0].recipe),
        spec=own[0],
        data=data,
        folder=folder,
        info=info,
        tree=tree,
        splits=tuple(spec.split for spec in own),
        cameras=tuple(
            Camera(role, key, tree.step[key]) for role, key in cameras_of(card, asking.cameras).items()
        ),
        mods=resolve(_left(own[0].mods, applied, folder), tree, str(features)),
    )


def missing_inputs(datasets: list[DatasetOnDisk], asking: Asking) -> list[str]:
    """Cameras and states that were asked for and that a dataset does not have, a line each."""
    lines = []
    for dataset in datasets:
        have = {camera.role for camera in dataset.cameras}
        # A dataset whose only camera is on the arm shows that one when the primary is asked for.
        lacks = [role for role in asking.cameras if role not in have and not (role == "primary" and have)]
        lines += [f"{dataset.card.name}: has no {role} camera" for role in lacks]
        if asking.state and not dataset.card.state.parts:
            lines.append(f"{dataset.card.name}: has no robot state")
    return lines


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
    dataset: DatasetOnDisk, out: Path, rules: Rules, seed: int, val_fraction: float
) -> list[ShardJob]:
    """The shards of a dataset as jobs.

    Raises: UserError when a shard that dataset_info.json lists is not there.
    """
    card, lock = dataset.card, dataset.data.lock
    shards = []
    for split in dataset.splits:
        lengths = dataset.info.splits[split].shard_lengths
        sources = (lock.source_shards(card.name, split) if lock else None) or list(range(len(lengths)))
        for index, (length, source_shard) in enumerate(zip(lengths, sources, strict=True)):
            file = dataset.folder / dataset.info.shard_file(split, index, len(lengths))
            if not file.exists():
                raise UserError(f"{file}: not there, though {INFO_FILE} lists it; this copy is not complete")
            shards.append((split, index, len(lengths), length, source_shard, str(file.absolute())))
    # Of each dataset at least one episode is held out: the first of its first shard, which growing keeps.
    several = sum(length for _, _, _, length, _, _ in shards) > 1
    return [
        ShardJob(
            card=card,
            split=split,
            index=index,
            num_shards=num_shards,
            num_episodes=length,
            file=file,
            out=str(out.absolute()),
            source_shard=source_shard,
            seed=seed,
            held_out_below=val_fraction,
            holds_out_first=several and val_fraction > 0 and (split, index) == shards[0][:2],
            rules=_rules_for(dataset, rules),
            cameras=dataset.cameras,
            tree=dataset.tree,
            mods=dataset.mods,
        )
        for split, index, num_shards, length, source_shard, file in shards
    ]


def _rules_for(dataset: DatasetOnDisk, rules: Rules) -> Rules:
    """A dataset without a state is asked about without one."""
    if not rules.asking.state or dataset.card.state.parts:
        return rules
    return replace(rules, asking=rules.asking.model_copy(update={"state": False}))
