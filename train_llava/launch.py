"""`make train`: checks what was asked, then starts one process per rank with torchrun, here or on several
machines.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

from convert.manifest import MANIFEST_FILE, read_manifest
from oxe_mix.errors import UserError
from oxe_mix.files import folder_lock, read_json
from oxe_mix.text import complain, count, outlive_the_reader, say
from train_llava.batch import num_steps, plan_batch
from train_llava.checkpoints import Checkpoints, read_about
from train_llava.config import (
    CARD_FILE,
    CHECKPOINTS,
    ERROR_FILE,
    REHEARSAL,
    STOPPED_FILE,
    RunConfig,
    holds_model,
    load_config,
)
from train_llava.hosts import read_hostfile, run_on_hosts
from train_llava.nodes import met, wait_for, what_runs_here
from train_llava.sources import open_data
from train_llava.supervise import Cluster, Ended, num_gpus, run_ranks, stop_at_end_of_input, stop_seconds

_PORT = 29500
_PROGRAM = "train_llava.rank"  # the module that each rank runs
_SEEN_S = 10.0
_FLAGS = ("check-only", "overfit-batch", "weights-only")


@dataclass(frozen=True, slots=True)
class Launch:
    """What is asked of this machine."""

    config: Path
    llava: Path
    run: Path
    cluster: Cluster
    flags: tuple[str, ...] = ()  # of the ranks' program, passed on
    program: str = _PROGRAM

    @property
    def words(self) -> list[str]:
        """The ranks' command."""
        options = ["--config", str(self.config), "--llava", str(self.llava), "--into", str(self.run)]
        return [self.program, *options, *self.flags]


def launch(asked: Launch) -> int:
    """Train, as one of the machines of a cluster or the only one.

    Returns: the exit code.
    Raises: UserError for what can be seen to be wrong before a process is started, and what the ranks found.
    """
    config, cluster = load_config(asked.config), asked.cluster
    _check(asked, config)
    if cluster.node > 0:
        # Node 0 holds the folder for all of them.
        say(f"node {cluster.node} of {cluster.num_nodes}, {count(cluster.num_local, 'rank')}")
        return _together(asked, None)
    for line in _summary(asked, config):
        say(line)
    hold = asked.run / CHECKPOINTS
    with folder_lock(asked.run, "training"):
        with folder_lock(hold, "training"):
            pass  # nor are ranks still saving there whose launcher was killed
        for leftover in (asked.run / ERROR_FILE, asked.run / STOPPED_FILE):
            leftover.unlink(missing_ok=True)
        for leftover in asked.run.glob(f"{REHEARSAL}*"):
            shutil.rmtree(leftover)
        return _together(asked, hold)


def _check(asked: Launch, config: RunConfig) -> None:
    """Raises: UserError for what would not train."""
    cluster = asked.cluster
    if cluster.num_nodes < 1:
        raise UserError(f"NNODES is {cluster.num_nodes}; at least one machine must train")
    plan_batch(config, cluster.num_ranks)
    stop_seconds()
    if not 0 <= cluster.node < cluster.num_nodes:
        raise UserError(
            f"NODE_RANK is {cluster.node}; of NNODES={cluster.num_nodes} machines it is 0 or more"
        )
    if cluster.num_nodes > 1 and cluster.master is None:
        raise UserError(
            f"NNODES is {cluster.num_nodes}; name a free port of node 0, the same on all: MASTER=HOST:{_PORT}"
        )
    gpus = num_gpus()
    if gpus and cluster.num_local > gpus:
        raise UserError(
            f"NPROC is {cluster.num_local}, but {count(gpus, 'GPU')} can be seen here; one rank takes one"
        )
    if cluster.num_nodes > 1:
        read_manifest(asked.llava)  # what is missing on this machine would be waited for by the others
    if _is_finished(asked.run):
        raise UserError(
            f"{asked.run}: holds a trained model already; delete it or name another folder with RUN="
        )


def _is_finished(run: Path) -> bool:
    """Whether a run ended here, or another model lies here. One that was cut off while it was scored has
    its checkpoints, and goes on to be scored.
    """
    return (run / CARD_FILE).exists() or (holds_model(run) and Checkpoints(run, keep=1).latest() is None)


def _summary(asked: Launch, config: RunConfig) -> list[str]:
    """What will be done, one line each. Raises: UserError for data that is not there or not whole."""
    manifest = read_manifest(asked.llava)
    data = open_data(config.data, asked.llava, config.seed)
    others = f" and {count(len(config.data.sources), 'more source')}" if config.data.sources else ""
    samples, datasets = count(len(data.order), "sample"), count(len(manifest.datasets), "dataset")
    batch = plan_batch(config, asked.cluster.num_ranks)
    lines = [
        f"{config.name}: {samples} of {datasets}{others}",
        f"batch: {batch}",
        f"steps: {num_steps(config, batch, len(data.order)):,}",
    ]
    latest = Checkpoints(asked.run, config.checkpoints.keep).latest()
    if latest is not None and "--overfit-batch" not in asked.flags:
        lines.append(f"goes on from step {read_about(latest).step:,}: {latest}")
    return lines


