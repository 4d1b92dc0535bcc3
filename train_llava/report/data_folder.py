"""A folder of RLDS datasets, downloaded by us or not, and the first page of its report."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from convert.plan import DataFolder, DatasetOnDisk, find_each, open_folders
from oxe_mix.cards import Cards, load_cards
from oxe_mix.errors import UserError
from oxe_mix.lock import Lock, LockedSplit
from oxe_mix.rlds import INFO_FILE
from oxe_mix.text import size
from train_llava.report.sampling import MOST_EPISODES
from train_llava.report.values import DatasetPage, Overview, Row


@dataclass(frozen=True, slots=True)
class DownloadedFolder:
    """A data folder, opened."""

    path: Path
    lock: Lock | None
    datasets: list[DatasetOnDisk]
    left_out: tuple[str, ...]  # datasets that cannot be shown, and why
    seed: int

    def locked(self, own: DatasetOnDisk) -> list[LockedSplit]:
        """What the lock says of a dataset's splits; nothing without a lock."""
        datasets = self.lock.datasets if self.lock else ()
        return [split for one in datasets if one.name == own.card.name for split in one.splits]

    def asked(self, own: DatasetOnDisk) -> float:
        """Episodes that the lock's mix asks for, as a share of each split: no whole number."""
        assert self.lock is not None
        fractions = {
            spec.split: spec.fraction for spec in self.lock.mix.datasets if spec.name == own.card.name
        }
        return sum(fractions.get(split.split, 0.0) * split.of_episodes for split in self.locked(own))


def open_downloaded(path: Path, cards_folder: Path | None, seed: int) -> DownloadedFolder:
    """Raises: UserError when no dataset in it can be read, or its download is not finished."""
    [folder], cards = open_folders((path,)), load_cards(cards_folder)
    found, wrong = _datasets(folder, cards)
    places = {own.folder for own in found}
    strangers = [
        f"{info.parent.relative_to(path)}: has no card or is not of the mix; not read"
        for info in sorted(path.glob(f"*/*/{INFO_FILE}"))
        if info.parent not in places and info.parts[-3] not in wrong
    ]
    left_out = (*(f"{name}: {error}" for name, error in wrong.items()), *strangers)
    return DownloadedFolder(path, folder.lock, found, left_out, seed)


def _datasets(folder: DataFolder, cards: Cards) -> tuple[list[DatasetOnDisk], dict[str, UserError]]:
    """Those that can be read, and what is wrong with each other one."""
    found, wrong = find_each(folder, cards)
    if not found:
        raise next(iter(wrong.values()))
    if folder.lock is None:
        found = [replace(own, splits=_splits_there(own)) for own in found]
    return found, wrong


def _splits_there(own: DatasetOnDisk) -> tuple[str, ...]:
    """The splits of which a file is there: where nothing was asked for, all that is there is shown."""
    there = [
        name
        for name, split in own.info.splits.items()
        if any(
            (own.folder / own.info.shard_file(name, i, len(split.shard_lengths))).exists()
            for i in range(len(split.shard_lengths))
        )
    ]
    return tuple(there) or own.splits


def num_episodes(own: DatasetOnDisk) -> int:
    """Of the splits that are shown."""
    return sum(own.info.splits[name].num_episodes for name in own.splits)


def num_bytes(own: DatasetOnDisk) -> int:
    """Of the same."""
    return sum(own.info.splits[name].num_bytes for name in own.splits)


def num_shards(own: DatasetOnDisk) -> int:
    """Of the same."""
    return sum(len(own.info.splits[name].shard_lengths) for name in own.splits)


def overview(folder: DownloadedFolder, pages: list[DatasetPage]) -> Overview:
    """The first page: exact counts, from the lock and each dataset_info.json."""
    tiles = (
        Row("datasets", f"{len(folder.datasets):,}", "datasets"),
        Row("episodes", f"{sum(map(num_episodes, folder.datasets)):,}", "episodes"),
        Row("shards", f"{sum(map(num_shards, folder.datasets)):,}", "shards"),
        Row("on disk", size(sum(map(num_bytes, folder.datasets))), "bytes"),
    )
    lock = folder.lock
    origin = (
        "No lock here: not downloaded by oxe-mix, so nothing was asked for. All splits on disk are counted; "
        "convert reads only train unless a mix names others."
    )
    if lock is not None:
        origin = f"Downloaded by mix {lock.mix.name}, seed {lock.mix.seed}."
    notes = (
        origin,
        "All counts and shares are exact, from the lock and each dataset_info.json; charts, instructions and "
        f"quantiles are of the episodes that were read: of each dataset at most {MOST_EPISODES}, drawn with "
        f"seed {folder.seed}. Exact quantiles are what convert measures.",
    )
    header = (
        *("dataset", "robot", "at the source", "asked for, after any --max-gb", "taken, before mods"),
        *("share taken, before mods", "on disk, after mods", "size"),
    )
    rows = tuple(_row(folder, own, page) for own, page in zip(folder.datasets, pages, strict=True))
    return Overview(tiles, header, rows, notes, folder.left_out)


def _row(folder: DownloadedFolder, own: DatasetOnDisk, page: DatasetPage) -> tuple[str, ...]:
    splits = folder.locked(own)
    on_disk = (f"{num_episodes(own):,}", size(num_bytes(own)))
    if not splits:
        return (own.card.name, page.robot, "unknown", "-", "-", "-", *on_disk)
    of, taken = sum(split.of_episodes for split in splits), sum(split.taken for split in splits)
    return (
        own.card.name,
        page.robot,
        f"{of:,}",
        f"{folder.asked(own) / of:.2%}",
        f"{taken:,}",
        f"{taken / of:.2%}",
        *on_disk,
    )
