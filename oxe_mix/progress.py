"""A sign of life on stderr for work that happens in other processes: done of all, every two seconds."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

INTERVAL_S = 2.0


@contextmanager
def progress(what: str, unit: str, total: int, done: Callable[[], int]) -> Iterator[None]:
    """While the block runs, print how far it is; `done` counts what is finished and is called from a
    thread.
    """
    stop, start = threading.Event(), time.monotonic()

    def watch() -> None:
        while not stop.wait(INTERVAL_S):
            seconds = time.monotonic() - start
            print(
                f"{what}: {min(done(), total)} of {total} {unit}, {seconds:.0f} s",
                file=sys.stderr,
                flush=True,
            )

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
