"""The launcher on real processes: a stand-in for the trainer where a model would only take time, the trainer
where ranks must meet.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from tests.conftest import PYTHON, ROOT
from tests.conftest import run as run_command
from train_llava.agent import _first_to_die
from train_llava.config import CHECKPOINTS
from train_llava.supervise import environment, num_gpus

STAND_IN = "tests.stand_in_rank"


def ended(process: subprocess.Popen[str], code: int) -> tuple[str, str]:
    """What it said, when it ended as expected."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, f"exit {process.returncode}\n{out}\n{err}"
    return out, err


def until(done: Callable[[], bool], seconds: float = 40) -> None:
    limit = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < limit, "waited in vain"
        time.sleep(0.05)


def processes(word: Path) -> list[int]:
    """All whose command has this word."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if str(word) in (folder / "cmdline").read_bytes().decode().split("\0"):
                found.append(int(folder.name))
        except OSError:
            continue  # it ended meanwhile
    return found


@dataclass(frozen=True)
class Place:
    """Where launchers are tried: a converted folder, and a config by whose name the stand-in behaves."""

    folder: Path
    llava: Path
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def config(self, how: str) -> Path:
        file = self.folder / f"{how}.yaml"
        text = yaml.safe_load((ROOT / "train_llava/configs/tiny-cpu.yaml").read_text())
        small = {"max_steps": 3, "global_batch": 4, "micro_batch": 2}
        file.write_text(yaml.safe_dump({**text, "name": how, "train": {**text["train"], **small}}))
        return file

    def words(self, how: str, run: Path) -> list[str]:
        return ["--config", str(self.config(how)), "--llava", str(self.llava), "--run", str(run)]

    def train(self, how: str, run: Path, *more: str, **variables: str) -> subprocess.Popen[str]:
        """The stand-in, on two ranks."""
        return self.start([PYTHON, "-m", STAND_IN, *self.words(how, run), "--nproc", "2", *more], **variables)

    def start(self, command: list[str], **variables: str) -> subprocess.Popen[str]:
        """In a group of its own, as a terminal starts a command."""
        process = subprocess.Popen(
            command,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables},
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            process_group=0,
        )
        self.started.append(process)
        return process

    def end(self) -> None:
        """Leave no process behind, whatever failed."""
        for process in self.started:
            if process.poll() is None:
                process.kill()
        # Before what was said is read: they hold the other end of that pipe.
        for left in (left for run in self.folder.glob("run*") for left in processes(run)):
            with suppress(ProcessLookupError):
                os.kill(left, signal.SIGKILL)
        for process in self.started:
            process.communicate()


@pytest.fixture(scope="module")
def place(llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("launch")
    place = Place(folder, llava)
    yield place
    place.end()


def pid(run: Path, rank: int) -> int:
    """Of a rank that is training."""
    file = run / f"rank-{rank}.pid"
    until(lambda: file.exists() and file.read_text().endswith("\n"))
    return int(file.read_text())


def test_ranks_end_as_they_end_and_the_launcher_says_it_in_one_line(place: Place) -> None:
    ways = ("finishes", "refuses", "diverges", "crashes")
    flags = ("--check-only", "--weights-only")
    runs = {how: place.train(how, place.folder / f"run-{how}", *flags) for how in ways}
    out, err = ended(runs["finishes"], 0)
    assert out.splitlines()[-2:] == [
        "batch: 4 (train.global_batch) = 2 (train.micro_batch) x 1 (worked out) x 2 ranks (NPROC x NNODES)",
        "steps: 3",
    ]
    assert err == ""
    words = (place.folder / "run-finishes/rank-1.words").read_text()
    assert words == f"--llava {place.llava} --check-only --weights-only"
    assert ended(runs["refuses"], 2)[1] == "error: x is wrong; mend it\n"
    assert ended(runs["diverges"], 1)[1] == "error: the loss is nan\n"
    err = ended(runs["crashes"], 1)[1]
    assert err.count("Traceback") == 1
    assert err.endswith(
        "AssertionError: a bug of ours\n"
        "error: rank 1 ended with exit code 1, its last words are above; no checkpoint was written yet\n"
    )


@dataclass(frozen=True)
class Running:
    """A training on two ranks that somebody is about to disturb."""

    process: subprocess.Popen[str]
    run: Path

    @property
    def agent(self) -> int:
        """torchrun's process."""
        return next(number for number in processes(self.run / CHECKPOINTS))

    def rank(self, rank: int) -> int:
        return pid(self.run, rank)

    def save(self) -> None:
        """Let saving, which lasts until then, be done."""
        (self.run / "go").touch()

    def times_told(self) -> list[str]:
        return [(self.run / f"rank-{rank}.signals").read_text() for rank in (0, 1)]


