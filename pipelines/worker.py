"""A worker process of the local runner: Beam's own, with its log kept to what a user needs to see.

Beam starts its stock worker with no options at all, so its level cannot be set from the pipeline.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path

COMMAND_PID = "OXE_MIX_COMMAND_PID"
_POLL_S = 0.5


def _end_with(pid: int) -> None:
    """End when the command does: what it left to do would go on for hours, into files of the next one."""
    while _lives(pid):
        time.sleep(_POLL_S)
    os._exit(0)  # in silence, as if the work were done: nobody is there to be told


def _lives(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    try:
        os.kill(pid, 0)
        # A process that ended keeps its number until somebody has asked for its exit code.
        return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


if __name__ == "__main__":
    # Ctrl-C reaches the whole group: the command says so once, and its workers end in silence.
    signal.signal(signal.SIGINT, lambda *_: os._exit(0))
    threading.Thread(target=_end_with, args=(int(os.environ[COMMAND_PID]),), daemon=True).start()
    handler = logging.StreamHandler()
    handler.setLevel(logging.ERROR)
    logging.basicConfig(handlers=[handler])
    from apache_beam.runners.worker import sdk_worker_main

    sdk_worker_main.main(sys.argv)
