"""One stream of samples from several sources, by weight. Which sample stands at which position is a formula:
a run goes on at any position, on any number of ranks, and no order is ever kept in memory.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from oxe_mix.errors import UserError

_ROUNDS = 6
_BLOCK = 4096  # positions worked out at a time: 0.3 us each, where one alone costs 100
_OF_SOURCE, _OF_EPOCH = 1, 2  # what a permutation's key is for


class Permutation:
    """A seeded order of 0 … size - 1, worked out number by number.

    Source: generalised Feistel network and cycle walking, Black and Rogaway, "Ciphers with Arbitrary Finite
    Domains" (CT-RSA 2002); the rounds mix with splitmix64's finalizer.
    """

    def __init__(self, size: int, *key: int) -> None:
        """`key`: numbers from 0; another key, another order."""
        self.size = size
        # The network permutes side² numbers, hardly more than size, so hardly any walk takes a second step.
        self._side = np.uint64(math.isqrt(max(size - 1, 0)) + 1)
        self._keys = np.random.SeedSequence(key).generate_state(_ROUNDS, np.uint64)

    def __call__(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where [N] numbers of 0 … size - 1 go; int64 [N], all different when the numbers are."""
        out = self._step(numbers.astype(np.uint64))
        while (outside := out >= self.size).any():
            out[outside] = self._step(out[outside])
        return out.astype(np.int64)

    def _step(self, numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = np.divmod(numbers, self._side)
        for key in self._keys:
            # The remainder is taken before the sum too: one that wraps at 2^64 would map two numbers to one.
            left, right = right, (left + _mixed(right + key) % self._side) % self._side
        return left * self._side + right


def _mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@dataclass(frozen=True, slots=True)
class SourceRange:
    """One source of a mixture: a dataset of a converted folder, or some LLaVA data."""

    name: str
    samples: range  # indices in its reader, or in several readers one after the other
    weight: float


def share_out(total: int, parts: Sequence[Fraction]) -> list[int]:
    """Whole numbers in proportion to `parts` that sum to `total`: the largest remainders get what rounding
    leaves. Exact, so every machine shares out alike.
    """
    whole_of_parts = sum(parts, Fraction())
    exact = [total * part / whole_of_parts for part in parts]
    shares = [math.floor(value) for value in exact]
    by_remainder = sorted(range(len(parts)), key=lambda i: (shares[i] - exact[i], i))
    for i in by_remainder[: total - sum(shares)]:
        shares[i] += 1
    return shares


class MixedOrder:
    """The sample at every position of an endless stream of epochs; a function of sources and seed alone.

    An epoch is as many draws as there are samples, P(source) proportional to weight x its samples, the shares
    exact to one draw. Within an epoch, and after any number of whole epochs, no sample of a source has come
    twice more than another; weight 1 everywhere makes each epoch one pass over everything.
    """

    def __init__(self, sources: Sequence[SourceRange], seed: int) -> None:
        """Raises: UserError for a name that stands twice, a weight that is none, and when there is nothing to
        draw.
        """
        _check(sources)
        self.sources = tuple(sources)
        self._sizes = [len(source.samples) for source in sources]
        parts = [Fraction(source.weight) * size for source, size in zip(sources, self._sizes, strict=True)]
        self._draws = share_out(sum(self._sizes), parts)
        self._ends = np.cumsum(self._draws)
        self._orders = [Permutation(size, seed, _OF_SOURCE, i) for i, size in enumerate(self._sizes)]
        self._seed = seed

    def __len__(self) -> int:
        """Draws of an epoch: position len(order) is the first of the second one."""
        return sum(self._sizes)

    @property
    def draws(self) -> dict[str, int]:
        """How often an epoch draws from each source."""
        return {source.name: draws for source, draws in zip(self.sources, self._draws, strict=True)}

    def sample_at(self, position: int) -> tuple[int, int]:
        """The sample at one position: the number of its source, and its index there."""
        sources, indices = self.samples_at(np.array([position]))
        return int(sources[0]), int(indices[0])

    def samples_at(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The samples at [N] positions of 0 and above: the numbers of their sources [N], and their indices
        there [N].
        """
        epochs, slots = np.divmod(positions, len(self))
        for epoch in np.unique(epochs):
            here = epochs == epoch
            slots[here] = Permutation(len(self), self._seed, _OF_EPOCH, int(epoch))(slots[here])
        # An epoch's slots, in order, are the draws of the first source, then those of the second, and so on.
        sources = np.searchsorted(self._ends, slots, side="right")
        indices = np.empty_like(slots)
        for i in np.unique(sources):
            here = sources == i
            draws, size, samples = self._draws[i], self._sizes[i], self.sources[i].samples
            # Each epoch goes on in the source's one order where the last one left it: consecutive places of a
            # cycle, so what an epoch left out comes in the next.
            places = (epochs[here] * draws + slots[here] - (self._ends[i] - draws)) % size
            indices[here] = samples.start + samples.step * self._orders[i](places)
        return sources, indices

    def of_rank(
        self, rank: int, num_ranks: int, start: int = 0, stop: int = sys.maxsize
    ) -> Iterator[tuple[int, int]]:
        """What one of the ranks draws, as (number of the source, index there), `start` draws into the run.

        Args:
            rank: of 0 … num_ranks - 1; it takes the positions start + rank, start + rank + num_ranks, …
            num_ranks: the ranks together take every position once, in the same order however many they are.
            start: draws that all ranks together have made before.
            stop: the position at which all of them end; without one they never do.
        """
        stride = _BLOCK * num_ranks
        for first in range(start + rank, stop, stride):
            sources, indices = self.samples_at(np.arange(first, min(first + stride, stop), num_ranks))
            yield from zip(sources.tolist(), indices.tolist(), strict=True)

    def realised(self, positions: range) -> dict[str, float]:
        """The share of each source in the draws at some positions; 0 everywhere when there are none."""
        counts = np.zeros(len(self.sources), np.int64)
        for first in range(0, len(positions), _BLOCK):
            block = positions[first : first + _BLOCK]
            sources, _ = self.samples_at(np.arange(block.start, block.stop, block.step))
            counts += np.bincount(sources, minlength=len(counts))
        shares = (counts / max(len(positions), 1)).tolist()
        return {source.name: share for source, share in zip(self.sources, shares, strict=True)}


def _check(sources: Sequence[SourceRange]) -> None:
    names = [source.name for source in sources]
    for source in sources:
        if names.count(source.name) > 1:
            raise UserError(f"two sources of the mixture are called {source.name}; give each its own name")
        if not (math.isfinite(source.weight) and source.weight >= 0):
            raise UserError(f"{source.name}: the weight {source.weight} is not a number of 0 or more")
    if not any(len(source.samples) and source.weight for source in sources):
        raise UserError("the mixture has no source with a sample and a weight above 0")
