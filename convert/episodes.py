"""One RLDS episode through its card's recipe: standardised actions, instructions and still-encoded frames per
step.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from convert.llava import clean_instruction
from convert.ops import apply_op, int32_codepoints
from oxe_mix.cards import Card, FillTerm, Language, Term
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


def standardize(episode: Episode, card: Card) -> NDArray[np.float32]:
    """The card's recipe: what the robot was told at each step that stays.

    Returns: float32 [T, A], robot units; T is the episode's steps less those that the card's trajectory ops
    drop.
    Raises: ValueError for an action that is not finite, naming the source step, and for columns that are not
    there.
    """
    before, after = _dropped(card)
    num_steps = episode.num_steps - before - after
    if num_steps <= 0:
        return np.zeros((0, card.action.dims), np.float32)
    columns = [_term(episode, term, before) for term in card.action.recipe]
    actions = np.concatenate(columns, axis=1)[:num_steps]
    if not np.isfinite(actions).all():
        t, a = np.argwhere(~np.isfinite(actions))[0]
        raise ValueError(f"step {t + before}, dimension {a}: action is {actions[t, a]}")
    return actions


def read_trajectory(episode: Episode, card: Card) -> Trajectory:
    """An episode's actions, instructions and frames over the steps that the recipe keeps.

    Raises: ValueError as `standardize`, and for an episode whose columns differ in length.
    """
    actions = standardize(episode, card)
    first, _ = _dropped(card)
    kept = slice(first, first + len(actions))
    return Trajectory(
        actions=actions,
        instructions=_instructions(episode, card.language)[kept],
        frames=episode.values(card.camera_key)[kept],
        first_step=first,
        num_source_steps=episode.num_steps,
    )


def _dropped(card: Card) -> tuple[int, int]:
    """Steps that the card drops at the start and at the end."""
    return (
        int("drop_first_step" in card.action.trajectory_before),
        int("drop_last_step" in card.action.trajectory_after),
    )


def _term(episode: Episode, term: Term, before: int) -> NDArray[np.float32]:
    """One term of a recipe, [T, d], over the steps from index `before` on."""
    if isinstance(term, FillTerm):
        return np.full((episode.num_steps - before, term.dims), term.fill, np.float32)
    # A scalar per step is one column.
    x = episode.array(term.key).astype(np.float32).reshape(episode.num_steps, -1)[before:]
    for op in term.ops:
        x = apply_op(x, op)
    return x


def _instructions(episode: Episode, language: Language) -> list[str]:
    if language.decode == "int32_codepoints":
        return [clean_instruction(int32_codepoints(codes)) for codes in episode.array(language.key)]
    return [
        clean_instruction(value.decode("utf-8", errors="replace")) for value in episode.values(language.key)
    ]
