"""The order of a mixture: exact shares, passes without replacement, any position at once."""

from __future__ import annotations

import itertools
import tracemalloc
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oxe_mix.errors import UserError
from train_llava.mixture import MixedOrder, Permutation, SourceRange, share_out

PARTS = st.lists(st.tuples(st.integers(0, 60), st.floats(0.1, 5)), min_size=1, max_size=4).filter(
    lambda parts: any(size for size, _ in parts)
)


def order_of(parts: list[tuple[int, float]], seed: int = 0) -> MixedOrder:
    starts = itertools.accumulate((size for size, _ in parts), initial=7)
    return MixedOrder(
        [
            SourceRange(f"s{i}", range(start, start + size), weight)
            for i, ((size, weight), start) in enumerate(zip(parts, starts, strict=False))
        ],
        seed,
    )


def drawn(order: MixedOrder, first: int, last: int) -> list[tuple[int, int]]:
    return list(order.of_rank(0, 1, first, last))


@settings(max_examples=60)
@given(st.integers(1, 3000), st.integers(0, 2**40), st.integers(0, 100))
def test_a_permutation_takes_each_number_to_another(size: int, seed: int, key: int) -> None:
    numbers = np.arange(size)
    out = Permutation(size, seed, key)(numbers)
    assert np.array_equal(np.sort(out), numbers)
    assert np.array_equal(Permutation(size, seed, key)(numbers[::-1]), out[::-1])


@pytest.mark.parametrize("size", [5, 16, 17])
def test_every_number_goes_everywhere_alike(size: int) -> None:
    places = np.stack([Permutation(size, 3, key)(np.arange(size)) for key in range(4000)])
    expected = len(places) / size
    for number in range(size):
        counts = np.bincount(places[:, number], minlength=size)
        assert ((counts - expected) ** 2 / expected).sum() < size - 1 + 5 * np.sqrt(2 * (size - 1))
    # Neighbours do not stay together.
    steps = np.bincount((places[:, 1] - places[:, 0]) % size, minlength=size)[1:]
    expected = len(places) / (size - 1)
    assert ((steps - expected) ** 2 / expected).sum() < size - 2 + 5 * np.sqrt(2 * (size - 2))


def test_the_order_of_a_large_epoch_is_spread_evenly() -> None:
    size, cells = 1_000_000, 40
    first = Permutation(size, 1, 2)(np.arange(40_000)) * cells // size
    second = Permutation(size, 1, 2)(np.arange(1, 40_001)) * cells // size
    expected = 40_000 / cells**2
    counts = np.bincount(first * cells + second, minlength=cells**2)
    assert abs(((counts - expected) ** 2 / expected).sum() - cells**2) < 5 * np.sqrt(2 * cells**2)


@settings(max_examples=60)
@given(PARTS, st.integers(0, 3), st.integers(0, 5))
def test_an_epoch_draws_each_source_in_proportion_to_weight_times_samples(
    parts: list[tuple[int, float]], seed: int, epoch: int
) -> None:
    order = order_of(parts, seed)
    size = sum(size for size, _ in parts)
    assert len(order) == size
    counts = Counter(drawn(order, epoch * size, (epoch + 1) * size))
    total = sum(size * weight for size, weight in parts)
    for i, (source, (of_source, weight)) in enumerate(zip(order.sources, parts, strict=True)):
        own = [counts[i, index] for index in source.samples]
        assert sum(own) == order.draws[source.name]
        assert abs(sum(own) - size * weight * of_source / total) < 1
        assert not own or max(own) - min(own) <= 1  # none comes again before all have come
    assert sum(counts.values()) == size
    assert sum(order.draws.values()) == size


@settings(max_examples=40)
@given(PARTS, st.integers(1, 6))
def test_what_an_epoch_leaves_out_comes_in_the_next(parts: list[tuple[int, float]], epochs: int) -> None:
    order = order_of(parts)
    counts = Counter(drawn(order, 0, epochs * len(order)))
    for i, source in enumerate(order.sources):
        own = [counts[i, index] for index in source.samples]
        assert not own or max(own) - min(own) <= 1