@pytest.fixture(scope="module")
def running(place: Place) -> dict[str, Running]:
    """All at once: what takes time is torchrun's start."""
    names = ("SIGTERM", "SIGINT", "launcher killed", "agent killed", "rank killed", "too slow", "at once")
    found = {}
    for name in names:
        run, seconds = place.folder / f"run-{name}", "1" if name == "too slow" else "600"
        found[name] = Running(place.train("trains", run, STOP_SECONDS=seconds), run)
    for one in found.values():
        assert one.rank(0) != one.rank(1)
    return found


def test_the_second_training_of_a_folder_is_refused(place: Place, running: dict[str, Running]) -> None:
    second = place.train("trains", running["SIGTERM"].run)
    assert "another training is writing here; wait for it" in ended(second, 2)[1]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_to_all_of_the_terminal_has_the_ranks_save_and_end(
    running: dict[str, Running], number: signal.Signals, code: int
) -> None:
    training = running[number.name]
    agent = training.agent
    os.killpg(training.process.pid, number)
    for _ in range(2):  # clusters say it to each process, and say it again
        time.sleep(0.3)
        os.killpg(training.process.pid, signal.SIGTERM)
        os.kill(agent, signal.SIGTERM)
    time.sleep(0.3)
    training.save()
    out, err = ended(training.process, code)
    assert out.splitlines()[-1] == "stopped at step 7, saved; the same command goes on from there"
    assert err == ""
    assert training.times_told() == ["1", "1"]
    assert processes(training.run) == []


def test_ranks_of_a_killed_launcher_save_end_and_keep_the_folder_meanwhile(
    place: Place, running: dict[str, Running]
) -> None:
    training = running["launcher killed"]
    training.process.kill()
    early = place.train("finishes", training.run)
    said = f"{training.run / CHECKPOINTS}: another training is writing here; wait for it"
    assert said in ended(early, 2)[1]
    training.save()
    until(lambda: not processes(training.run), 20)
    assert training.times_told() == ["1", "1"]


def test_ranks_of_a_killed_agent_save_and_end(running: dict[str, Running]) -> None:
    training = running["agent killed"]
    os.kill(training.agent, signal.SIGKILL)
    assert training.process.wait(timeout=60) == 1
    training.save()  # its ranks hold the screen until they end
    err = ended(training.process, 1)[1]
    assert (
        err
        == "error: the process that starts the ranks was killed by SIGKILL; no checkpoint was written yet\n"
    )
    until(lambda: not processes(training.run), 20)
    assert "0" not in training.times_told()  # the kernel may say it for each thread that the agent had


def test_a_killed_rank_is_named(running: dict[str, Running]) -> None:
    training = running["rank killed"]
    training.save()
    os.kill(training.rank(1), signal.SIGKILL)
    err = ended(training.process, 1)[1]
    # The other rank was told to end, and saved.
    assert (
        err
        == "error: rank 1 was killed by SIGKILL; the same command goes on from the last checkpoint, step-7\n"
    )
    assert processes(training.run) == []


def test_ranks_that_take_too_long_to_save_are_ended(running: dict[str, Running]) -> None:
    training = running["too slow"]
    training.process.terminate()
    out, err = ended(training.process, 143)
    assert out.splitlines()[-1] == "stopping: saving first, for 1 s at most; another Ctrl-C ends at once"
    assert err == "error: stopped, and nothing was saved; no checkpoint was written yet\n"
    assert processes(training.run) == []


def test_the_second_ctrl_c_ends_at_once(running: dict[str, Running]) -> None:
    training = running["at once"]
    os.killpg(training.process.pid, signal.SIGINT)
    until(lambda: len(list(training.run.glob("rank-*.told"))) == 2)
    os.killpg(training.process.pid, signal.SIGINT)
    assert (
        ended(training.process, 130)[1]
        == "error: stopped, and nothing was saved; no checkpoint was written yet\n"
    )
    until(lambda: not processes(training.run))


