"""What the dimensions of an action are called."""

from __future__ import annotations

from oxe_mix.cards import Card

# What EEF_POS on a card means. Which rotations they are, cards do not say.
ARM = ("x", "y", "z", "rotation 1", "rotation 2", "rotation 3", "gripper")


def is_arm(card: Card | None, width: int) -> bool:
    """Whether an action moves an arm's hand in space; of other actions nobody knows what points where."""
    return card is not None and card.action.encoding == "EEF_POS" and width == len(ARM)


def dimension_names(card: Card | None, width: int) -> tuple[str, ...]:
    """Names of the [width] dimensions: an arm's have some, others are counted from 0, as in messages."""
    return ARM if is_arm(card, width) else tuple(f"dimension {a}" for a in range(width))
