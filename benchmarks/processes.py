"""A command as a user starts it: how long it took, start-up included, and how much memory at most."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_POLL_SECONDS = 0.1  # the kernel keeps the peak: only what grows after the last look is missed
_ROOT = Path(__file__).parent.parent


@dataclass(frozen=True, slots=True)
class Run:
    """What came of a command that ended well."""

    seconds: float
    command_mb: float  # peak resident memory of the process that was started
    child_mb: float  # and of the largest one below it
    num_children: int
    output: str


def run(command: Sequence[str]) -> Run:
    """Run a command to its end, everything written before on disk, so that nobody else's writing slows it.

    Raises: RuntimeError with the end of its output when it fails.
    """
    os.sync()
    peaks: dict[int, float] = {}
    ended = threading.Event()
    start = time.monotonic()
    # A session of its own: what it leaves behind when it is interrupted can be ended as one group.
    child = subprocess.Popen(
        command,
        cwd=_ROOT,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    watcher = threading.Thread(target=_watch, args=(child.pid, ended, peaks))
    watcher.start()
    try:
        output = child.communicate()[0]
        seconds = time.monotonic() - start
    finally:
        ended.set()
        watcher.join()
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    if child.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit {child.returncode}\n{output[-3000:]}")
    own = peaks.pop(child.pid, 0.0)
    return Run(seconds, own, max(peaks.values(), default=0.0), len(peaks), output)


def _watch(pid: int, ended: threading.Event, peaks: dict[int, float]) -> None:
    while not ended.wait(_POLL_SECONDS):
        for member in _family(pid):
            peaks[member] = max(peaks.get(member, 0.0), _peak_mb(member))


def _family(pid: int) -> list[int]:
    try:
        lists = [file.read_text().split() for file in Path(f"/proc/{pid}/task").glob("*/children")]
    except OSError:  # it ended while we looked
        lists = []
    return [pid, *(one for children in lists for child in children for one in _family(int(child)))]


def _peak_mb(pid: int) -> float:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    # A process that ended and was not waited for has no memory any more.
    return int(status.split("VmHWM:")[1].split()[0]) / 1e3 if "VmHWM:" in status else 0.0
