"""A card's recipe over one episode: what the robot was told, and its own state, in robot units."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from convert.ops import apply_op
from oxe_mix.cards import Card, FillTerm, Term
from oxe_mix.rlds import Episode

# A scaled column this near to a scaled zero does not move; OpenVLA's threshold.
_IDLE = 1e-5


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
    kept = recorded(episode, card)
    _refuse_non_finite(kept.actions, "action", kept.first_step)
    return kept


def recorded(episode: Episode, card: Card) -> Standardized:
    """The same with whatever was recorded, values that are not finite too: for who looks for them.

    Raises: ValueError for columns that are not there.
    """
    before, first, last = _dropped(card)
    first_step, end = before + first, episode.num_steps - before - last
    if end <= first:
        return Standardized(np.zeros((0, card.action.dims), np.float32), first_step)
    columns = [_term(episode, term, before) for term in card.action.recipe]
    return Standardized(np.concatenate(columns, axis=1)[first:end], first_step)


def zero_action(actions: NDArray[np.float32], card: Card) -> NDArray[np.bool_]:
    """Which steps are idle and to be dropped, by the card's `drop_zero`; none without it.

    Args:
        actions: [T, A], robot units, as `standardize` gives them.

    Returns: bool [T]; true where no column that `drop_zero` names, scaled to [-1, 1] by its quantiles, is
        further than 1e-5 from a zero scaled alike.
    Source: OpenVLA's zero_action_filter. That scales the actions by the statistics of the data and the zero
        by the fixed quantiles, so with part of the data it finds no idle step; here both are scaled alike.
    """
    drop = card.action.drop_zero
    if drop is None:
        return np.zeros(len(actions), np.bool_)
    width = len(drop.q01)
    scaled = 2 * actions[:, :width].astype(np.float64) / (np.array(drop.q99) - np.array(drop.q01) + 1e-8)
    return np.asarray((np.abs(scaled) <= _IDLE).all(axis=1))


def proprioception(episode: Episode, card: Card) -> NDArray[np.float32]:
    """The robot's own state at every source step, [T, S]; S is 0 for a card without state.

    Raises: ValueError for a state that is not finite, naming the step.
    """
    states = recorded_state(episode, card)
    _refuse_non_finite(states, "state", 0)
    return states


def recorded_state(episode: Episode, card: Card) -> NDArray[np.float32]:
    """The same with values that are not finite, too. Raises: ValueError for columns that are not there."""
    if not card.state.parts:
        return np.zeros((episode.num_steps, 0), np.float32)
    return np.concatenate([_term(episode, term, 0) for term in card.state.parts], axis=1)


def _refuse_non_finite(values: NDArray[np.float32], what: str, first: int) -> None:
    if not np.isfinite(values).all():
        t, a = np.argwhere(~np.isfinite(values))[0]
        raise ValueError(f"step {t + first}, dimension {a}: {what} is {values[t, a]}")


def _dropped(card: Card) -> tuple[int, int, int]:
    """Steps that the card drops: at the start before the recipe, at the start and at the end after it."""
    action = card.action
    return (
        int("drop_first_step" in action.trajectory_before),
        int("drop_first_step" in action.trajectory_after),
        int("drop_last_step" in action.trajectory_after),
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
