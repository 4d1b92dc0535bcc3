"""`oxe-mix doctor` and `report`: words that they do not use are refused, and a terminal is coloured."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
from pathlib import Path

import pytest

from convert.doctor_checks import CHECKS
from tests.conftest import OXE_MIX, ROOT, run
from tests.recorded_episodes import clean, write
from tests.test_doctor_faults import black, metres_to_millimetres, nan, never_moves

CARDS = ROOT / "examples/my_robot/cards"


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("doctor DATA --cards nowhere", "nowhere: no such folder of cards"),
        ("report DATA --cards nowhere", "nowhere: no such folder of cards"),
        (f"doctor LLAVA --cards {CARDS}", "--cards: not used for converted data, only for: downloaded data"),
        (f"report LLAVA --cards {CARDS}", "--cards: not used for converted data, only for: downloaded data"),
        ("doctor --cards nowhere", "--cards: not used for this machine, only for: downloaded data"),
        ("doctor --episodes 3 --all", "--episodes: not used for this machine, only for: downloaded data or"),
        ("doctor --seed 1", "--seed: not used for this machine"),
        ("doctor --all", "--all: not used for this machine"),
        ("doctor DATA --offline", "--offline: not used for downloaded data, only for: this machine"),
        ("doctor DATA --episodes 3 --all", "--episodes and --all: give one of the two"),
        ("report LLAVA --device gpu", "--device: not used for converted data, only for: training run"),
        ("report DATA --samples 3", "--samples: not used for downloaded data, only for: training run"),
        ("report RUN --device gpu", "--samples and --device are for what the model says; give --data, too"),
        ("report RUN --cards nowhere", "--cards: not used for training run, only for: downloaded data"),
        ("report RUN --seed 3", "--seed: not used for training run, only for: downloaded data or converted"),
        ("report LLAVA --data LLAVA", "--data: not used for converted data, only for: training run"),
        ("report README.md", "is a file; give the folder that download, pack, convert or make train wrote"),
        ("doctor README.md", "is a file; give the folder that download, pack or convert wrote"),
        ("report OWN", "OWN: there is no card for my_robot; give the folder of your own: --cards FOLDER"),
        ("doctor OWN", "OWN: there is no card for my_robot; give the folder of your own: --cards FOLDER"),
    ],
)
def test_what_would_be_ignored_is_refused(
    typed: str, said: str, data: Path, llava: Path, own: Path, tmp_path: Path
) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    folders = {"DATA": data, "LLAVA": llava, "OWN": own, "RUN": tmp_path}
    words = [str(folders.get(word, word)) for word in typed.split()]
    [line] = run(OXE_MIX, *words, code=2).stderr.splitlines()
    assert line.startswith("error: ")
    assert said.replace("OWN", str(own)) in line


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed dataset of a robot that only its own card knows."""
    out = tmp_path_factory.mktemp("own") / "data"
    run(OXE_MIX, "pack", CARDS.parent / "episodes", "--card", CARDS / "my_robot.yaml", "--out", out)
    return out


def test_ones_own_robot_is_looked_at_by_ones_own_card(own: Path) -> None:
    said = run(OXE_MIX, "doctor", own, "--cards", CARDS).stdout
    assert said.startswith("my_robot: 16 ok\n")
    assert f"next: oxe-mix convert --to llava --data {own} --cards {CARDS}\n" in said


def test_json_is_complete_and_a_terminal_sees_colours_unless_it_wants_none(tmp_path: Path) -> None:
    episodes = clean()
    nan(episodes)
    data = write(tmp_path / "data", episodes)
    said = json.loads(run(OXE_MIX, "doctor", data, "--json", code=1).stdout)
    assert said["counts"] == {"ok": 15, "warning": 0, "error": 1}
    assert [one["level"] for one in said["checks"]].count("ok") == 15
    assert "\x1b" not in run(OXE_MIX, "doctor", data, code=1).stdout
    assert "\x1b[1;31merror\x1b[0m    finite numbers" in _on_a_terminal(data)
    plain = _on_a_terminal(data, NO_COLOR="1")
    assert "  error    finite numbers" in plain
    assert "\x1b[1;" not in plain


def _on_a_terminal(data: Path, **variables: str) -> str:
    """What the command writes where its output is a terminal."""
    environment = {key: value for key, value in os.environ.items() if key != "NO_COLOR"}
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [OXE_MIX, "doctor", str(data)],
        stdout=theirs,
        stderr=subprocess.DEVNULL,
        env=environment | {"TERM": "xterm"} | variables,
    )
    os.close(theirs)
    read = b""
    try:
        while part := os.read(ours, 65536):
            read += part
    except OSError:  # Linux says so at the end
        pass
    os.close(ours)
    assert process.wait() == 1
    return read.decode()


def test_the_page_shows_what_is_really_said(tmp_path: Path) -> None:
    page = (ROOT / "docs/doctor.md").read_text()
    episodes = clean()
    for plant in (nan, black, never_moves, metres_to_millimetres):
        plant(episodes)
    write(tmp_path / "data", episodes)
    [shown] = re.findall(r"```text\n(.*?)```", page, re.DOTALL)
    said = run(OXE_MIX, "doctor", "data", cwd=tmp_path, code=1).stdout
    assert re.sub(r"[\d.]+ s;", "0.8 s;", said) == shown
    [block] = re.findall(r"```json\n(.*?)```", page, re.DOTALL)
    excerpt = json.loads(block)
    whole = json.loads(run(OXE_MIX, "doctor", "data", "--json", cwd=tmp_path, code=1).stdout)
    assert [one in whole["checks"] for one in excerpt["checks"]] == [True]
    assert {**whole, "checks": excerpt["checks"]} == excerpt
    checks = re.findall(r"^\| ([a-z ]+?) \|", page.split("## What it checks")[1], re.MULTILINE)
    assert checks[1 : 1 + len(CHECKS)] == [name for name, _ in CHECKS]
