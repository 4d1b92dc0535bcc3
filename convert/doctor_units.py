"""Are movements of a size that an arm can make in one step? Of most datasets nobody published the ranges, so
this is a heuristic: it finds millimetres and degrees, not a factor of two.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from convert.doctor_summary import DatasetSummary, Outcome
from oxe_mix.cards import Card

# Smallest and largest reach (1 % to 99 %) of a movement. A step of 1 m or rad at 3 Hz, the slowest arm of the
# cards, is faster than a Franka Panda goes (1.7 m/s, 2.5 rad/s: Franka's FCI documentation); controllers that
# take -1 to 1 stay within. Arms repeat a position to 0.1 mm, which at the end of 1 m is 1e-4 rad: below, they
# do not move.
_DELTA = {"m": (1e-4, 1.0), "rad": (1e-4, 1.0)}
# No arm of the cards reaches 10 m, and an angle comes round again.
_POSE = {"m": (0.0, 10.0), "rad": (0.0, 2 * math.pi)}
_NAMES = {"m": "positions", "rad": "angles"}
_MEND = (
    "training scales it away, but a robot is sent these units: name them in action.units of a card of your "
    "own (docs/add-a-robot.md), or pack again in m and rad"
)


def plausible_units(data: DatasetSummary) -> Outcome:
    """Whether positions may be metres and angles radians, as far as the card does not say otherwise."""
    if data.stats is None or data.card is None:
        return Outcome("ok", "not looked at: no card")
    units, limits = _units(data.card), _DELTA if data.card.action_kind == "delta" else _POSE
    reach = np.maximum(np.abs(data.stats.q01), np.abs(data.stats.q99))
    moving = np.array(data.stats.mask) & (np.array(data.stats.min) < np.array(data.stats.max))
    said = list[str]()
    for unit, (low, high) in limits.items():
        dims = [a for a in np.flatnonzero(moving).tolist() if units[a] == unit]
        far = max(dims, key=lambda a: reach[a], default=None)
        if far is None:
            continue
        if reach[far] > high:
            said.append(_told(unit, far, reach[far], f"more than {high:.3g} {unit} {_per(data.card)}"))
        elif reach[far] < low:
            said.append(_told(unit, far, reach[far], f"all below {low:g} {unit} {_per(data.card)}"))
    if said:
        return Outcome("warning", f"{'; '.join(said)} (a heuristic)", mend=_MEND)
    return Outcome("ok", "of a size for m and rad (a heuristic)")


def _told(unit: str, dimension: int, reach: float, why: str) -> str:
    return f"{_NAMES[unit]} reach {reach:.3g} in dimension {dimension}, {why}: another unit"


def _per(card: Card) -> str:
    return "a step" if card.action_kind == "delta" else "from the base"


def _units(card: Card) -> Sequence[str]:
    """The unit of each action dimension: what the card says, else what its encoding is meant to be in."""
    if card.action.units is not None:
        return card.action.units
    return [
        "m" if card.action.encoding == "EEF_POS" and a < len("xyz") else "rad"
        for a in range(card.action.dims)
    ]
