"""`oxe-mix doctor` without a folder: every fact of a machine is judged, and told with what mends it."""

from __future__ import annotations

import json
import resource
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from convert.doctor_command import DoctorOptions, run_doctor
from oxe_mix.cards import Cards
from oxe_mix.doctor_machine import (
    check_compiler,
    check_disk,
    check_memory,
    check_open_files,
    check_python,
    check_shared_memory,
    check_source,
    machine_verdicts,
)
from oxe_mix.doctor_packages import (
    Installed,
    check_conflicts,
    check_pins,
    check_ranges,
    installed,
    pins_file,
    read_pins,
)
from oxe_mix.doctor_torch import (
    TorchFacts,
    check_deepspeed,
    check_gpu,
    check_torch,
    nvidia_driver,
    torch_facts,
)
from oxe_mix.mix import load_mix
from oxe_mix.verdicts import Verdict, report
from tests.conftest import ROOT
from tests.test_doctor_faults import parse_commands

GB = 10**9


def _have(**packages: tuple[str, list[str]]) -> Installed:
    """Packages as NAME=(version, requirements)."""
    return Installed(
        {name: version for name, (version, _) in packages.items()},
        {name: tuple(requires) for name, (_, requires) in packages.items()},
    )


def test_versions_are_held_to_the_pins_and_a_build_of_the_same_release_passes() -> None:
    file = ROOT / "envs/cpu.txt"
    pins = {"torch": "2.13.0", "numpy": "2.4.0", "not-installed": "1.0"}
    fine = _have(torch=("2.13.0+cpu", []), numpy=("2.4.0", []))
    said = check_pins(fine, pins, file)
    assert (said.level, said.text) == ("ok", "2 packages as pinned in envs/cpu.txt")
    said = check_pins(_have(torch=("2.14.0", []), numpy=("2.4", [])), pins, file)
    assert (said.level, said.mend) == ("warning", "make setup CONSTRAINTS=envs/cpu.txt")
    assert said.text == "1 of 2 packages are not as pinned in envs/cpu.txt: torch 2.14.0 (tested 2.13.0)"


def test_pins_of_another_file_are_read_with_it(tmp_path: Path) -> None:
    (tmp_path / "cpu.txt").write_text("# pins\nA_b==1.0\ntorch==2.13.0\n")
    (tmp_path / "cuda.txt").write_text("-c cpu.txt\ntorch==2.13.1 ; python_version > '3'\n")
    assert read_pins(tmp_path / "cuda.txt") == {"a-b": "1.0", "torch": "2.13.1"}
    shipped = pins_file(cuda=True)
    assert shipped is not None
    assert len(read_pins(shipped)) > 100


def test_away_from_a_checkout_our_own_ranges_count() -> None:
    requires = ["numpy>=2.0", "pillow>=11", "torch>=2.8; extra == 'train'", "av>=14; extra == 'video'"]
    parts = {"oxe-mix": ("0.1.0", requires), "numpy": ("2.4", []), "torch": ("2.9", [])}
    said = check_ranges(_have(**parts, pillow=("11.3", [])))
    assert (said.level, said.text) == ("ok", "3 requirements met")
    said = check_ranges(_have(**{**parts, "torch": ("2.7", [])}))
    assert said.level == "error"
    assert said.text == "pillow is missing (needs >=11), torch 2.7 (needs >=2.8)"


def test_conflicts_are_those_that_pip_check_finds() -> None:
    numpy = ["numpy<2", "gone>=1; extra == 'all'", "other; python_version < '3'", "not a requirement ==="]
    said = check_conflicts(_have(a=("1", numpy), b=("1", ["c"]), numpy=("2.4", [])))
    assert said.level == "error"
    assert said.text == "2 conflicts: a needs numpy<2, there is 2.4, b needs c, which is missing"
    assert check_conflicts(_have(a=("1", ["numpy"]), numpy=("2.4", []))).level == "ok"
    assert installed().versions["oxe-mix"]


@pytest.mark.parametrize(
    ("facts", "driver", "level", "words"),
    [
        (TorchFacts("2.13.0+cpu"), None, "ok", "none; training runs on the CPU"),
        (TorchFacts("2.13.0+cpu"), "H200, driver 570", "warning", "only its CPU build is installed"),
        (TorchFacts("2.13.0", "12.8"), "H200, driver 570", "warning", "its CUDA does not start"),
        (TorchFacts("2.13.0", "12.8", (("H200", 150 * GB),)), "H200, driver 570", "ok", "H200 with 150.0 GB"),
        (TorchFacts("2.13.0", "12.8", (("T400", 4 * GB),)), None, "warning", "little memory"),
    ],
)
def test_a_gpu_that_torch_does_not_see_is_a_warning(
    facts: TorchFacts, driver: str | None, level: str, words: str
) -> None:
    said = check_gpu(facts, driver)
    assert (said.level, words in said.text) == (level, True)
    assert bool(said.mend) == (level == "warning")


