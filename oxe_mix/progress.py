"""How far a command is, on stderr: a live bar for people, plain lines where nobody looks, JSON for machines.

The work happens in other threads, processes or machines; `sample` is asked how far it is.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any, Literal

from oxe_mix.errors import UserError
from oxe_mix.text import count, size

PLAIN_INTERVAL_S = 2.0
_LIVE_INTERVAL_S = 0.25
_RATE_WINDOW_S = 10.0

Style = Literal["auto", "json"]


@dataclass(frozen=True, slots=True)
class Sample:
    """How far the work is."""

    done: int
    num_bytes: int = 0
    retries: int = 0


@dataclass(frozen=True, slots=True)
class Goal:
    """What is being done and when it is all done; `num_bytes` 0 where bytes do not count."""

    what: str
    unit: str
    total: int
    num_bytes: int = 0


@contextmanager
def progress(goal: Goal, sample: Callable[[], Sample], style: Style = "auto") -> Iterator[None]:
    """While the block runs, tell how far it is; `sample` is called from a thread."""
    stop, last = threading.Event(), Sample(0)

    def kept() -> Sample:
        """A look that fails, say at a bucket that is busy, must not end the watch."""
        nonlocal last
        with suppress(UserError, OSError):
            last = sample()
        return last

    live = style == "auto" and sys.stderr.isatty()
    watch = _watch_live if live else _watch_json if style == "json" else _watch_plain
    thread = threading.Thread(target=watch, args=(goal, kept, stop), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


class Pace:
    """Bytes a second and seconds left, from the samples of the last seconds."""

    def __init__(self, goal: Goal) -> None:
        self._goal = goal
        self._start = time.monotonic()
        self._seen = [(self._start, Sample(0))]

    def after(self, sample: Sample, now: float) -> dict[str, float | None]:
        """`seconds` since the start, `bytes_per_s`, and `seconds_left` (None while that cannot be said)."""
        self._seen = [(t, s) for t, s in self._seen if now - t < _RATE_WINDOW_S]
        self._seen.append((now, sample))
        (t0, first), seconds = self._seen[0], now - self._start
        by_bytes = self._goal.num_bytes > 0
        # A part that is cut back to its last whole record, or begun anew, would make it less than nothing.
        gained = max(0, sample.num_bytes - first.num_bytes if by_bytes else sample.done - first.done)
        left = self._goal.num_bytes - sample.num_bytes if by_bytes else self._goal.total - sample.done
        rate = gained / (now - t0) if now > t0 else 0.0
        return {
            "seconds": round(seconds, 1),
            "bytes_per_s": round(rate) if by_bytes else None,
            "seconds_left": round(max(0, left) / rate) if rate > 0 else None,
        }


def _words(goal: Goal, sample: Sample, pace: dict[str, float | None]) -> str:
    parts = [f"{min(sample.done, goal.total):,} of {count(goal.total, goal.unit)}"]
    if goal.num_bytes:
        parts.append(f"{size(sample.num_bytes)} of about {size(goal.num_bytes)}")
        parts.append(f"{size(pace['bytes_per_s'] or 0)}/s")
    parts.append(f"{pace['seconds']:.0f} s")
    if pace["seconds_left"] is not None:
        parts.append(f"about {pace['seconds_left']:.0f} s left")
    if sample.retries:
        parts.append(f"retried {sample.retries:,} times")
    return ", ".join(parts)


def _watch_plain(goal: Goal, sample: Callable[[], Sample], stop: threading.Event) -> None:
    pace = Pace(goal)
    while not stop.wait(PLAIN_INTERVAL_S):
        now = sample()
        print(
            f"{goal.what}: {_words(goal, now, pace.after(now, time.monotonic()))}",
            file=sys.stderr,
            flush=True,
        )


def _watch_json(goal: Goal, sample: Callable[[], Sample], stop: threading.Event) -> None:
    pace = Pace(goal)
    while not stop.wait(PLAIN_INTERVAL_S):
        now = sample()
        event: dict[str, Any] = {"event": "progress", "command": goal.what, "of": goal.total, **asdict(now)}
        event |= {"of_bytes": goal.num_bytes, **pace.after(now, time.monotonic())}
        print(json.dumps(event), file=sys.stderr, flush=True)


def _watch_live(goal: Goal, sample: Callable[[], Sample], stop: threading.Event) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    pace, columns = (
        Pace(goal),
        (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[words]}")),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(goal.what, total=goal.num_bytes or goal.total, words="")
        while True:
            now = sample()
            words = _words(goal, now, pace.after(now, time.monotonic()))
            bar.update(task, completed=now.num_bytes if goal.num_bytes else now.done, words=words)
            if stop.wait(_LIVE_INTERVAL_S):
                return