@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.integers(0, 4))
def test_weight_one_everywhere_is_one_pass(sizes: list[int], epoch: int) -> None:
    order = order_of([(size, 1.0) for size in sizes])
    once = drawn(order, epoch * len(order), (epoch + 1) * len(order))
    assert sorted(once) == [(i, index) for i, s in enumerate(order.sources) for index in s.samples]


@settings(max_examples=60)
@given(PARTS, st.integers(1, 7), st.integers(0, 200), st.integers(0, 200))
def test_ranks_together_draw_what_one_rank_draws_from_any_position(
    parts: list[tuple[int, float]], num_ranks: int, start: int, more: int
) -> None:
    order = order_of(parts)
    whole = drawn(order, 0, start + more)
    ranks = [list(order.of_rank(rank, num_ranks, start, start + more)) for rank in range(num_ranks)]
    together = [sample for step in itertools.zip_longest(*ranks) for sample in step if sample is not None]
    assert together == whole[start:]
    assert [order.sample_at(position) for position in range(start, start + min(more, 3))] == together[:3]


def test_epochs_and_seeds_differ_and_the_stream_does_not_end() -> None:
    order = order_of([(300, 1.0), (100, 1.0)])
    first, second = drawn(order, 0, 400), drawn(order, 400, 800)
    assert first != second
    assert sorted(first) == sorted(second)
    assert first != drawn(order_of([(300, 1.0), (100, 1.0)], seed=1), 0, 400)
    assert list(itertools.islice(order.of_rank(0, 1, 10**12), 3)) == drawn(order, 10**12, 10**12 + 3)


def test_the_realised_shares_are_counted() -> None:
    order = order_of([(300, 1.0), (0, 1.0), (100, 3.0)])
    assert order.realised(range(len(order))) == {"s0": 0.5, "s1": 0.0, "s2": 0.5}
    part = Counter(source for source, _ in drawn(order, 5, 105))
    assert order.realised(range(5, 105)) == {"s0": part[0] / 100, "s1": 0.0, "s2": part[2] / 100}
    assert order.realised(range(0)) == {"s0": 0.0, "s1": 0.0, "s2": 0.0}


@given(st.integers(0, 10**9), st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=9))
def test_what_is_shared_out_sums_up_and_is_within_one(total: int, weights: list[float]) -> None:
    parts = [Fraction(weight) for weight in weights]
    shares = share_out(total, parts)
    assert sum(shares) == total
    assert all(abs(share - total * part / sum(parts)) < 1 for share, part in zip(shares, parts, strict=True))


def test_memory_does_not_grow_with_the_samples() -> None:
    order = order_of([(2_000_000, 1.0), (500_000_000, 0.5)])
    tracemalloc.start()
    try:
        for _ in order.of_rank(3, 8, 123_456_789, 123_456_789 + 8 * 30_000):
            pass
        order.realised(range(100_000))
        assert tracemalloc.get_traced_memory()[1] < 3e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([], "the mixture has no source with a sample and a weight above 0"),
        ([SourceRange("a", range(0), 1.0)], "the mixture has no source"),
        ([SourceRange("a", range(3), 0.0)], "the mixture has no source"),
        ([SourceRange("a", range(3), -1.0)], "a: the weight -1.0 is not a number of 0 or more"),
        ([SourceRange("a", range(3), float("nan"))], "a: the weight nan is not"),
        ([SourceRange("a", range(3), 1.0)] * 2, "two sources of the mixture are called a"),
    ],
)
def test_a_mixture_of_nothing_is_refused(sources: list[SourceRange], message: str) -> None:
    with pytest.raises(UserError, match=message):
        MixedOrder(sources, 0)
