"""Ctrl-C ends a command at once; but first it lets go of what would outlive the process."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from oxe_mix.errors import UserError

_LONGEST_S = 5.0
_held: dict[str, Callable[[], None]] = {}


@contextmanager
def held(what: str, release: Callable[[], None]) -> Iterator[None]:
    """While the block runs, `release` is what an interrupt has to call."""
    _held[what] = release
    try:
        yield
    finally:
        del _held[what]


def end_at_once(*_: object) -> None:
    """End as a kill would: files are whole or absent, and the next run goes on. To unwind would mean to wait
    for every transfer that is under way.
    """
    from oxe_mix.text import complain

    signal.signal(signal.SIGINT, signal.SIG_DFL)  # who presses it again does not want to wait
    first = "".join(f"delete {what}, then " for what in _release_all())
    complain(f"interrupted; {first}the same command goes on from here")
    os._exit(130)


def _release_all() -> list[str]:
    """Release what is held, for a few seconds at most; returns what is held still."""

    def work() -> None:
        for what, release in list(_held.items()):
            with suppress(UserError):
                release()
                left.remove(what)

    left = list(_held)
    # A thread: what is interrupted may itself be waiting for the network.
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(_LONGEST_S if left else 0)
    return left