def test_the_rank_that_died_first_is_the_one_that_is_named() -> None:
    def died(rank: int, code: int, second: int) -> tuple[int, ProcessFailure]:
        failure = ProcessFailure(rank, pid=1, exitcode=code, error_file="")
        failure.timestamp = second
        return rank, failure

    def named(*failures: tuple[int, ProcessFailure]) -> int:
        return min(failures, key=_first_to_die)[0]

    assert named(died(0, -15, 5), died(1, 1, 5)) == 1  # 0 was ended for its sake
    assert named(died(0, 1, 5), died(1, -9, 5)) == 1  # 0 missed it
    assert named(died(0, -9, 35), died(1, 1, 5)) == 1  # 0 did not end in time
    assert named(died(0, -15, 6), died(1, -15, 5)) == 1


def test_what_cannot_be_is_refused_before_a_process_is_started(place: Place) -> None:
    wrong = {
        ("--nproc", "0"): "NPROC is 0; at least one process must train",
        (
            "--nnodes",
            "2",
            "--nproc",
            "1",
        ): "NNODES is 2; name a free port of node 0, the same on all: MASTER=HOST:29500",
        ("--nnodes", "0"): "NNODES is 0; at least one machine must train",
        ("--node-rank", "1"): "NODE_RANK is 1; of NNODES=1 machines it is 0 or more",
        ("--master", "host:port"): "MASTER=host:port: expected HOST:PORT, such as node1:29500",
        ("--llava", "no"): "no: no such folder; give one that oxe-mix convert wrote",
        (
            *("--llava", "no", "--nproc", "1", "--nnodes", "2", "--node-rank", "1"),
            *("--master", "127.0.0.1:1"),
        ): "no: no such folder; give one that oxe-mix convert wrote",
    }
    run = place.folder / "run-wrong"
    said = {words: place.train("finishes", run, *words) for words in wrong}
    slow = place.train("finishes", run, STOP_SECONDS="1h")
    for words, text in wrong.items():
        assert ended(said[words], 2) == ("", f"error: {text}\n")
    assert ended(slow, 2)[1] == "error: STOP_SECONDS=1h: not a number of seconds\n"
    assert not run.exists()
    run.mkdir()
    (run / "config.json").touch()
    assert "holds a trained model already; delete it or name" in ended(place.train("finishes", run), 2)[1]


def test_gpus_are_counted_as_cuda_counts_them(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(
        "#!/bin/sh\necho 'GPU 0: NVIDIA H200 (UUID: GPU-1)'\necho 'GPU 1: NVIDIA H200 (UUID: GPU-2)'\n"
    )
    program.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    monkeypatch.setenv("PATH", path)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert num_gpus() == 2
    assert "DS_ACCELERATOR" not in environment(2)
    for visible, gpus in (
        ("1", 1),
        ("0,1", 2),
        ("", 0),
        ("-1", 0),
        ("0,-1,1", 1),
        ("0,2,1", 1),
        ("GPU-2", 1),
    ):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert num_gpus() == gpus, visible
    err = ended(place.train("finishes", tmp_path / "run", PATH=path, CUDA_VISIBLE_DEVICES="1"), 2)[1]
    assert err == "error: NPROC is 2, but 1 GPU can be seen here; one rank takes one\n"
    program.write_text(
        "#!/bin/sh\necho 'Failed to initialize NVML: Driver/library version mismatch'\nexit 18\n"
    )
    assert num_gpus() == 0
    assert environment(2)["DS_ACCELERATOR"] == "cpu"


def test_make_passes_on_what_is_typed() -> None:
    typed = ("CONFIG=c.yaml", "LLAVA=l", "RUN=r", "NPROC=8", "NNODES=2", "NODE_RANK=1", "MASTER=host0:29501")
    flags = ("CHECK_ONLY=1", "OVERFIT=1", "WEIGHTS_ONLY=1", "HOSTFILE=hosts")
    said = run_command("make", "--no-print-directory", "-n", "train", *typed, *flags).stdout.replace(
        "\\\n", " "
    )
    assert " ".join(said.split("train_llava.launch ")[1].split()) == (
        '--config "c.yaml" --nproc 8 --llava "l" --run "r" --hostfile "hosts" --nnodes "2" --node-rank "1" '
        '--master "host0:29501" --check-only --overfit-batch --weights-only'
    )
