"""The ranks of this machine, from the launcher's side: started, asked to stop, and how they ended."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from oxe_mix.errors import UserError
from oxe_mix.files import read_json
from oxe_mix.text import say

# Seconds that the ranks have for their last checkpoint: 80 GB to a slow disk.
_STOP_SECONDS = 600
# Seconds until all machines' agents have met; they start together, but import torch from a disk they share.
_MEET_SECONDS = 300


@dataclass(frozen=True, slots=True)
class Cluster:
    """How the processes of a run are spread over machines."""

    num_local: int  # ranks on each machine
    num_nodes: int = 1
    node: int = 0  # this machine
    master: tuple[str, int] | None = None  # where node 0 listens

    @property
    def num_ranks(self) -> int:
        """Ranks on all machines."""
        return self.num_local * self.num_nodes


@dataclass(frozen=True, slots=True)
class Ended:
    """How the ranks of this machine ended."""

    code: int  # of the process that started them; 0 when all went well
    report: dict[str, Any]  # what it noted: rank and exit_code, or error
    asked: signal.Signals | None  # the signal by which the user asked them to stop


def run_ranks(cluster: Cluster, program: list[str], hold: Path | None) -> Ended:
    """Start the ranks and stay with them to the end. The first SIGTERM or SIGINT is passed on, for them to
    save and end; a SIGINT after that ends them at once.

    Args:
        program: a module and its arguments.
        hold: a folder that no other training may use.
    """
    with tempfile.TemporaryDirectory(prefix="train-llava-") as scratch:
        report = Path(scratch) / "report.json"
        hold_words = [] if hold is None else ["--hold", str(hold)]
        own = [sys.executable, "-m", "train_llava.agent", "--parent", str(os.getpid())]
        command = [
            *own,
            "--report",
            str(report),
            *hold_words,
            "--",
            *_torchrun(cluster, Path(scratch)),
            *program,
        ]
        stopping = _Stopping()
        # A session of its own: Ctrl-C in a terminal goes to all of a group, but the ranks have yet to save.
        agent = subprocess.Popen(
            command, env=environment(cluster.num_local), stdin=subprocess.DEVNULL, start_new_session=True
        )
        stopping.watch(agent)
        code = agent.wait()
        noted = read_json(report, "the agent's report") if report.exists() else {}
    return Ended(code, noted, stopping.asked)


class _Stopping:
    """The user's wish to stop, passed on."""

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None
        self._agent: subprocess.Popen[bytes] | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)

    def watch(self, agent: subprocess.Popen[bytes]) -> None:
        """From here on signals are passed on to it, with one that came before."""
        self._agent = agent
        if self.asked is not None:
            agent.terminate()

    def _ask(self, number: int, _frame: FrameType | None) -> None:
        if self.asked is None:
            self.asked = signal.Signals(number)
            if self._agent is not None:
                self._agent.terminate()
            say(f"stopping: saving first, for {stop_seconds()} s at most; another Ctrl-C ends at once")
        elif number == signal.SIGINT and self._agent is not None:
            for process in (*_descendants(self._agent.pid), self._agent.pid):
                _kill(process)


def stop_at_end_of_input() -> None:
    """Take lines on standard input for signals: `stop` and the end of input for SIGTERM, `now` for SIGINT. It
    is how a training on another machine is told over ssh, which passes no signals on.
    """

    def follow() -> None:
        with os.fdopen(os.dup(0), "rb", buffering=0) as stream:
            while line := stream.readline():
                os.kill(os.getpid(), signal.SIGINT if line == b"now\n" else signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=follow, daemon=True).start()


def stop_seconds() -> int:
    """How long the ranks may take to save when they are stopped. Raises: UserError for no such number."""
    text = os.environ.get("STOP_SECONDS", str(_STOP_SECONDS))
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"STOP_SECONDS={text}: not a number of seconds")
    return int(text)


def environment(num_local: int) -> dict[str, str]:
    """The environment variables of the ranks on this machine."""
    variables = dict(os.environ)
    # A file that happens to lie in the user's folder must not stand in for a package.
    variables["PYTHONSAFEPATH"] = "1"
    # torch 2.13 warns, in every run, of what DeepSpeed 0.19 calls.
    variables.setdefault("PYTHONWARNINGS", "ignore::FutureWarning")
    cores = len(os.sched_getaffinity(0))
    variables.setdefault("OMP_NUM_THREADS", str(max(1, cores // num_local)))
    variables.setdefault("TOKENIZERS_PARALLELISM", "false")
    if num_gpus() == 0:
        variables.setdefault("DS_ACCELERATOR", "cpu")
    return variables


def num_gpus() -> int:
    """NVIDIA GPUs that a process started here would see."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return 0
    done = subprocess.run([program, "-L"], capture_output=True, text=True, check=False)
    there = sum(line.startswith("GPU ") for line in done.stdout.splitlines()) if done.returncode == 0 else 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return there
    seen = 0
    # CUDA takes the list up to the first entry that is no device; other names than numbers it takes as ids.
    for name in filter(None, visible.split(",")):
        if name.strip().lstrip("-").isdecimal() and not 0 <= int(name) < there:
            break
        seen += 1
    return seen if there else 0


def _torchrun(cluster: Cluster, scratch: Path) -> list[str]:
    where = ["--standalone"]
    if cluster.num_nodes > 1:
        assert cluster.master is not None
        host, port = cluster.master
        where = ["--nnodes", str(cluster.num_nodes), "--node-rank", str(cluster.node)]
        where += [
            "--master-addr",
            host,
            "--master-port",
            str(port),
            "--rdzv-conf",
            f"timeout={_MEET_SECONDS}",
        ]
    return [
        *where,
        *("--nproc-per-node", str(cluster.num_local)),
        *("--shutdown-timeout", str(stop_seconds())),
        *("--log-dir", str(scratch)),
        # SIGTERM is the agent's own business: torchrun would lose its ranks at the third.
        *("--signals-to-handle", "SIGQUIT"),
        "-m",
    ]


def _descendants(process: int) -> list[int]:
    """Processes started by this one, and by those."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            # The name, in brackets, may hold anything; after it come the state and the parent.
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue  # it ended meanwhile
    found = [process]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found[1:]


def _kill(process: int) -> None:
    try:
        os.kill(process, signal.SIGKILL)
    except ProcessLookupError:
        return
