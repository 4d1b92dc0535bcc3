"""Which records of a split a fraction means: a pure function of dataset_info.json, fraction and seed."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass

from oxe_mix.rlds import DatasetInfo, Split


@dataclass(frozen=True, slots=True)
class Pick:
    """The first `num_episodes` records of one source shard; `of_episodes` is how many it holds."""

    source_shard: int
    num_episodes: int
    of_episodes: int


def num_kept(num_episodes: int, fraction: float) -> int:
    """Episodes that a fraction keeps: Python's round, at least one."""
    return max(1, round(fraction * num_episodes))


def select(info: DatasetInfo, split: Split, fraction: float, seed: int) -> list[Pick]:
    """The shards to take, in the order of a seeded permutation: whole ones, and of the last perhaps only a
    part.

    The count is exact, and a smaller fraction with the same seed is a prefix of a larger one, record for
    record.

    Args:
        fraction: share of the split's episodes, in (0, 1].

    Returns: picks in output order: output shard i is the i-th pick. Empty shards are left out.
    Raises: ValueError when the split holds no episode.
    """
    if split.num_episodes == 0:
        raise ValueError(f"{info.name} {info.version}: split {split.name} holds no episode")
    left = num_kept(split.num_episodes, fraction)
    picks = []
    for shard in _permutation(seed, info.name, info.version, split.name, len(split.shard_lengths)):
        length = split.shard_lengths[shard]
        if length and left:
            picks.append(Pick(shard, min(length, left), length))
            left -= min(length, left)
    return picks


def uniform_hash(*parts: object) -> float:
    """A number in [0, 1) that depends on `parts` alone: the same on every machine and in every version."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


@functools.lru_cache(maxsize=256)  # a budget asks for the same order many times
def _permutation(seed: int, name: str, version: str, split: str, num_shards: int) -> list[int]:
    def place(shard: int) -> tuple[float, int]:
        return uniform_hash(seed, name, version, split, shard), shard

    return sorted(range(num_shards), key=place)
