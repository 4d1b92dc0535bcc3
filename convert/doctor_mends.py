"""What a user can do about a fault. A command stands as it is typed, from `oxe-mix` to the next semicolon or
the end; the words in capitals are put in when the folder is known.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from convert.doctor_summary import DatasetSummary

CONVERT = "oxe-mix convert --data DATA"
LOOK = "oxe-mix report FOLDER"
CARD = "oxe-mix datasets NAME CARDS"
OWN_CARD = "a card of your own (docs/add-a-robot.md)"
LEAVE_OUT = (
    "no option leaves out chosen episodes: take NAME out of the mix, or pack your own recordings without them"
)
_LEAST_SKIPPED = 10  # convert's own limit


@dataclass(frozen=True, slots=True)
class Place:
    """What is looked at: a folder of RLDS or of conversations, and the cards given with it."""

    folder: Path
    converted: bool = False
    cards: Path | None = None

    def fill(self, mend: str, name: str) -> str:
        """A mend with this folder's words. What a conversion was made from nobody knows: DATA stays."""
        cards = f"--cards {shlex.quote(str(self.cards))}" if self.cards else ""
        folder = shlex.quote(str(self.folder))
        words = {
            "NAME": name,
            "CARDS": cards,
            "FOLDER": folder if self.converted else f"{folder} {cards}".strip(),
            "DATA": f"{'DATA' if self.converted else folder} {cards}".strip(),
        }
        filled = re.sub(r"\b(NAME|CARDS|FOLDER|DATA)\b", lambda word: words[word[0]], mend)
        return re.sub(r" +(?=;|$)", "", filled)


def skip(num: int, data: DatasetSummary, *options: str) -> str:
    """The conversion that leaves out broken episodes, of which `num` were found: twice as many as are to be
    expected where not all were looked at.
    """
    looked = len(data.episodes) + len(data.unreadable)
    if looked < data.of_episodes:
        num = 2 * -(-num * data.of_episodes // max(1, looked))
    return " ".join(
        [CONVERT, *options, "--on-bad-record", "skip", "--max-bad", str(max(num, _LEAST_SKIPPED))]
    )
