"""What `oxe-mix pack` found in the numbers: enough to see a wrong unit or a wrong sign at a glance."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from oxe_mix.cards import ActionKind
from oxe_mix.pack_card import OBSERVATION
from oxe_mix.pack_csv import Columns, Steps
from oxe_mix.rlds import Key
from oxe_mix.text import table


@dataclass(slots=True)
class Seen:
    """The range of each vector's columns so far, [d] each."""

    low: NDArray[np.float32]
    high: NDArray[np.float32]


@dataclass(slots=True)
class NumbersReport:
    """Ranges of all columns, and how far the state follows an action column of the same name.

    The last is the slope of a line through the origin: 1 where both have the same unit and sign, -1 where a
    sign is wrong, 57.3 where one is in degrees and the other in radians.
    """

    columns: Columns
    kind: ActionKind
    seen: dict[Key, Seen] = field(default_factory=dict)
    _sums: dict[str, tuple[float, float]] = field(default_factory=dict)

    def add(self, steps: Steps) -> None:
        """Take in an episode."""
        for key, vector in steps.vectors.items():
            low, high = vector.min(axis=0), vector.max(axis=0)
            old = self.seen.get(key, Seen(low, high))
            self.seen[key] = Seen(np.minimum(old.low, low), np.maximum(old.high, high))
        for action, state in self._pairs().items():
            told, was = self._column(steps, action)[:-1], self._column(steps, state)
            # A gripper's command is a position, whatever the other columns are.
            moves = self.kind == "delta" and "grip" not in action
            became = was[1:] - was[:-1] if moves else was[1:]
            above, below = self._sums.get(action, (0.0, 0.0))
            self._sums[action] = (above + float(told @ became), below + float(told @ told))

    def __str__(self) -> str:
        """A table, one row a column."""
        rows = []
        for key, names in self.columns.vectors.items():
            seen = self.seen[key]
            for name, low, high in zip(names, seen.low, seen.high, strict=True):
                above, below = self._sums.get(name, (0.0, 0.0))
                rows.append((name, f"{low:.4g}", f"{high:.4g}", f"{above / below:.3g}" if below else ""))
        return table(("column", "min", "max", "state/action"), rows)

    def _pairs(self) -> dict[str, str]:
        """Columns of an action, each with the column below `observation` that is called the same."""
        states: dict[str, list[str]] = {}
        for key, names in self.columns.vectors.items():
            for name in names if key[0] == OBSERVATION else ():
                states.setdefault(name.rsplit(".", 1)[-1], []).append(name)
        actions = (
            name for key, names in self.columns.vectors.items() if key[0] != OBSERVATION for name in names
        )
        found = {name: states.get(name.rsplit(".", 1)[-1], []) for name in actions}
        return {name: own[0] for name, own in found.items() if len(own) == 1}

    def _column(self, steps: Steps, name: str) -> NDArray[np.float64]:
        key = next(key for key, names in self.columns.vectors.items() if name in names)
        return steps.vectors[key][:, self.columns.vectors[key].index(name)].astype(np.float64)
