"""What `oxe-mix doctor` says of each thing that it looks at: a level, what was seen, and what mends it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from oxe_mix.text import count

Level = Literal["ok", "warning", "error"]
_LEVELS: tuple[Level, ...] = ("ok", "warning", "error")


@dataclass(frozen=True, slots=True)
class Verdict:
    """One check of one subject; `mend` is a command or a few words, empty where there is nothing to mend."""

    level: Level
    subject: str  # a dataset; `machine` or `environment` where no data is looked at
    check: str
    text: str
    examples: tuple[str, ...] = ()  # as in conversations' ids: NAME/SPLIT/SHARD/EPISODE, /STEP behind it
    mend: str = ""

    @property
    def line(self) -> str:
        """What was seen, where, and what to do about it, in one line."""
        # The dataset's name stands in its own column.
        short = [place.replace(f"{self.subject}/", "") for place in self.examples]
        where = f", e.g. {', '.join(short)}" if short else ""
        return _plain(f"{self.text}{where}{f'; {self.mend}' if self.mend else ''}")


def _plain(text: str) -> str:
    """One line without what a terminal would obey: data may hold anything."""
    return "".join(letter if letter.isprintable() else "?" for letter in " ".join(text.split()))


def worst(levels: Sequence[Level]) -> Level:
    """The worst of some levels; ok of none."""
    return max(levels, key=_LEVELS.index, default="ok")


def report(verdicts: Sequence[Verdict]) -> str:
    """One line each, in columns, all but the last as wide as they need to be."""
    rows = [(one.level, _plain(one.subject), one.check, one.line) for one in verdicts]
    widths = [max(map(len, column)) for column in list(zip(*rows, strict=True))[:-1]]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]])
        for row in rows
    )


def summary(verdicts: Sequence[Verdict]) -> str:
    """`12 ok, 1 warning, no errors`."""
    num = tally(verdicts)
    errors = count(num["error"], "error") if num["error"] else "no errors"
    return f"{num['ok']:,} ok, {count(num['warning'], 'warning')}, {errors}"


def tally(verdicts: Sequence[Verdict]) -> dict[Level, int]:
    """How many there are of each level."""
    return {level: sum(verdict.level == level for verdict in verdicts) for level in _LEVELS}


def as_json(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """The same for programs."""
    return {"counts": tally(verdicts), "checks": [asdict(verdict) for verdict in verdicts]}
