"""Numbers and tables as people read them."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Sequence
from typing import TextIO

_outlives = threading.Event()

_RED, _YELLOW = 31, 33


def size(num_bytes: float) -> str:
    """Bytes in the unit that fits: 1.5 GB, 12.0 MB, 800 B."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.1f} {unit}"
    return f"{num_bytes:.0f} B"


def duration(seconds: float) -> str:
    """45 s, 12 min, 3 h 20 min."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def count(number: int, thing: str) -> str:
    """`1 shard`, `2,000 shards`."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they need to be: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        return "  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]).rstrip()

    return "\n".join([line(header), "  ".join("-" * width for width in widths), *(line(row) for row in rows)])


def say(text: str) -> None:
    """Print for the user, at once even into a pipe."""
    _print_whole(text, sys.stdout)


def complain(text: str) -> None:
    """One `error: …` line on stderr for each line of a message."""
    for line in text.splitlines():
        _print_whole(f"{painted('error:', _RED, sys.stderr)} {line}", sys.stderr)


def warn(text: str) -> None:
    """One `warning: …` line on stderr for each line of a message."""
    for line in text.splitlines():
        _print_whole(f"{painted('warning:', _YELLOW, sys.stderr)} {line}", sys.stderr)


def _print_whole(text: str, stream: TextIO) -> None:
    """The line and its end in one write: another thread's line must not come between them."""
    try:
        print(f"{text}\n", end="", file=stream, flush=True)
    except BrokenPipeError:
        if not _outlives.is_set():
            raise
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, stream.fileno())
        os.close(nothing)


def outlive_the_reader() -> None:
    """From here on what nobody reads any more is lost, and ends nothing: a training saves, though the line
    to who started it is cut.
    """
    _outlives.set()


def painted(word: str, colour: int, stream: TextIO) -> str:
    """Coloured on a terminal, plain anywhere else and where NO_COLOR is set (no-color.org)."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not stream.isatty()
    return word if plain else f"\033[1;{colour}m{word}\033[0m"