def test_torch_and_deepspeed_are_ok_missing_or_broken() -> None:
    fine = TorchFacts("2.13.0", "12.8", deepspeed="0.19.8")
    assert check_torch(fine).text == "2.13.0, CUDA 12.8"
    assert check_deepspeed(fine).level == "ok"
    none = TorchFacts(torch_error="ModuleNotFoundError: No module named 'torch'")
    assert [check_torch(none).level, check_deepspeed(none).level] == ["warning", "warning"]
    assert check_torch(TorchFacts(torch_error="OSError: libcudart.so")).level == "error"
    missing = TorchFacts("2.13.0", deepspeed_error="ModuleNotFoundError: No module named 'deepspeed'")
    assert check_deepspeed(missing).mend == 'pip install "oxe-mix[train]"'
    broken = TorchFacts("2.13.0", deepspeed_error="ImportError: undefined symbol")
    assert (check_deepspeed(broken).level, check_deepspeed(broken).text) == (
        "error",
        "ImportError: undefined symbol",
    )


def _program(file: Path, script: str) -> None:
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)


def test_an_import_that_ends_the_process_is_told_and_ends_only_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _program(tmp_path / "python", "echo half a line; echo 'Illegal instruction' >&2; exit 132")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert torch_facts().torch_error == "the import ends the process (exit 132): Illegal instruction"


def test_the_driver_is_what_nvidia_smi_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert nvidia_driver() is None
    _program(tmp_path / "nvidia-smi", "echo 'NVIDIA H200, 570.86.15'")
    assert nvidia_driver() == "NVIDIA H200, driver 570.86.15"
    _program(tmp_path / "nvidia-smi", "echo 'couldn't communicate' 1>&2; exit 9")
    assert nvidia_driver() is None


