"""What a mix asks of a source: which records of which shards. Only metadata is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from oxe_mix.card_check import check_fits
from oxe_mix.cards import Cards
from oxe_mix.errors import UserError
from oxe_mix.fetch import PARTIAL, ShardTask
from oxe_mix.mix import DatasetSpec, Mix
from oxe_mix.rlds import FEATURES_FILE, Split
from oxe_mix.selection import Pick, select
from oxe_mix.source import SourceDataset, open_dataset


@dataclass(frozen=True, slots=True)
class SplitPlan:
    """What a mix asks of one split, resolved against the source's metadata."""

    spec: DatasetSpec
    source: SourceDataset
    picks: tuple[Pick, ...]

    @property
    def split(self) -> Split:
        """The split at the source."""
        return self.source.info.splits[self.spec.split]

    @property
    def episodes(self) -> int:
        """Episodes to keep."""
        return sum(pick.num_episodes for pick in self.picks)

    @property
    def estimated_bytes(self) -> int:
        """Payload bytes to expect, at the split's mean episode size."""
        return round(self.split.num_bytes * self.episodes / self.split.num_episodes)

    def folder(self, data: Path) -> Path:
        """Where the dataset lies in a data folder."""
        return data / self.spec.name / self.spec.version

    def file(self, index: int, num_shards: int) -> str:
        """The name of output shard `index` when the split has `num_shards`."""
        return self.source.info.shard_file(self.spec.split, index, num_shards)

    def source_file(self, pick: Pick) -> str:
        """The name of a pick's shard at the source."""
        return self.source.info.shard_file(self.spec.split, pick.source_shard, len(self.split.shard_lengths))


def plan_download(mix: Mix, cards: Cards) -> list[SplitPlan]:
    """Read the metadata of every dataset of a mix and select its records; no data is read.

    Raises: UserError for a dataset, version or split that is not there, and for a card that does not fit the
    data.
    """
    return [_plan_split(mix, spec, cards) for spec in mix.datasets]


def _plan_split(mix: Mix, spec: DatasetSpec, cards: Cards) -> SplitPlan:
    card = cards.get(spec.name)
    source = open_dataset(mix.source_of(spec), card, spec.version)
    check_fits(card, cards.file_of(card), source.features, f"{source.folder}/{FEATURES_FILE}")
    split = source.info.splits.get(spec.split)
    if split is None:
        known = ", ".join(source.info.splits)
        raise UserError(
            f"{spec.name} {spec.version}: no split {spec.split!r} at {source.folder}; it has: {known}"
        )
    try:
        return SplitPlan(spec, source, tuple(select(source.info, split, spec.fraction, mix.seed)))
    except ValueError as error:
        raise UserError(str(error)) from error


def shard_tasks(plans: list[SplitPlan], data: Path) -> list[ShardTask]:
    """One task per shard, in the order of the mix."""
    return [
        ShardTask(
            dataset=plan.spec.name,
            split=plan.spec.split,
            index=index,
            url=f"{plan.source.folder}/{plan.source_file(pick)}",
            source_shard=pick.source_shard,
            episodes=pick.num_episodes,
            of_episodes=pick.of_episodes,
            target=str(
                data
                / PARTIAL
                / plan.spec.name
                / plan.spec.version
                / plan.spec.split
                / f"{index:05d}.tfrecord"
            ),
            final=str(plan.folder(data) / plan.file(index, 0).removesuffix("-of-00000")),
        )
        for plan in plans
        for index, pick in enumerate(plan.picks)
    ]
