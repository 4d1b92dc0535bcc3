"""torchrun as the launcher starts it: it ends with the launcher, ends its ranks once, and notes in a file how
one died instead of filling the screen.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import logging
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from oxe_mix.errors import UserError
from oxe_mix.files import folder_lock, write_json

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

_PR_SET_PDEATHSIG = 1


def end_with_parent(parent: int | None = None) -> None:
    """Have the kernel send this process SIGTERM when its parent is gone, however that ended.

    Args:
        parent: its process number; when another one has taken its place already, this process ends here.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if parent is not None and os.getppid() != parent:
        sys.exit(128 + signal.SIGTERM)


def _run(torchrun: list[str], report: Path) -> int:
    """Run torchrun in this process; returns the exit code, and leaves what went wrong in `report`."""
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    def stop(*_: object) -> None:
        # Clusters signal every process of a job, some of them twice: to end the ranks once is enough.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise SignalException("asked to stop", signal.SIGTERM)

    signal.signal(signal.SIGTERM, stop)
    # What torchrun says of a failure, in forty lines, the launcher says in one.
    logging.disable(logging.ERROR)
    try:
        run(parse_args(torchrun))
    except SignalException:
        return 128 + signal.SIGTERM
    except ChildFailedError as error:
        rank, first = min(error.failures.items(), key=_first_to_die)
        write_json(report, {"rank": rank, "exit_code": first.exitcode})
        return 1
    except DistError as error:
        # The first line says what; the others are torch's own stack.
        said = str(error).splitlines()[0]
        write_json(
            report, {"error": f"the machines cannot meet ({said}); name a free port of node 0 with MASTER="}
        )
        return 1
    return 0


def _first_to_die(failure: tuple[int, ProcessFailure]) -> tuple[bool, int, bool]:
    """When one rank is gone the agent ends the others by SIGTERM, or they fail for want of it. Times are in
    whole seconds: of two in one, who was killed did not die of the other's end.
    """
    _, how = failure
    return how.exitcode == -signal.SIGTERM, how.timestamp, how.exitcode >= 0


def main() -> None:
    """The entry point of the process that starts the ranks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parent", type=int, required=True, help="the launcher's process number")
    parser.add_argument("--report", type=Path, required=True, help="where to note how a rank died")
    parser.add_argument("--hold", type=Path, help="a folder to hold while ranks are there")
    parser.add_argument("torchrun", nargs="+", help="after --: its own words")
    args = parser.parse_args()
    end_with_parent(args.parent)
    try:
        # The launcher's own lock is gone when it is killed, but then the ranks are still saving.
        with folder_lock(args.hold, "training") if args.hold else contextlib.nullcontext():
            code = _run(args.torchrun, args.report)
    except UserError as error:
        write_json(args.report, {"error": str(error)})
        code = 2
    sys.exit(code)


if __name__ == "__main__":
    main()
