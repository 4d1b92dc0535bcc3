"""What `oxe-mix doctor` knows of a dataset before it judges: some of its episodes as small numbers, whether
they came from RLDS or from a converted folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from convert.action_codec import ActionStats
from convert.doctor_frames import CameraTrack
from oxe_mix.cards import Card
from oxe_mix.verdicts import Level

_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a check says of a dataset; `mend`: a command or a few words."""

    level: Level
    text: str
    examples: tuple[str, ...] = ()
    mend: str = ""


def some(ids: Sequence[str]) -> tuple[str, ...]:
    """The first few of what a check found."""
    return tuple(ids[:_SHOWN])


@dataclass(frozen=True, slots=True)
class EpisodeSummary:
    """One episode: T steps after the recipe."""

    id: str  # NAME/SPLIT/SHARD/EPISODE, as in conversations' ids
    steps: NDArray[np.int64]  # [T], their numbers in the source episode
    actions: NDArray[np.float32]  # [T, A], robot units, gripper last; what is not finite stands as it is
    gripper_state: NDArray[np.float32]  # [T], in whatever unit it was recorded; [0] where there is none
    bad_states: int  # values of the robot's state that are not finite
    texts: tuple[str, ...]  # [T], what each step is told
    cameras: tuple[CameraTrack, ...]

    def step(self, place: int) -> str:
        """The id of the step at place `place` of the T."""
        return f"{self.id}/{int(self.steps[place])}"

    @property
    def is_finite(self) -> bool:
        """Whether every action is a number."""
        return bool(np.isfinite(self.actions).all())


@dataclass(frozen=True, slots=True)
class DatasetSummary:
    """One dataset: what was looked at, and what is known of all of it."""

    name: str
    card: Card | None
    width: int  # A
    usual_width: int  # of most of the folder's datasets
    of_episodes: int  # in all of it
    splits: dict[str, int]  # episodes of each
    episodes: tuple[EpisodeSummary, ...]  # those that were looked at
    stats: ActionStats | None  # None where no step is left
    converted: bool = False  # whether it comes from conversations; then `stats` are of every step
    left_out: int = 0  # episodes that a conversion left out, since they have no instruction
    unreadable: tuple[tuple[str, str], ...] = ()  # id, reason
    twins: tuple[tuple[str, str], ...] = ()  # ids of records with the same bytes
    num_compared: int = 0  # records whose bytes were compared
    advised_mods: tuple[str, ...] = ()  # of the card's, those that were not applied

    @property
    def num_steps(self) -> int:
        """Steps looked at."""
        return sum(len(episode.steps) for episode in self.episodes)
