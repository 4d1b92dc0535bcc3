"""Fractions: exact, nested, reproducible."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oxe_mix.rlds import DatasetInfo, Split
from oxe_mix.selection import num_kept, select

INFO = DatasetInfo("viola", "0.1.0", {}, {})
lengths = st.lists(st.integers(0, 40), min_size=1, max_size=30).filter(any)
fractions = st.floats(1e-6, 1.0)


def _records(shard_lengths: list[int], fraction: float, seed: int) -> list[tuple[int, int]]:
    """(source shard, record) of everything that is kept, in output order."""
    picks = select(INFO, Split("train", tuple(shard_lengths), 0), fraction, seed)
    return [(pick.source_shard, record) for pick in picks for record in range(pick.num_episodes)]


@given(lengths, fractions, st.integers(0, 5))
def test_the_number_of_episodes_is_exact_and_at_least_one(
    shard_lengths: list[int], fraction: float, seed: int
) -> None:
    kept = _records(shard_lengths, fraction, seed)
    assert len(kept) == max(1, round(fraction * sum(shard_lengths)))
    assert len(set(kept)) == len(kept)
    assert all(record < shard_lengths[shard] for shard, record in kept)


@given(lengths, fractions, fractions, st.integers(0, 5))
def test_a_smaller_fraction_is_a_prefix_of_a_larger_one(
    shard_lengths: list[int], one: float, other: float, seed: int
) -> None:
    small, large = sorted((one, other))
    kept = _records(shard_lengths, small, seed)
    assert _records(shard_lengths, large, seed)[: len(kept)] == kept


@given(lengths, fractions, st.integers(0, 5))
def test_all_shards_but_the_last_are_whole(shard_lengths: list[int], fraction: float, seed: int) -> None:
    picks = select(INFO, Split("train", tuple(shard_lengths), 0), fraction, seed)
    assert all(pick.num_episodes == pick.of_episodes for pick in picks[:-1])
    assert all(pick.num_episodes > 0 for pick in picks)


def test_the_seed_decides_which_shards_are_taken() -> None:
    orders = {tuple(_records([1] * 20, 0.5, seed)) for seed in range(10)}
    assert len(orders) == 10


def test_the_choice_is_the_same_on_every_machine() -> None:
    assert [shard for shard, _ in _records([1] * 8, 1.0, 0)] == [0, 7, 1, 3, 2, 5, 6, 4]


def test_rounding_is_pythons() -> None:
    assert num_kept(5, 0.5) == 2
    assert num_kept(7, 0.5) == 4
    assert num_kept(10, 0.001) == 1


def test_a_split_without_episodes_is_refused() -> None:
    with pytest.raises(ValueError, match="holds no episode"):
        select(INFO, Split("train", (0, 0), 0), 0.5, 0)
