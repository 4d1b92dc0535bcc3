"""One RLDS episode through its card's recipe: standardised actions, the robot's state and instructions per
step. Frames stay encoded in the episode until a step is chosen.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from convert.ops import int32_codepoints
from convert.prompt import CAMERA_ROLES, CameraRole, clean_instruction
from convert.recipe import proprioception, standardize
from oxe_mix.cards import Card, Language
from oxe_mix.rlds import Episode, Key


@dataclass(frozen=True, slots=True)
class Trajectory:
    """The steps of an episode that the recipe keeps, [T] each; step numbers count in the source episode."""

    actions: NDArray[np.float32]  # [T, A], robot units, gripper last: 0 closed, 1 open
    states: NDArray[np.float32]  # [T, S], robot units; S is 0 where nobody asked for the state
    instructions: list[str]  # as `clean_instruction` leaves them; may be empty at a step
    first_step: int  # source index of the first step kept

    @property
    def first_instruction(self) -> str:
        """What unlabelled steps are told; empty when no step has an instruction: then the episode is of no
        use to a language model.
        """
        return next((text for text in self.instructions if text), "")


def read_trajectory(episode: Episode, card: Card, *, state: bool) -> Trajectory:
    """An episode's actions, states and instructions over the steps that the recipe keeps.

    Raises: ValueError as `standardize`, and for an episode whose columns differ in length.
    """
    kept = standardize(episode, card)
    states = proprioception(episode, card) if state else np.zeros((episode.num_steps, 0), np.float32)
    return Trajectory(
        actions=kept.actions,
        states=states[kept.steps],
        instructions=instructions_of(episode, card.language)[kept.steps],
        first_step=kept.first_step,
    )


def cameras_of(card: Card, asked: tuple[CameraRole, ...]) -> dict[CameraRole, Key]:
    """The features behind the cameras that a user asks for, in that order; those that the dataset does not
    have are left out.

    The primary camera of a dataset that only has one on its arm is that one; never an invented frame.
    """
    names = card.cameras.model_dump()
    found: dict[CameraRole, Key] = {
        role: ("observation", names[role]) for role in CAMERA_ROLES if role in asked and names[role]
    }
    if "primary" in asked and "primary" not in found and "wrist" not in found:
        found["primary"] = card.camera_key
    return {role: found[role] for role in asked if role in found}


def instructions_of(episode: Episode, language: Language) -> list[str]:
    """What each source step is told, [T], as `clean_instruction` leaves it.

    Raises: ValueError when there is not one text for each step.
    """
    if language.decode == "int32_codepoints":
        codes = episode.array(language.key)
        texts: list[str] = []
        for t, row in enumerate(codes):
            # A step mostly says what the one before it said, and 512 code points take as long as its frame.
            same = t > 0 and np.array_equal(row, codes[t - 1])
            texts.append(texts[-1] if same else clean_instruction(int32_codepoints(row)))
        return texts
    return [
        clean_instruction(value.decode("utf-8", errors="replace")) for value in episode.values(language.key)
    ]
