"""A card's recipe over one episode: what the robot was told, and its own state, in robot units."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from convert.ops import apply_op
from oxe_mix.cards import Card, FillTerm, Term
from oxe_mix.rlds import Episode


@dataclass(frozen=True, slots=True)
class Standardized:
    """The actions of the steps that the recipe keeps; `first_step` is where they begin in the source
    episode.
    """

    actions: NDArray[np.float32]  # [T, A], robot units, gripper last: 0 closed, 1 open
    first_step: int

    @property
    def steps(self) -> slice:
        """The source steps that stay."""
        return slice(self.first_step, self.first_step + len(self.actions))


def standardize(episode: Episode, card: Card) -> Standardized:
    """The card's recipe: what the robot was told at each step that stays.

    Returns: float32 [T, A] in robot units; T is the episode's steps less those that the card's trajectory ops
    drop.
    Raises: ValueError for an action that is not finite, naming the source step, and for columns that are not
    there.
    """
    before, after = _dropped(card)
    num_steps = episode.num_steps - before - after
    if num_steps <= 0:
        return Standardized(np.zeros((0, card.action.dims), np.float32), before)
    columns = [_term(episode, term, before) for term in card.action.recipe]
    actions = np.concatenate(columns, axis=1)[:num_steps]
    _refuse_non_finite(actions, "action", before)
    return Standardized(actions, before)


def proprioception(episode: Episode, card: Card) -> NDArray[np.float32]:
    """The robot's own state at every source step, [T, S]; S is 0 for a card without state.

    Raises: ValueError for a state that is not finite, naming the step.
    """
    if not card.state.parts:
        return np.zeros((episode.num_steps, 0), np.float32)
    states = np.concatenate([_term(episode, term, 0) for term in card.state.parts], axis=1)
    _refuse_non_finite(states, "state", 0)
    return states


def _refuse_non_finite(values: NDArray[np.float32], what: str, first: int) -> None:
    if not np.isfinite(values).all():
        t, a = np.argwhere(~np.isfinite(values))[0]
        raise ValueError(f"step {t + first}, dimension {a}: {what} is {values[t, a]}")


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