@pytest.mark.parametrize(
    ("said", "level", "words"),
    [
        (check_python((3, 11, 7)), "ok", "3.11.7"),
        (check_python((3, 13, 0)), "error", "tested are 3.11 and 3.12"),
        (check_compiler("/usr/bin/c++"), "ok", "/usr/bin/c++"),
        (check_compiler(None), "warning", "only train.compile: true needs one"),
        (check_disk(Path("data"), 200 * GB), "ok", "--max-gb 90"),
        (check_disk(Path("data"), 10 * GB), "warning", "10.0 GB free for data"),
        (check_disk(Path("data"), GB // 2), "error", "500.0 MB free"),
        (check_disk(Path("data"), None), "warning", "cannot be asked"),
        (check_memory(1, 16 * GB), "ok", "1 core, 16.0 GB free"),
        (check_memory(8, 2 * GB), "warning", "8 cores, 2.0 GB free"),
        (check_memory(8, None), "ok", "not known"),
        (check_shared_memory(64 * 2**20), "warning", "67.1 MB free in /dev/shm"),
        (check_shared_memory(8 * GB), "ok", "8.0 GB free in /dev/shm"),
        (check_shared_memory(None), "warning", "no /dev/shm"),
        (check_open_files(256), "warning", "at most 256"),
        (check_open_files(1024), "ok", "at most 1,024"),
        (check_open_files(resource.RLIM_INFINITY), "ok", "no limit"),
    ],
)
def test_each_fact_of_the_machine_has_its_level(said: Verdict, level: str, words: str) -> None:
    assert (said.level, words in said.text) == (level, True)
    assert said.mend or level == "ok" or "cannot be asked" in said.text
    parse_commands(said.mend)


@pytest.fixture
def server() -> Iterator[Callable[[bytes], str]]:
    """Starts a server that gives one answer, or none when that is empty; returns its address."""
    silence = threading.Event()

    def start(answer: bytes) -> str:
        listener = socket.create_server(("127.0.0.1", 0))

        def serve() -> None:
            with listener:
                connection, _ = listener.accept()
                with connection:
                    connection.recv(4096)
                    if answer:
                        connection.sendall(answer)
                    else:
                        silence.wait(60)

        threading.Thread(target=serve, daemon=True).start()
        return f"http://127.0.0.1:{listener.getsockname()[1]}"

    yield start
    silence.set()


def test_a_source_answers_refuses_or_is_silent(
    server: Callable[[bytes], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "*")
    there, absent = (
        b"HTTP/1.1 206 Partial Content\r\nContent-Length: 2\r\n\r\n{}",
        b"HTTP/1.1 404 No\r\nContent-Length: 0\r\n\r\n",
    )
    for answer in (there, absent):
        url = server(answer)
        assert check_source(f"{url}/a.json") == Verdict("ok", "machine", "network", f"{url} answers")
    closed = check_source("http://127.0.0.1:9/a.json")
    assert closed.level == "warning"
    assert closed.text == "http://127.0.0.1:9: [Errno 111] Connection refused"
    assert parse_commands(closed.mend) == 1
    forbidden = check_source(f"{server(b'HTTP/1.1 403 No' + bytes([13, 10]) * 2)}/a.json")
    assert "no permission (HTTP 403)" in forbidden.text
    start = time.monotonic()
    silent = check_source(f"{server(b'')}/a.json", timeout_s=0.3)
    assert silent.level == "warning"
    assert time.monotonic() - start < 30


def test_a_resolver_that_hangs_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """No timeout of a socket covers the name of a host."""

    late = threading.Event()

    def hang(*_: object) -> None:
        late.wait(60)
        raise OSError("too late")

    monkeypatch.setattr("oxe_mix.doctor_machine.open_range", hang)
    start = time.monotonic()
    said = check_source("https://somewhere.example/a.json", timeout_s=0.2)
    assert said.text == "https://somewhere.example: no answer within 0.2 s"
    assert time.monotonic() - start < 30
    late.set()


def test_the_command_looks_at_everything_and_says_what_comes_next(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code = run_doctor(DoctorOptions(offline=True, json=True))
    said = json.loads(capsys.readouterr().out)
    assert [one["check"] for one in said["checks"]] == [
        *("python", "versions", "conflicts", "torch", "deepspeed"),
        *("gpu", "compiler", "disk", "memory", "shared memory", "open files"),
    ]
    assert code == int(said["counts"]["error"] > 0)
    assert sum(said["counts"].values()) == 11


def test_a_source_of_the_default_mix_is_asked_once(cards: Cards, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[str]()

    def answer(url: str) -> Verdict:
        asked.append(url)
        return Verdict("ok", "machine", "network", url)

    monkeypatch.setattr("oxe_mix.doctor_machine.check_source", answer)
    monkeypatch.setattr("oxe_mix.doctor_machine.torch_facts", lambda: TorchFacts("2.13.0"))
    found = machine_verdicts(Path("data"), load_mix(Path("default.yaml"), cards), cards)
    assert "gs://gresearch/robotics/fractal20220817_data/0.1.0/dataset_info.json" in asked
    assert len(asked) == 2  # the bucket, and the page of bridge_orig
    assert sum(one.check == "network" for one in found) == 2


def test_what_is_worst_comes_first_with_what_mends_it_below(monkeypatch: pytest.MonkeyPatch) -> None:
    verdicts = [
        Verdict("ok", "sound", "disk", "12 GB"),
        Verdict("warning", "odd", "torch", "a\nb", ("odd/1",), "make \x1b[2J setup"),
        Verdict("ok", "bad", "memory", "4 GB"),
        Verdict("warning", "bad", "files", "few"),
        Verdict("error", "bad", "gpu", "gone", mend="nvidia-smi"),
    ]
    assert report(verdicts, every=False).splitlines() == [
        "bad: 1 error, 1 warning, 1 ok",
        "  error    gpu    gone",
        "                  -> nvidia-smi",
        "  warning  files  few",
        "odd: 1 warning",
        "  warning  torch  a b, e.g. 1",
        "                  -> make ?[2J setup",
        "sound: 1 ok",
    ]
    assert "  ok       memory  4 GB" in report(verdicts, every=True).splitlines()
    # On a terminal the words are red, yellow and green, unless its owner wants none.
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    painted = report(verdicts, every=True)
    assert "  \x1b[1;31merror\x1b[0m    gpu     gone" in painted
    assert "  \x1b[1;33mwarning\x1b[0m  files   few" in painted
    assert "  \x1b[1;32mok\x1b[0m       memory  4 GB" in painted
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in report(verdicts, every=True)


def test_the_last_cause_keeps_its_brackets_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    chain = """u: HTTPSConnectionPool(host='h', port=443): Max (Caused by NameResolutionError("<x>: """
    unknown = "Failed to resolve 'h' ([Errno -2] Name not known)"
    for told, reason in (
        (f'{chain}{unknown}"))', unknown),
        (chain + """no route"))""", "no route"),
        ("u: no permission (HTTP 403)", "no permission (HTTP 403)"),
        ("u: (" + "x" * 200 + ")", "(" + "x" * 159 + " ..."),
    ):

        def fail(*_: object, told: str = told) -> None:
            raise OSError(told)

        monkeypatch.setattr("oxe_mix.doctor_machine.open_range", fail)
        assert check_source("https://h/a.json").text == f"https://h: {reason}"
