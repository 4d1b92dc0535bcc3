"""One RLDS episode through its card's recipe: standardised actions, instructions and still-encoded frames per
step.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from convert.llava import clean_instruction
from convert.ops import int32_codepoints
from convert.recipe import standardize
from oxe_mix.cards import Card, Language
from oxe_mix.rlds import Episode


@dataclass(frozen=True, slots=True)
class Trajectory:
    """The steps of an episode that the recipe keeps, [T] each; step numbers count in the source episode."""

    actions: NDArray[np.float32]  # [T, A], robot units, gripper last: 0 closed, 1 open
    instructions: list[str]  # as `clean_instruction` leaves them; may be empty at a step
    frames: list[bytes]  # as they stand in the record
    first_step: int  # source index of the first step kept
    num_source_steps: int

    @property
    def labelled(self) -> bool:
        """Whether any step has an instruction; an episode without any is of no use to a language model."""
        return any(self.instructions)

    def instruction(self, t: int) -> str:
        """The step's own instruction, or the episode's first where the step has none."""
        return self.instructions[t] or next(text for text in self.instructions if text)


def read_trajectory(episode: Episode, card: Card) -> Trajectory:
    """An episode's actions, instructions and frames over the steps that the recipe keeps.

    Raises: ValueError as `standardize`, and for an episode whose columns differ in length.
    """
    kept = standardize(episode, card)
    return Trajectory(
        actions=kept.actions,
        instructions=_instructions(episode, card.language)[kept.steps],
        frames=episode.values(card.camera_key)[kept.steps],
        first_step=kept.first_step,
        num_source_steps=episode.num_steps,
    )


def _instructions(episode: Episode, language: Language) -> list[str]:
    if language.decode == "int32_codepoints":
        return [clean_instruction(int32_codepoints(codes)) for codes in episode.array(language.key)]
    return [
        clean_instruction(value.decode("utf-8", errors="replace")) for value in episode.values(language.key)
    ]
