"""What `oxe-mix doctor` says of each thing that it looks at: a level, what was seen, and what mends it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from oxe_mix.text import count, painted

Level = Literal["ok", "warning", "error"]
_LEVELS: tuple[Level, ...] = ("ok", "warning", "error")
_COLOURS: dict[Level, int] = {"ok": 32, "warning": 33, "error": 31}
_WIDEST = max(map(len, _LEVELS))


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
        """What was seen, and where."""
        # The dataset's name stands above.
        short = [place.replace(f"{self.subject}/", "") for place in self.examples]
        return _plain(f"{self.text}, e.g. {', '.join(short)}" if short else self.text)


def _plain(text: str) -> str:
    """One line without what a terminal would obey: data may hold anything."""
    return "".join(letter if letter.isprintable() else "?" for letter in " ".join(text.split()))


def worst(levels: Sequence[Level]) -> Level:
    """The worst of some levels; ok of none."""
    return max(levels, key=_LEVELS.index, default="ok")


def report(verdicts: Sequence[Verdict], *, every: bool) -> str:
    """Subject by subject, those with errors first: what it comes to, and below it each check that is not ok,
    the worst first; `every`: those that are ok, too.
    """
    by_subject: dict[str, list[Verdict]] = {}
    for one in verdicts:
        by_subject.setdefault(one.subject, []).append(one)
    return "\n".join(
        line
        for subject in sorted(by_subject, key=lambda one: _badness(by_subject[one]))
        for line in _subject_lines(by_subject[subject], every=every)
    )


def _badness(verdicts: list[Verdict]) -> tuple[bool, bool]:
    """Sorts what has errors first, then what has warnings."""
    num = tally(verdicts)
    return (num["error"] == 0, num["warning"] == 0)


def _subject_lines(verdicts: list[Verdict], *, every: bool) -> list[str]:
    num = tally(verdicts)
    counts = [count(num["error"], "error"), count(num["warning"], "warning"), f"{num['ok']:,} ok"]
    lines = [f"{_plain(verdicts[0].subject)}: {', '.join(one for one in counts if one[:2] != '0 ')}"]
    shown = [one for one in verdicts if every or one.level != "ok"]
    width = max((len(one.check) for one in shown), default=0)
    for one in sorted(shown, key=lambda one: -_LEVELS.index(one.level)):
        level = painted(one.level, _COLOURS[one.level], sys.stdout) + " " * (_WIDEST - len(one.level))
        lines.append(f"  {level}  {one.check.ljust(width)}  {one.line}")
        if one.mend:
            lines.append(f"  {'':{_WIDEST}}  {'':{width}}  -> {_plain(one.mend)}")
    return lines


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
