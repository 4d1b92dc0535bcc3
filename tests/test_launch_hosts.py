"""Several machines: a hostfile, ssh, SLURM, and what they prove of each other before they start. There is no
sshd and no SLURM here: stand-ins run the same command lines on this machine, which goes by two names.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from oxe_mix.errors import UserError
from tests.conftest import PYTHON, ROOT
from tests.test_launch import STAND_IN, Place, ended, pid, processes, until
from train_llava.hosts import Host, read_hostfile, run_on_hosts
from train_llava.nodes import met, read_note
from train_llava.supervise import Cluster

_SSH = """#!/bin/sh
while [ "$1" = -o ]; do shift 2; done
host=$1; shift
[ "$host" != nowhere ] || { echo "ssh: connect to host nowhere port 22: Connection refused" >&2; exit 255; }
exec sh -c "$*"
"""
# Runs on each node at once, as srun; a signal goes to all processes of the step, as --signal says.
_SRUN = """#!{python}
import os, signal, subprocess, sys
words = sys.argv[sys.argv.index("bash"):]
nodes = []
for node in "01":
    nodes.append(subprocess.Popen(words, env={{**os.environ, "SLURM_NODEID": node}}, process_group=0))
signal.signal(signal.SIGTERM, lambda *_: [os.killpg(node.pid, signal.SIGTERM) for node in nodes])
sys.exit(max([node.wait() for node in nodes]))
"""


def _program(folder: Path, name: str, text: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def place(llava: Path, tmp_path: Path) -> Iterator[Place]:
    place = Place(tmp_path, llava)
    _program(tmp_path / "bin", "ssh", _SSH)
    yield place
    place.end()


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("node1 slots=8\n\nnode2 slots\n", ":3: 'node2 slots' is not of the form `node1 slots=8`"),
        ("node1 slots=8\nnode2\n", ":2: node2 needs slots=N, the number of its GPUs; at least 1"),
        ("node1 slots=0", ":1: node1 needs slots=N, the number of its GPUs; at least 1"),
        ("node1 slots=8\nnode2 slots=4", ":2: node2 has 4 slots and node1 8; give all the same number"),
        ("# all\nnode1 slots=8\nnode1 slots=8", ":3: node1 is named twice; one line with all its slots"),
        ("-oProxyCommand=x slots=8", ":1: '-oProxyCommand=x' is no host's name"),
        ("# none\n", ": names no host; write `node1 slots=8` for each machine"),
    ],
)
def test_a_hostfile_is_refused_with_its_line(text: str, error: str, tmp_path: Path) -> None:
    file = tmp_path / "hosts"
    file.write_text(text)
    with pytest.raises(UserError, match=f"^{re.escape(f'{file}{error}')}$"):
        read_hostfile(file)


def test_a_hostfile_names_hosts_and_their_slots(tmp_path: Path) -> None:
    file = tmp_path / "hosts"
    file.write_text("# two of them\nnode1   slots=8  # the first leads\n\nme@node2.lab slots=8\n")
    assert read_hostfile(file) == (Host("node1", 8), Host("me@node2.lab", 8))
    assert [host.address for host in read_hostfile(file)] == ["node1", "node2.lab"]
    with pytest.raises(UserError, match="none: cannot be read"):
        read_hostfile(tmp_path / "none")


def test_one_command_trains_on_all_hosts_of_a_hostfile(place: Place) -> None:
    """The trainer itself, one rank on each of two machines."""
    hosts, run = place.folder / "hosts", place.folder / "run of $USER's"
    hosts.write_text("localhost slots=1\n127.0.0.1 slots=1\n")
    path = f"{place.folder / 'bin'}:{os.environ['PATH']}"
    command = [PYTHON, "-m", "train_llava.launch", *place.words("tiny-cpu", run), "--hostfile", str(hosts)]
    process = place.start([*command, "--master", f"127.0.0.1:{_free_port()}"], PATH=path)
    out, err = ended(process, 0)
    assert "x 2 ranks (NPROC x NNODES)\n" in out
    assert "127.0.0.1: node 1 of 2, 1 rank" in out.splitlines()
    assert "error" not in err
    assert json.loads((run / "evaluation.json").read_text())["ranks"] == 2
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 3


# Says its name, and takes what it is told; how it ends is its second word. One that fails waits until all are
# there: on a busy machine the others would be ended before they could say so.
_ON_HOST = """
import os, pathlib, signal, sys, time
from train_llava.supervise import stop_at_end_of_input
name, how = sys.argv[1:]
def stop(number, _):
    try:
        print("told", signal.Signals(number).name, flush=True)
    except OSError:  # the front is gone; raised where this came in between, it could be lost
        os._exit(143)
    if how == "saves": os._exit(143)
    if how == "hangs" and number == signal.SIGINT: os._exit(130)