def _together(asked: Launch, hold: Path | None) -> int:
    """Train when all machines are there."""
    cluster = asked.cluster
    several = cluster.num_nodes > 1
    facts = what_runs_here(asked.config, asked.llava / MANIFEST_FILE, cluster) if several else {}
    with met(asked.run, cluster, facts):
        ended = run_ranks(cluster, asked.words, hold)
    return _outcome(asked, ended)


def _outcome(asked: Launch, ended: Ended) -> int:
    """Say how it went. Returns: the exit code. Raises: UserError for what a user can mend."""
    note, stopped = asked.run / ERROR_FILE, asked.run / STOPPED_FILE
    stop_code = 128 + (ended.asked or signal.SIGTERM)
    if note.exists():
        error = read_json(note, "the ranks' error")
        return _failed(error["error"], error.get("code", 2))
    if ended.asked and asked.cluster.node > 0:
        # Node 0 writes it when all ranks are done; it takes a moment to be seen through a shared file system.
        wait_for(stopped.exists, "", _SEEN_S)
    if stopped.exists() and "rank" not in ended.report:
        step = read_json(stopped, "the ranks' note")["step"]
        say(f"stopped at step {step}, saved; the same command goes on from there")
        return stop_code
    if ended.code == 0 or (ended.asked and _is_finished(asked.run)):
        return 0
    if "error" in ended.report:
        return _failed(ended.report["error"], 2)
    latest = Checkpoints(asked.run, keep=1).latest()
    on = "no checkpoint was written yet"
    if latest is not None:
        on = f"the same command goes on from the last checkpoint, {latest.name}"
    if ended.asked:
        return _failed(f"stopped, and nothing was saved; {on}", stop_code)
    return _failed(f"{_end_of_a_rank(ended)}; {on}", 1)


def _end_of_a_rank(ended: Ended) -> str:
    """Which one, and how."""
    who, code = "the process that starts the ranks", ended.code
    if "rank" in ended.report:
        who, code = f"rank {ended.report['rank']}", ended.report["exit_code"]
    if code < 0:
        return f"{who} was killed by {signal.Signals(-code).name}"
    return f"{who} ended with exit code {code}, its last words are above"


def _failed(text: str, code: int) -> int:
    if code == 2:
        raise UserError(text)
    complain(text)
    return code


def _on_hosts(asked: Launch, hostfile: Path) -> int:
    """The same on all machines of a hostfile, the first of them node 0."""
    hosts = read_hostfile(hostfile)
    plan_batch(load_config(asked.config), len(hosts) * hosts[0].slots)
    host, port = asked.cluster.master or (hosts[0].address, _PORT)
    own = [sys.executable, "-m", "train_llava.launch", "--stop-at-end-of-input"]
    own += ["--config", str(asked.config), "--llava", str(asked.llava), "--run", str(asked.run), *asked.flags]
    own += ["--nproc", str(hosts[0].slots), "--nnodes", str(len(hosts)), "--master", f"{host}:{port}"]
    return run_on_hosts({host.name: [*own, "--node-rank", str(node)] for node, host in enumerate(hosts)})


def _address(text: str) -> tuple[str, int]:
    """HOST or HOST:PORT. Raises: UserError."""
    host, _, port = text.partition(":")
    if not host or (port and not (port.isdecimal() and 0 < int(port) < 1 << 16)):
        raise UserError(f"MASTER={text}: expected HOST:PORT, such as node1:{_PORT}")
    return host, int(port or _PORT)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=Path("train_llava/configs/tiny-cpu.yaml"))
    parser.add_argument("--llava", type=Path, default=Path("llava"), help="a converted folder")
    parser.add_argument("--run", type=Path, help="where the model goes; runs/NAME of the config")
    parser.add_argument("--nproc", type=int, default=1, help="ranks on each machine")
    parser.add_argument("--nnodes", type=int, default=1, help="machines, each given this command")
    parser.add_argument("--node-rank", type=int, default=0, help="which of them this is, from 0")
    parser.add_argument("--master", help="HOST:PORT of node 0, where the ranks meet")
    parser.add_argument("--hostfile", type=Path, help="start the run from here on all of its hosts, by ssh")
    parser.add_argument("--stop-at-end-of-input", action="store_true", help="as when started over ssh")
    for flag in _FLAGS:
        parser.add_argument(f"--{flag}", dest="flags", action="append_const", const=f"--{flag}", default=[])
    return parser


def main(program: str = _PROGRAM) -> None:
    """The command line behind `make train`."""
    args = _parser().parse_args()
    outlive_the_reader()
    try:
        if args.stop_at_end_of_input:
            stop_at_end_of_input()
        cluster = Cluster(
            args.nproc, args.nnodes, args.node_rank, _address(args.master) if args.master else None
        )
        run = args.run or Path("runs") / load_config(args.config).name
        asked = Launch(args.config, args.llava, run, cluster, tuple(args.flags), program)
        raise SystemExit(_on_hosts(asked, args.hostfile) if args.hostfile else launch(asked))
    except UserError as error:
        complain(str(error))
        raise SystemExit(2) from error
    except KeyboardInterrupt as error:
        complain("interrupted before the ranks were started")
        raise SystemExit(128 + signal.SIGINT) from error


if __name__ == "__main__":
    main()
