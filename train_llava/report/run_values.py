"""What a report shows of a training run, as values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from train_llava.report.values import Floats, Row, Share

# What a curve or a bar is of; the style sheet has a colour for each.
Look = Literal["model", "shuffled", "mean", "repeat", "faint"]


@dataclass(frozen=True, slots=True)
class Curve:
    """A line of a chart through N points."""

    label: str
    look: Look
    xs: Floats  # [N]
    ys: Floats  # [N], not finite where there is no value


@dataclass(frozen=True, slots=True)
class Chart:
    """Curves over the steps of a run; the box is x0, x1, y0, y1."""

    title: str
    unit: str
    curves: tuple[Curve, ...]
    box: tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class Bar:
    """One policy's figure, as a share of the largest one beside it."""

    label: str
    look: Look
    share: float
    text: str


@dataclass(frozen=True, slots=True)
class DatasetScore:
    """How far the policies are from what was recorded in one dataset."""

    name: str
    samples: int
    bars: tuple[Bar, ...]
    near: tuple[Share, ...]  # of the model's bins by distance
    header: tuple[str, ...]  # names of the policies
    units: tuple[tuple[str, ...], ...]  # by dimension: its name, then each policy's L1 in robot units


@dataclass(frozen=True, slots=True)
class Guess:
    """A held-out sample: what was recorded and what the model says, robot units, [A] each."""

    id: str
    instruction: str
    frame: bytes  # JPEG
    names: tuple[str, ...]  # [A]
    recorded: Floats
    predicted: Floats
    arrows: tuple[tuple[float, float], ...]  # recorded and predicted in the plane, within 1; none without
    arrow_words: str  # how long a full one is, or why there is none
    off: int  # bins, of the dimension that is furthest away


@dataclass(frozen=True, slots=True)
class RunPage:
    """All that is shown of a run; what a file that is not there would have said is empty."""

    charts: tuple[Chart, ...]
    header: tuple[str, ...]
    scores: tuple[tuple[str, ...], ...]  # by policy
    score_words: str
    datasets: tuple[DatasetScore, ...]
    near: tuple[tuple[str, tuple[Share, ...]], ...]  # by policy: shares of the bins by distance
    near_words: str
    guesses: tuple[Guess, ...]
    guess_words: str
    facts: tuple[Row, ...]
