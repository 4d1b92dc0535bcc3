"""What a report shows, as values; nothing here is text of a page yet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]
# What an arrow of an action is: the action itself, the change of the pose told since the step before, or
# nothing, where the dimensions are no directions in space.
Motion = Literal["delta", "change", "none"]


@dataclass(frozen=True, slots=True)
class Histogram:
    """Counts over equal intervals of [low, high]; below and above: how many of them lie outside and were
    booked under the first and the last one.
    """

    counts: Counts
    low: float
    high: float
    below: int = 0
    above: int = 0

    @property
    def total(self) -> int:
        """All values."""
        return int(self.counts.sum())


@dataclass(frozen=True, slots=True)
class Dimension:
    """One dimension of a dataset's actions, in robot units."""

    name: str
    histogram: Histogram
    q01: float
    q99: float
    low: float  # the least and the largest that the statistics know
    high: float
    clipped: float  # share of the values that bins cannot say
    bins: Counts  # [NUM_BINS]
    possible: int  # bins that mean something
    is_gripper: bool
    is_constant: bool

    @property
    def is_flat(self) -> bool:
        """A movement with no room between its quantiles has no bins to speak of."""
        return not self.is_gripper and self.q01 == self.q99

    @property
    def meant(self) -> Counts:
        """Counts of the bins that mean something: the last ones."""
        return self.bins[-self.possible :]

    @property
    def used(self) -> int:
        """Bins that occur at all."""
        return int((self.bins > 0).sum())


@dataclass(frozen=True, slots=True)
class Recorded:
    """An episode that was read: T steps of A dimensions; frames: of each step those of all cameras, read when
    asked for, or none at all.
    """

    id: str
    instruction: str
    steps: Counts  # [T], where each stands in the source episode
    actions: Floats  # [T, A], robot units
    frames: tuple[Callable[[], tuple[bytes, ...]], ...] = ()


@dataclass(frozen=True, slots=True)
class Strip:
    """An episode as it is shown: F <= T of its steps have a frame."""

    id: str
    instruction: str
    num_steps: int  # that were read; T are kept
    steps: Counts  # [T]
    actions: Floats  # [T, A], robot units
    arrows: Floats  # [T, 3], as `figures.arrows` has them
    shown: Counts  # [F], places among the T steps
    frames: tuple[bytes, ...]  # [F], JPEG

    @property
    def sheet(self) -> tuple[int, ...]:
        """First, middle and last frame; fewer of a short episode."""
        last = len(self.shown) - 1
        return tuple(dict.fromkeys((0, last // 2, last)))


@dataclass(frozen=True, slots=True)
class Row:
    """A count of a dataset with the words for it; `figure` is what it is called for whoever reads the page
    by program.
    """

    label: str
    value: str
    figure: str = ""


@dataclass(frozen=True, slots=True)
class Share:
    """A part of a whole, drawn as a bar; of is 1 where the label says of what."""

    label: str
    value: float
    text: str


@dataclass(frozen=True, slots=True)
class Told:
    """Instructions: how many different ones, and the most frequent with their episodes."""

    distinct: int
    top: tuple[tuple[str, int], ...]
    of_episodes: int  # over which they are counted
    is_exact: bool  # over all episodes, not over those read


@dataclass(frozen=True, slots=True)
class CardFacts:
    """What a card says of a dataset."""

    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    defects: tuple[tuple[str, str], ...]  # what, and who says so


@dataclass(frozen=True, slots=True)
class DatasetPage:
    """All that is shown of one dataset."""

    name: str
    robot: str
    read: str  # what was sampled, in a sentence
    counts: tuple[Row, ...]
    shares: tuple[Share, ...]  # asked for, and what came of it
    dropped: tuple[Share, ...]
    dimensions: tuple[Dimension, ...]
    statistics: str  # where the quantiles come from
    grippers: tuple[tuple[str, Floats], ...]  # by episode, [T]; empty without a gripper
    lengths: Histogram | None
    length_words: str
    told: Told
    strips: tuple[Strip, ...]
    motion: Motion
    reach: tuple[float, float]  # what is drawn as a full arrow in the plane, and up or down
    facts: CardFacts | None
    problems: tuple[str, ...]
    damage: tuple[str, ...] = ()  # what could not be read


@dataclass(frozen=True, slots=True)
class Overview:
    """The first page: figures, a table of all datasets and what to know about the page."""

    tiles: tuple[Row, ...]
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]  # the first cell of each is its dataset's name
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