signal.signal(signal.SIGTERM, stop), signal.signal(signal.SIGINT, stop)
stop_at_end_of_input()
print("here", flush=True)
is_here = pathlib.Path(__file__).with_suffix
is_here("." + name).touch()
if how == "fails":
    while not all(is_here("." + other).exists() for other in "ac"): time.sleep(0.05)
    print("error: x is wrong", file=sys.stderr, flush=True)
    sys.exit(2)
while True: time.sleep(0.05)
"""


def _front(place: Place, **ways: str) -> subprocess.Popen[str]:
    script = place.folder / "on_host.py"
    if not script.exists():  # a host of the front before may be about to read it
        script.write_text(_ON_HOST)
    commands = {host: [PYTHON, str(script), host, how] for host, how in ways.items()}
    code = f"from train_llava.hosts import run_on_hosts; exit(run_on_hosts({commands!r}, grace_s=8))"
    return place.start([PYTHON, "-c", code], PATH=f"{place.folder / 'bin'}:{os.environ['PATH']}")


def test_when_one_host_fails_the_others_are_ended(place: Place) -> None:
    fails = _front(place, a="hangs", b="fails", c="saves")
    unreachable = _front(place, z="saves", nowhere="saves")
    out, err = ended(fails, 2)
    assert sorted(out.splitlines()) == [
        "b: here",
        "c: here",
        "c: told SIGTERM",
        "here",
        "told SIGINT",
        "told SIGTERM",
    ]
    assert err == "error: b: x is wrong\nerror: b: ended with exit code 2; the others were ended\n"
    assert ended(unreachable, 1)[1] == (
        "nowhere: ssh: connect to host nowhere port 22: Connection refused\n"
        "error: nowhere: ended with exit code 255 (ssh: not connected, or cut off); the others were ended\n"
    )


def test_without_ssh_nothing_is_started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="there is no ssh on this machine"):
        run_on_hosts({"a": ["true"]})


_CUT_OFF = """
import sys
from oxe_mix.text import complain, outlive_the_reader, say
if sys.argv[1] == "outlives": outlive_the_reader()
sys.stdin.read()
say("a"), say("b"), complain("c"), complain("d")
open(sys.argv[2], "w").write("saved")
"""


@pytest.mark.parametrize("how", ["outlives", "ends"])
def test_what_is_said_to_nobody_ends_no_training(how: str, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [PYTHON, "-c", _CUT_OFF, how, str(saved)], stdin=pipe, stdout=pipe, stderr=pipe, cwd=ROOT
    )
    for stream in (process.stdout, process.stderr, process.stdin):
        assert stream is not None
        stream.close()
    assert (process.wait(60) == 0) == (how == "outlives")
    assert saved.exists() == (how == "outlives")


def test_a_note_that_goes_between_two_looks_is_no_note(tmp_path: Path) -> None:
    assert read_note(tmp_path / "answer.json") == {}
    (tmp_path / "answer.json").write_text("{")
    with pytest.raises(UserError, match=r"answer\.json: not valid JSON"):
        read_note(tmp_path / "answer.json")


def test_ctrl_c_is_told_to_all_hosts_and_so_is_the_end_of_the_front(place: Place) -> None:
    stopped, twice, killed = (_front(place, a=how, b=how) for how in ("saves", "hangs", "saves"))
    for front in (stopped, twice, killed):
        assert front.stdout is not None
        assert {front.stdout.readline(), front.stdout.readline()} == {"here\n", "b: here\n"}
    os.killpg(stopped.pid, signal.SIGINT)
    os.killpg(twice.pid, signal.SIGINT)
    killed.kill()
    assert sorted(ended(stopped, 130)[0].splitlines()) == ["b: told SIGTERM", "told SIGTERM"]
    assert twice.stdout is not None
    assert {twice.stdout.readline(), twice.stdout.readline()} == {"told SIGTERM\n", "b: told SIGTERM\n"}
    os.killpg(twice.pid, signal.SIGINT)
    assert sorted(ended(twice, 130)[0].splitlines()) == ["b: told SIGINT", "told SIGINT"]
    until(lambda: not processes(place.folder / "on_host.py"))


def test_machines_that_do_not_run_the_same_or_do_not_meet_are_refused(tmp_path: Path) -> None:
    said: dict[int, str] = {}

    def one(node: int, facts: dict[str, str], patience_s: float = 60) -> None:
        try:
            with met(tmp_path, Cluster(1, 2, node, ("here", 1)), facts, patience_s):
                said[node] = "met"
        except UserError as error:
            said[node] = str(error)

    def both(first: dict[str, str], second: dict[str, str]) -> None:
        other = threading.Thread(target=one, args=(1, second))
        other.start()
        time.sleep(0.3)  # what it wrote is old when node 0 comes
        one(0, first)
        other.join()

    both({"torch": "2.13"}, {"torch": "2.13"})
    assert said == {0: "met", 1: "met"}
    both({"torch": "2.13", "CONFIG": "a"}, {"torch": "2.14", "CONFIG": "a"})
    differ = "the machines do not run the same: torch is 2.14 on NODE_RANK=1, but 2.13 on NODE_RANK=0"
    assert said == {0: differ, 1: differ}
    # What they left there is no answer to who comes alone.
    for node in (0, 1):
        one(node, {"torch": "2.13"}, 0.5)
        assert said[node].startswith(
            f"{tmp_path}: no sign of NODE_RANK={1 - node} in 0.5 s; start the same command"
        )


def test_the_slurm_script_trains_on_all_nodes_and_queues_itself_again_when_time_is_up(place: Place) -> None:
    folder, run = place.folder, place.folder / "run"
    _program(folder / "bin", "srun", _SRUN.format(python=PYTHON))
    _program(
        folder / "bin", "scontrol", f'#!/bin/sh\necho "$*" >>{folder}/scontrol\necho localhost\necho node2\n'
    )
    # The launcher with the ranks' stand-in.
    python = f'#!/bin/sh\nshift 2\nexec {PYTHON} -m {STAND_IN} "$@"\n'
    _program(folder / ".venv/bin", "python", python)
    slurm = {
        "SLURM_SUBMIT_DIR": str(folder),
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_ID": str(10_000 + _free_port() % 10_000),
        "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "1",
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
    }
    script = ROOT / "examples/slurm/train.sbatch"
    words = [str(place.config("trains")), str(place.llava), str(run)]
    process = place.start(["bash", str(script), *words], **slurm)
    assert pid(run, 0) != pid(run, 1)
    (run / "go").touch()
    step = next(number for number in processes(folder / "bin/srun"))
    os.kill(step, signal.SIGTERM)
    out, err = ended(process, 143)
    assert out.count("stopped at step 7, saved; the same command goes on from there\n") == 2
    assert err == ""
    assert (folder / "scontrol").read_text().splitlines() == [
        "show hostnames node[1-2]",
        f"requeue {slurm['SLURM_JOB_ID']}",
    ]
