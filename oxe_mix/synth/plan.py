"""What a synthetic bucket holds: which datasets, their splits, and the episodes of every shard."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from oxe_mix.cards import SHIPPED, Card, load_card, load_cards
from oxe_mix.errors import UserError
from oxe_mix.mix import Mix, load_mix
from oxe_mix.synth.features import feature_tree
from oxe_mix.synth.robots import ROBOTS, Robot

DEMO_MIX = Path("demo.yaml")  # the six of ROBOTS, which are made when no mix is named
_DEMO_EPISODES, _DEMO_SHARDS = 240, 5
_MIX_EPISODES, _MIX_SHARDS = 40, 16
# Below that, not every one of the six has a share of its own.
_FEWEST_DEMO_EPISODES = len(ROBOTS)
_OTHER_SPLIT_SHARE, _OTHER_SPLIT_SHARDS = 0.1, 2
# This release's folder and files are not called as its card is.
_RELEASE_NAMES = {"bridge_orig": "bridge_dataset"}


@dataclass(frozen=True, slots=True)
class SynthOptions:
    """What `oxe-mix synth` was asked for; None is a default that depends on whether a mix is named."""

    out: Path
    mix: Path | None = None
    episodes: int | None = None
    shards: int | None = None
    seed: int = 0
    workers: int | None = None


@dataclass(frozen=True, slots=True)
class SplitPlan:
    """A split: the numbers of the episodes in each of its shards."""

    name: str
    shards: tuple[range, ...]

    @property
    def num_episodes(self) -> int:
        """Episodes in the split."""
        return sum(map(len, self.shards))


@dataclass(frozen=True, slots=True)
class DatasetPlan:
    """A dataset of the bucket: an exact build and its splits."""

    name: str  # the card's
    version: str
    splits: tuple[SplitPlan, ...]

    @property
    def card(self) -> Card:
        """What is known of it."""
        return load_card(SHIPPED / f"{self.name}.yaml")

    @property
    def tree(self) -> str:
        """The name of its shipped feature tree."""
        return self.card.tree or self.name

    @property
    def release_name(self) -> str:
        """What its folder and files are called."""
        return _RELEASE_NAMES.get(self.name, self.name)

    @property
    def robot(self) -> Robot | None:
        """Who plays in the tabletop world for it, if anyone does."""
        return next((robot for robot in ROBOTS if robot.name == self.name), None)


@dataclass(frozen=True, slots=True)
class BucketPlan:
    """All of a bucket; `settings` tell it from any other."""

    mix: Path  # what downloads it
    asked: str
    datasets: tuple[DatasetPlan, ...]
    settings: dict[str, Any]


def plan_bucket(options: SynthOptions) -> BucketPlan:
    """The bucket that the options ask for.

    Raises: UserError for a mix that does not load, a dataset without a feature tree, too few episodes or a
        negative seed.
    """
    if options.seed < 0:
        raise UserError(f"--seed {options.seed}: a seed is 0 or more")
    return _plan_demo(options) if options.mix is None else _plan_mix(options, options.mix)


def _plan_demo(options: SynthOptions) -> BucketPlan:
    episodes, shards = options.episodes or _DEMO_EPISODES, options.shards or _DEMO_SHARDS
    if episodes < _FEWEST_DEMO_EPISODES:
        raise UserError(f"--episodes {episodes}: six datasets need at least {_FEWEST_DEMO_EPISODES}")
    datasets = []
    for robot in ROBOTS:
        num_train = max(shards, round(robot.share * episodes))
        others = (robot.other_split,) if robot.other_split else ()
        version = load_card(SHIPPED / f"{robot.name}.yaml").version
        datasets.append(DatasetPlan(robot.name, version, _splits(num_train, shards, others)))
    settings = {"episodes": episodes, "seed": options.seed}
    if shards != _DEMO_SHARDS:
        settings["shards"] = shards
    asked = f"{episodes:,} training episodes"
    return BucketPlan(DEMO_MIX, asked, tuple(datasets), settings)


def _plan_mix(options: SynthOptions, file: Path) -> BucketPlan:
    episodes, shards = options.episodes or _MIX_EPISODES, options.shards or _MIX_SHARDS
    if episodes < shards:
        raise UserError(f"--episodes {episodes}: fewer than the {shards} shards; ask for fewer --shards")
    mix = load_mix(file, load_cards())
    datasets = tuple(
        DatasetPlan(name, version, _splits(episodes, shards, _other_splits(name, mix)))
        for name, version in dict.fromkeys((spec.name, spec.version) for spec in mix.datasets)
    )
    for dataset in datasets:
        feature_tree(dataset.tree)
    made = {f"{d.name}/{d.version}": {split.name: split.num_episodes for split in d.splits} for d in datasets}
    settings = {"mix": mix.name, "datasets": made, "shards": shards, "seed": options.seed}
    asked = f"{episodes:,} training episodes of each of {len(datasets)} datasets"
    return BucketPlan(file, asked, datasets, settings)


def _other_splits(name: str, mix: Mix) -> list[str]:
    """The splits besides train: those of the card, those that its robot writes, those of the mix."""
    dataset = DatasetPlan(name, "", ())
    own = [dataset.robot.other_split] if dataset.robot and dataset.robot.other_split else []
    names = [*dataset.card.episodes, *own, *(spec.split for spec in mix.datasets if spec.name == name)]
    return [split for split in dict.fromkeys(names) if split != "train"]


def _splits(num_train: int, num_shards: int, others: Iterable[str]) -> tuple[SplitPlan, ...]:
    splits = [SplitPlan("train", _cut(range(num_train), num_shards))]
    first = num_train
    for name in others:
        numbers = range(first, first + max(_OTHER_SPLIT_SHARDS, round(_OTHER_SPLIT_SHARE * num_train)))
        splits.append(SplitPlan(name, _cut(numbers, _OTHER_SPLIT_SHARDS)))
        first = numbers.stop
    return tuple(splits)


def _cut(numbers: range, num_shards: int) -> tuple[range, ...]:
    """Shards of unequal length, as in the bucket, and none without an episode."""
    cuts = [0]
    for i in range(1, num_shards + 1):
        cuts.append(max(cuts[-1] + 1, round(len(numbers) * (i / num_shards) ** 1.1)))
    return tuple(numbers[a:b] for a, b in pairwise(cuts))
