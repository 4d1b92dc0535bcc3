"""Small habits: a fingerprint, completion, colours that stay out of files, and more words on request."""

from __future__ import annotations

import os
import pty
import re
import subprocess
from pathlib import Path

import pytest

from oxe_mix import fingerprint as fingerprints
from tests.conftest import OXE_MIX, PYTHON, ROOT, run


def test_the_fingerprint_names_what_decides_about_a_result() -> None:
    lines = run(OXE_MIX, "--version").stdout.splitlines()
    assert re.fullmatch(r"oxe-mix \d+\.\d+\.\d+", lines[0])
    digest = "([0-9a-f]{12})"
    wanted = rf"code {digest}, cards {digest}, feature trees {digest}, mixes {digest}, configs {digest}"
    found = re.fullmatch(wanted, lines[1])
    assert found is not None
    assert len(set(found.groups())) == 5
    assert lines[2].startswith("Python 3.")
    assert "GPU driver " in lines[2]
    assert "transformers 5." in lines[3]
    assert lines == run(OXE_MIX, "--version").stdout.splitlines()


def test_the_fingerprint_is_of_names_and_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprints, "_ROOT", tmp_path)
    folder = tmp_path / "oxe_mix/cards"
    folder.mkdir(parents=True)

    def cards() -> str:
        return fingerprints.fingerprint().splitlines()[1].split(", ")[1]

    assert cards() == "cards none"
    seen = []
    for name, text in (("a.yaml", "x"), ("a.yaml", "y"), ("b.yaml", "y")):
        (folder / name).write_text(text)
        seen.append(cards())
    (folder / "a.yaml").unlink()
    seen.append(cards())
    assert len(set(seen)) == 4


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("oxe-mix dow", {"download"}),
        ("oxe-mix datasets ku", {"kuka"}),
        ("oxe-mix download --mix dro", {"droid.yaml", "droid_wipe.yaml"}),
        ("oxe-mix mix check bridge_r", {"bridge_rt_1.yaml"}),
        ("oxe-mix convert --only ku", {"kuka"}),
        ("oxe-mix convert --layout t", {"tar"}),
    ],
)
def test_a_shell_can_complete(typed: str, expected: set[str]) -> None:
    words = {"COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" ")), "_OXE_MIX_COMPLETE": "complete_bash"}
    done = subprocess.run([OXE_MIX], env={**os.environ, **words}, capture_output=True, text=True, check=False)
    assert set(done.stdout.split()) == expected


def _on_a_terminal(*words: str, **environment: str) -> str:
    """What a command writes to a terminal."""
    ours, theirs = pty.openpty()
    variables = {name: value for name, value in os.environ.items() if name != "NO_COLOR"} | {"TERM": "xterm"}
    command = [str(OXE_MIX), *words]
    with subprocess.Popen(command, stdout=theirs, stderr=theirs, env={**variables, **environment}):
        os.close(theirs)
        said = b""
        while True:
            try:
                more = os.read(ours, 4096)
            except OSError:  # the other end is closed
                break
            said += more
    os.close(ours)
    return said.decode()


def test_colours_are_for_terminals_alone() -> None:
    assert "\033[1;31merror:\033[0m no dataset called 'kukka'" in _on_a_terminal("datasets", "kukka")
    assert "\033" not in _on_a_terminal("datasets", "kukka", NO_COLOR="1")
    assert "\033" not in _on_a_terminal("datasets", "kukka", TERM="dumb")
    assert run(OXE_MIX, "datasets", "kukka", code=2).stderr.startswith("error: no dataset")


def test_verbose_shows_where_an_error_was_found() -> None:
    quiet = run(OXE_MIX, "datasets", "kukka", code=2).stderr
    assert quiet == "error: no dataset called 'kukka'; did you mean kuka?\n"
    loud = run(OXE_MIX, "--verbose", "datasets", "kukka", code=2).stderr
    assert "Traceback" in loud
    assert loud.endswith(quiet)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (("dowload",), "download"),
        (("mix", "chek"), "check"),
        (("download", "--mixx", "a"), "--mix"),
        (("datasets", "kukka"), "kuka"),
        (("mix", "check", "defualt.yaml"), "default?"),
    ],
)
def test_what_was_meant_is_guessed(typed: tuple[str, ...], meant: str) -> None:
    said = run(OXE_MIX, *typed, code=2).stderr
    assert meant in said
    assert re.fullmatch(r"error: .*\n", said)


def test_what_is_not_like_anything_is_not_guessed() -> None:
    said = run(OXE_MIX, "mix", "check", "nowhere.yaml", code=2).stderr
    assert "known: bridge, " in said


def test_an_option_of_the_whole_is_said_to_be_one() -> None:
    said = run(OXE_MIX, "datasets", "--verbose", code=2).stderr
    assert "(--verbose stands before the command: oxe-mix --verbose ...)" in said


def test_what_the_system_refuses_is_one_line() -> None:
    said = run(OXE_MIX, "synth", "--out", "/proc/x", code=2).stderr
    assert said == "error: /proc/x: No such file or directory\n"


@pytest.mark.parametrize(
    "words", [("check", "nowhere"), ("act", "--checkpoint", "nowhere", "--image", "a.png")]
)
def test_a_folder_that_is_not_there_is_said_to_be_so(words: tuple[str, ...]) -> None:
    assert "nowhere: no such folder; give one that oxe-mix convert" in run(OXE_MIX, *words, code=2).stderr


def test_data_that_was_not_converted_is_said_to_be_so(data: Path) -> None:
    said = run(OXE_MIX, "check", data, code=2).stderr
    assert said.endswith(f"run oxe-mix convert --data {data} --out llava\n")


def test_a_group_alone_shows_its_commands() -> None:
    done = run(OXE_MIX, "mix", code=2)
    assert "check" in done.stdout + done.stderr


def test_a_setting_that_make_does_not_know_is_refused() -> None:
    done = subprocess.run(
        ["make", "-n", "train", "LAVA=x"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "LAVA: no such setting; there are CONFIG NPROC LLAVA" in done.stderr


def test_lines_of_several_threads_stay_whole() -> None:
    """As those of several hosts, which one process shows."""
    code = (
        "import threading; from oxe_mix.text import say; "
        "threads = [threading.Thread(target=lambda: [say('whole') for _ in range(2000)]) for _ in range(4)]; "
        "[one.start() for one in threads]; [one.join() for one in threads]"
    )
    done = subprocess.run([PYTHON, "-u", "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "whole\n" * 8000
