"""`oxe-mix doctor DATA`: one planted fault after another, what is said of it, and what mends it."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from convert.doctor_command import DoctorOptions, run_doctor
from convert.doctor_mends import skip
from convert.doctor_summary import DatasetSummary
from tests.command_lines import parse
from tests.recorded_episodes import EPISODES, STEPS, Plant, Recording, clean, jpeg, picture, write

Said = dict[str, dict[str, Any]]


def examine(capsys: pytest.CaptureFixture[str], folder: Path, code: int = 0, **options: Any) -> Said:
    """What the command says, by check; of several datasets by DATASET CHECK. What is not ok is told with what
    mends it, and each command in that can be typed.
    """
    capsys.readouterr()
    assert run_doctor(DoctorOptions(folder=folder, json=True, **options)) == code
    checks = json.loads(capsys.readouterr().out)["checks"]
    for one in checks:
        assert bool(one["mend"]) == (one["level"] != "ok"), one
        parse_commands(one["mend"])
    several = len({one["subject"] for one in checks}) > 1
    return {f"{one['subject']} {one['check']}" if several else one["check"]: one for one in checks}


def alarms(said: Said) -> dict[str, str]:
    """The level of everything that is not ok."""
    return {name: one["level"] for name, one in said.items() if one["level"] != "ok"}


def idle(episodes: list[Recording]) -> None:
    for episode in episodes:
        episode.moves[4:] = 0
        episode.closing[4:], episode.width[4:] = -1, 0.08


def never_moves(episodes: list[Recording]) -> None:
    episodes[3].moves[:] = 0
    episodes[3].closing[:], episodes[3].width[:] = -1, 0.08


def frozen_everywhere(episodes: list[Recording]) -> None:
    for i, episode in enumerate(episodes):
        episode.moves[:, 0] += 0.02
        episode.agent[4:] = [picture(i, 4, 0, quality=90 - t % 5) for t in range(STEPS - 4)]


def frozen_once(episodes: list[Recording]) -> None:
    episodes[5].moves[:, 0] = 0.03
    episodes[5].agent[2:10] = [picture(5, 2, 0, quality=80 + t) for t in range(8)]


def black_now_and_then(episodes: list[Recording]) -> None:
    episodes[2].agent[7] = jpeg(np.zeros((224, 224, 3), np.uint8))


def black(episodes: list[Recording]) -> None:
    for episode in episodes:
        episode.agent[:] = [jpeg(np.zeros((224, 224, 3), np.uint8))] * STEPS


def no_wrist(episodes: list[Recording]) -> None:
    for episode in episodes:
        episode.wrist[:] = [jpeg(np.full((224, 224, 3), 128, np.uint8))] * STEPS


def swap(episodes: list[Recording], which: range, cameras: tuple[int, ...]) -> None:
    for i in which:
        for camera in cameras:
            frames = (episodes[i].agent, episodes[i].wrist)[camera]
            frames[:] = [picture(i, t, camera, swap=True) for t in range(STEPS)]


def three_swapped(episodes: list[Recording]) -> None:
    swap(episodes, range(4, 7), (0,))


def wrist_swapped(episodes: list[Recording]) -> None:
    swap(episodes, range(EPISODES), (1,))


def all_swapped(episodes: list[Recording]) -> None:
    swap(episodes, range(EPISODES), (0, 1))


def each_twice(episodes: list[Recording]) -> None:
    for episode in episodes:
        episode.wrist[1::2] = episode.wrist[::2]


def one_picture(episodes: list[Recording]) -> None:
    for episode in episodes[:4]:
        episode.agent[9] = picture(0, 0, 0)


def twice(episodes: list[Recording]) -> None:
    episodes[7] = episodes[1]


def twice_but_for_the_reward(episodes: list[Recording]) -> None:
    episodes[7] = replace(episodes[1], reward=1.0)


def wrong_gripper(episodes: list[Recording]) -> None:
    for episode in episodes:
        episode.closing[:] = -episode.closing


def some_wrong_grippers(episodes: list[Recording]) -> None:
    for episode in episodes[:4]:
        episode.closing[:] = -episode.closing


def tiny(episodes: list[Recording]) -> None:
    for episode in episodes:
        episode.moves[:, 2] *= 1e-5


def constant(episodes: list[Recording]) -> None:
    for episode in episodes:
        episode.moves[:, 4] = 0.25


def rarely(episodes: list[Recording]) -> None:
    for episode in episodes:
        episode.moves[:, 4] = 0
    episodes[0].moves[0, 4] = 0.1


def outlier(episodes: list[Recording]) -> None:
    episodes[6].moves[3, 1] = 2.0


def garbage(episodes: list[Recording]) -> None:
    episodes[6].moves[3, 1] = 1e4


def nan(episodes: list[Recording]) -> None:
    episodes[4].moves[11, 5] = np.nan


def infinite(episodes: list[Recording]) -> None:
    episodes[4].moves[11, 5] = np.inf


def bad_state(episodes: list[Recording]) -> None:
    episodes[4].width[2] = np.nan


def silent(episodes: list[Recording]) -> None:
    for episode in episodes:
        episode.text[:] = [""] * STEPS


def one_silent(episodes: list[Recording]) -> None:
    episodes[9].text[:] = [" . "] * STEPS


def dummy(episodes: list[Recording]) -> None:
    episodes[9].text[:] = ["TODO"] * STEPS


def one_task(episodes: list[Recording]) -> None:
    for episode in episodes:
        episode.text[:] = ["pour"] * STEPS


def broken_frame(episodes: list[Recording]) -> None:
    episodes[0].agent[6] = episodes[0].agent[6][:2000]


def cut_end(episodes: list[Recording]) -> None:
    episodes[0].agent[6] = episodes[0].agent[6][:-2]


def other_size(episodes: list[Recording]) -> None:
    episodes[0].agent[6] = jpeg(np.full((112, 224, 3), 90, np.uint8))


def broken_between_those_looked_at(episodes: list[Recording]) -> None:
    episodes[0] = long(episodes[0])
    episodes[0].agent[101] = b"garbage"


def long(recording: Recording) -> Recording:
    """One of which only every second frame is decoded."""
    times = 13
    moves, closing, width = (
        np.concatenate([own] * times) for own in (recording.moves, recording.closing, recording.width)
    )
    agent, wrist, text = recording.agent * times, recording.wrist * times, recording.text * times
    return Recording(moves, closing, width, agent, wrist, text)


def frozen_and_waiting(episodes: list[Recording]) -> None:
    """A longer stretch without a change in which the robot waits does not hide it."""
    for i, episode in enumerate(episodes):
        episode.moves[:8] = 0
        episode.agent[:8] = [picture(i, 0, 0, quality=90 - t % 5) for t in range(8)]
        episode.moves[9:, 0] += 0.03
        episode.agent[9:15] = [picture(i, 9, 0, quality=90 - t % 5) for t in range(6)]


def no_camera(episodes: list[Recording]) -> None:
    black(episodes)
    no_wrist(episodes)


def metres_to_millimetres(episodes: list[Recording]) -> None:
    for episode in episodes:
        episode.moves[:, :3] *= 1000


def nothing_moves(episodes: list[Recording]) -> None:
    for episode in episodes:
        episode.moves[:] = 0


def _silence(episodes: list[Recording], num: int) -> None:
    for episode in episodes[:num]:
        episode.text[:] = [""] * STEPS


def half_silent(episodes: list[Recording]) -> None:
    _silence(episodes, EPISODES // 2)


def most_silent(episodes: list[Recording]) -> None:
    _silence(episodes, EPISODES // 2 + 1)


SKIP = "leave these episodes out: oxe-mix convert --data D --on-bad-record skip --max-bad 10"
BROKEN = f"see all of it: oxe-mix verify D; leave broken records out: {SKIP[26:]}"
OUT = "no option leaves out chosen episodes: take viola out of the mix, or pack your own recordings"
LOOK = "oxe-mix report D; "
RANGE = "see it: oxe-mix report D; the recipe that makes it: oxe-mix datasets viola"
INVERT = "add or take away invert in a card of your own"
FLIP = "give viola mods: [{flip_channels: [NAME]}] in a mix, say my-mix.yaml: oxe-mix convert --data D --mix"
NO_TEXT = "does the card name the right language key? oxe-mix datasets viola; pack your own recordings again"


MENDS: dict[Plant, str] = {
    idle: "out: oxe-mix convert --data D --drop-idle",
    never_moves: f"keeps an episode that never moves; {OUT}",
    frozen_everywhere: OUT,
    frozen_once: OUT,
    black_now_and_then: OUT,
    black: "oxe-mix convert --data D --only viola --cameras wrist",
    no_wrist: "unless --cameras names it: oxe-mix convert --data D --cameras primary",
    no_camera: "no camera that sees: take viola out of the mix",
    three_swapped: f"{LOOK}mods turn all episodes round; {OUT}",
    wrist_swapped: FLIP.replace("NAME", "eye_in_hand_rgb"),
    all_swapped: FLIP.replace("NAME", "agentview_rgb"),
    each_twice: "slower than the robot? oxe-mix convert --data D --only viola --stride 2",
    one_picture: f"one scene copied? {LOOK}{OUT}",
    twice: "they count twice; pack your own recordings without the copies",
    twice_but_for_the_reward: "they count twice",
    wrong_gripper: f"{LOOK}if it is so, {INVERT}",
    some_wrong_grippers: OUT,
    tiny: RANGE,
    constant: RANGE,
    rarely: RANGE,
    outlier: RANGE,
    garbage: RANGE,
    metres_to_millimetres: "name them in action.units of a card",
    nothing_moves: RANGE,
    nan: SKIP,
    infinite: SKIP,
    bad_state: SKIP.replace("D", "D --state"),
    silent: NO_TEXT,
    most_silent: NO_TEXT,
    half_silent: NO_TEXT,
    one_silent: NO_TEXT,
    dummy: NO_TEXT,
    one_task: "language key: oxe-mix datasets viola",
    broken_frame: BROKEN,
    cut_end: BROKEN,
    other_size: BROKEN,
    broken_between_those_looked_at: BROKEN,
    frozen_and_waiting: OUT,
}


@pytest.mark.parametrize(
    ("plant", "expected", "words"),
    [
        (idle, {"idle steps": "warning"}, "at most 12 in a row"),
        (never_moves, {"idle steps": "warning"}, "1 episode without any movement"),
        (frozen_everywhere, {"frozen frames": "error", "repeated frames": "ok"}, "primary: 132 of 192 steps"),
        (frozen_once, {"frozen frames": "warning"}, "primary: 7 of 192 steps in 1 episode"),
        (black_now_and_then, {"blank frames": "warning"}, "1 of 192 frames are black"),
        (black, {"blank frames": "error"}, "192 of 192 frames are black"),
        (no_wrist, {"blank frames": "warning"}, "wrist: 192 of 192 frames are one colour, 0 of them black"),
        (no_camera, {"blank frames": "error"}, "frames are black; wrist"),
        (three_swapped, {"colour channels": "warning"}, "3 of 12 episodes look like the others"),
        (wrist_swapped, {"colour channels": "warning"}, "primary and wrist agree in their hues only if"),
        (all_swapped, {"colour channels": "warning"}, "of its warm or cool colours are cool"),
        (each_twice, {"repeated frames": "warning"}, "wrist: 96 of 180 frames are the one before"),
        (one_picture, {"repeated frames": "warning"}, "1 picture in 3 episodes or more"),
        (twice, {"repeated episodes": "warning"}, "1 of 12 compared are there before"),
        (twice_but_for_the_reward, {"repeated episodes": "warning"}, "1 of 12 compared are there before"),
        (wrong_gripper, {"gripper polarity": "warning"}, "-1.00 at 2 steps of delay: right if"),
        (some_wrong_grippers, {"gripper polarity": "warning"}, "in 4 of 12 episodes the other way round"),
        (tiny, {"action range": "warning"}, "dimension 2: its range is"),
        (constant, {"action range": "warning"}, "dimension 4: never changes"),
        (rarely, {"action range": "warning"}, "dimension 4: moves in less than 2 % of the steps"),
        (outlier, {"action range": "warning"}, "dimension 1: -0.0"),
        (garbage, {"action range": "error"}, "to 1e+04, but 98 % in"),
        (metres_to_millimetres, {"action units": "warning"}, "more than 1 m a step"),
        (nothing_moves, {"action range": "error", "idle steps": "warning"}, "nothing ever moves"),
        (nan, {"finite numbers": "error"}, "1 action and 0 values of states are NaN or infinite"),
        (infinite, {"finite numbers": "error"}, "1 action and"),
        (bad_state, {"finite numbers": "error"}, "0 actions and 1 value of states"),
        (silent, {"instructions": "error"}, "12 of 12 episodes have none, 0 a placeholder"),
        (most_silent, {"instructions": "error"}, "7 of 12 episodes have none"),
        (half_silent, {"instructions": "warning"}, "6 of 12 episodes have none"),
        (one_silent, {"instructions": "warning"}, "1 of 12 episodes have none, 0 a placeholder"),
        (dummy, {"instructions": "warning"}, "0 of 12 episodes have none, 1 a placeholder"),
        (one_task, {"instructions": "warning"}, "all 12 episodes say 'pour'"),
        (broken_frame, {"episodes": "error"}, "bytes is cut off: its end marker"),
        (cut_end, {"episodes": "error"}, "viola/train/0/0/6: the frame of 6,570 bytes is cut off"),
        (other_size, {"episodes": "error"}, "train/0/0/6: the frame is 112 pixels high, features.json says"),
        (
            broken_between_those_looked_at,
            {"episodes": "error"},
            "train/0/0/101: the frame of 7 bytes is neither",
        ),
        (frozen_and_waiting, {"frozen frames": "error"}, "primary: 55 of 192 steps in 11 episodes"),
    ],
    ids=lambda one: one.__name__ if callable(one) else "",
)
def test_a_planted_fault_is_the_only_one_found_and_told_with_what_mends_it(
    plant: Plant,
    expected: dict[str, str],
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    episodes = clean()
    plant(episodes)
    data = write(tmp_path / "data", episodes)
    said = examine(capsys, data, int("error" in expected.values()))
    first = next(iter(expected))
    assert words in said[first]["text"]
    assert alarms(said) == {name: level for name, level in expected.items() if level != "ok"}
    assert MENDS[plant] in said[first]["mend"].replace(str(data), "D")


def test_an_episode_of_one_step_is_no_fault(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    episodes = clean()
    one = episodes[3]
    episodes[3] = Recording(
        one.moves[:1], one.closing[:1], one.width[:1], one.agent[:1], one.wrist[:1], one.text[:1]
    )
    assert alarms(examine(capsys, write(tmp_path / "data", episodes), 0)) == {}


def test_more_broken_episodes_are_to_be_expected_than_were_looked_at() -> None:
    looked = SimpleNamespace(episodes=[0] * 25, unreadable=[0] * 5, of_episodes=2000)
    assert skip(6, cast(DatasetSummary, looked)).endswith("--max-bad 800")
    all_of_it = SimpleNamespace(episodes=[0] * 25, unreadable=[0] * 5, of_episodes=30)
    assert skip(16, cast(DatasetSummary, all_of_it)).endswith("--max-bad 16")


def parse_commands(mend: str) -> int:
    """Read the options of each command of a mend as the command does, and run nothing; returns how many."""
    commands = re.findall(r"oxe-mix ([^;]+)", mend)
    for typed in commands:
        parse(shlex.split(typed))
    return len(commands)


@pytest.mark.parametrize(
    "mend", ["a: oxe-mix dwnload", "oxe-mix convert --max-bad N; or not", "oxe-mix report"]
)
def test_a_command_that_is_none_would_be_found_in_a_mend(mend: str) -> None:
    assert parse_commands("a; b: oxe-mix convert --data d --drop-idle; oxe-mix datasets viola") == 2
    with pytest.raises(Exception, match=r"No such|valid integer|Missing"):
        parse_commands(mend)
