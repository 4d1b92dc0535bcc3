"""Which episodes of a dataset are read: all, or so many that a report takes seconds, drawn by a seed."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import numpy as np

from convert.reader import ConversationReader
from train_llava.acting.episodes import stretches

MOST_EPISODES = 150  # of a dataset
MOST_STEPS = 4_000  # of a dataset: no episode is begun beyond
MOST_STRIPES = 12  # episodes whose gripper is drawn
_ALL = 2_500  # samples of a dataset that are read without a choice
_SPARE = 3  # places tried for each episode that is wanted: some meet in one


def drawn_episodes(reader: ConversationReader, samples: range, seed: int) -> Iterator[range]:
    """The samples of episodes of one dataset, each once, in an order that the seed decides.

    Of a large dataset only as many as a report reads: each is the episode that begins next after a place
    drawn at random, since those at random places themselves would mostly be long ones.
    """
    rng = np.random.default_rng(seed)
    if len(samples) <= _ALL:
        every = [own for _, own in stretches(reader, samples)]
        yield from (every[i] for i in rng.permutation(len(every)))
        return
    seen = set()
    for place in rng.integers(samples.start, samples.stop, _SPARE * MOST_EPISODES).tolist():
        found = _next_episode(reader, samples, place)
        if found.start not in seen:
            seen.add(found.start)
            yield found


def _next_episode(reader: ConversationReader, samples: range, place: int) -> range:
    """The first one that begins behind a place; behind the last one stands the first."""
    ahead = [own for _, own in islice(stretches(reader, range(place, samples.stop)), 2)]
    if len(ahead) == 2:
        return ahead[1]
    return next(own for _, own in stretches(reader, samples))
