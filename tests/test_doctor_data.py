"""`oxe-mix doctor DATA|LLAVA`: each fault is found where it was planted, and clean data is quiet."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL.JpegImagePlugin import JpegImageFile

from convert.action_codec import ActionStats
from convert.doctor_checks import CHECKS
from convert.doctor_command import DoctorOptions, run_doctor
from convert.doctor_frames import SIDE, hue_histogram, swapped, thumbnail, track
from convert.doctor_gripper import gripper_column, gripper_polarity, gripper_range, state_sign
from convert.doctor_numbers import action_range, known_figures, width
from convert.doctor_summary import DatasetSummary, EpisodeSummary
from oxe_mix.cards import Cards
from oxe_mix.errors import UserError
from oxe_mix.images import decode
from oxe_mix.tfrecord import frame, read_records
from tests.converting import convert, edit_line
from tests.recorded_episodes import (
    EPISODES,
    STEPS,
    Plant,
    Recording,
    clean,
    jpeg,
    picture,
    pixels,
    write,
)

Said = dict[str, dict[str, Any]]


def examine(capsys: pytest.CaptureFixture[str], folder: Path, code: int = 0, **options: Any) -> Said:
    """What the command says, by check; of several datasets by DATASET CHECK."""
    capsys.readouterr()
    assert run_doctor(DoctorOptions(folder=folder, json=True, **options)) == code
    checks = json.loads(capsys.readouterr().out)["checks"]
    several = len({one["subject"] for one in checks}) > 1
    return {f"{one['subject']} {one['check']}" if several else one["check"]: one for one in checks}


def alarms(said: Said) -> dict[str, str]:
    """The level of everything that is not ok."""
    return {name: one["level"] for name, one in said.items() if one["level"] != "ok"}


def _idle(episodes: list[Recording]) -> None:
    for episode in episodes:
        episode.moves[4:] = 0
        episode.closing[4:], episode.width[4:] = -1, 0.08


def _never_moves(episodes: list[Recording]) -> None:
    episodes[3].moves[:] = 0
    episodes[3].closing[:], episodes[3].width[:] = -1, 0.08


def _frozen_everywhere(episodes: list[Recording]) -> None:
    for i, episode in enumerate(episodes):
        episode.moves[:, 0] += 0.02
        episode.agent[4:] = [picture(i, 4, 0, quality=90 - t % 5) for t in range(STEPS - 4)]


def _frozen_once(episodes: list[Recording]) -> None:
    episodes[5].moves[:, 0] = 0.03
    episodes[5].agent[2:10] = [picture(5, 2, 0, quality=80 + t) for t in range(8)]


def _black_now_and_then(episodes: list[Recording]) -> None:
    episodes[2].agent[7] = jpeg(np.zeros((224, 224, 3), np.uint8))


def _black(episodes: list[Recording]) -> None:
    for episode in episodes:
        episode.agent[:] = [jpeg(np.zeros((224, 224, 3), np.uint8))] * STEPS


def _no_wrist(episodes: list[Recording]) -> None:
    for episode in episodes:
        episode.wrist[:] = [jpeg(np.full((224, 224, 3), 128, np.uint8))] * STEPS


def _swap(episodes: list[Recording], which: range, cameras: tuple[int, ...]) -> None:
    for i in which:
        for camera in cameras:
            frames = (episodes[i].agent, episodes[i].wrist)[camera]
            frames[:] = [picture(i, t, camera, swap=True) for t in range(STEPS)]


def _three_swapped(episodes: list[Recording]) -> None:
    _swap(episodes, range(4, 7), (0,))


def _wrist_swapped(episodes: list[Recording]) -> None:
    _swap(episodes, range(EPISODES), (1,))


def _all_swapped(episodes: list[Recording]) -> None:
    _swap(episodes, range(EPISODES), (0, 1))


def _each_twice(episodes: list[Recording]) -> None:
    for episode in episodes:
        episode.wrist[1::2] = episode.wrist[::2]


def _one_picture(episodes: list[Recording]) -> None:
    for episode in episodes[:4]:
        episode.agent[9] = picture(0, 0, 0)


def _twice(episodes: list[Recording]) -> None:
    episodes[7] = episodes[1]


def _twice_but_for_the_reward(episodes: list[Recording]) -> None:
    episodes[7] = replace(episodes[1], reward=1.0)


def _wrong_gripper(episodes: list[Recording]) -> None:
    for episode in episodes:
        episode.closing[:] = -episode.closing


def _some_wrong_grippers(episodes: list[Recording]) -> None:
    for episode in episodes[:4]:
        episode.closing[:] = -episode.closing


def _tiny(episodes: list[Recording]) -> None:
    for episode in episodes:
        episode.moves[:, 2] *= 1e-5


def _constant(episodes: list[Recording]) -> None:
    for episode in episodes:
        episode.moves[:, 4] = 0.25


def _rarely(episodes: list[Recording]) -> None:
    for episode in episodes:
        episode.moves[:, 4] = 0
    episodes[0].moves[0, 4] = 0.1


def _outlier(episodes: list[Recording]) -> None:
    episodes[6].moves[3, 1] = 2.0


def _garbage(episodes: list[Recording]) -> None:
    episodes[6].moves[3, 1] = 1e4


def _nan(episodes: list[Recording]) -> None:
    episodes[4].moves[11, 5] = np.nan


def _infinite(episodes: list[Recording]) -> None:
    episodes[4].moves[11, 5] = np.inf


def _bad_state(episodes: list[Recording]) -> None:
    episodes[4].width[2] = np.nan


def _silent(episodes: list[Recording]) -> None:
    for episode in episodes:
        episode.text[:] = [""] * STEPS


def _one_silent(episodes: list[Recording]) -> None:
    episodes[9].text[:] = [" . "] * STEPS


def _dummy(episodes: list[Recording]) -> None:
    episodes[9].text[:] = ["TODO"] * STEPS


def _one_task(episodes: list[Recording]) -> None:
    for episode in episodes:
        episode.text[:] = ["pour"] * STEPS


def _broken_frame(episodes: list[Recording]) -> None:
    episodes[0].agent[6] = episodes[0].agent[6][:2000]


@pytest.mark.parametrize(
    ("plant", "expected", "words"),
    [
        (_idle, {"idle steps": "warning"}, "at most 12 in a row"),
        (_never_moves, {"idle steps": "warning"}, "1 episode never move"),
        (
            _frozen_everywhere,
            {"frozen frames": "error", "repeated frames": "ok"},
            "primary: 132 of 192 steps",
        ),
        (_frozen_once, {"frozen frames": "warning"}, "primary: 7 of 192 steps in 1 episode"),
        (_black_now_and_then, {"blank frames": "warning"}, "1 of 192 frames are black"),
        (_black, {"blank frames": "error"}, "192 of 192 frames are black"),
        (_no_wrist, {"blank frames": "warning"}, "wrist: 192 of 192 frames are one colour, 0 of them black"),
        (_three_swapped, {"colour channels": "warning"}, "3 of 12 episodes look like the others"),
        (_wrist_swapped, {"colour channels": "warning"}, "primary and wrist agree in their hues only if"),
        (_all_swapped, {"colour channels": "warning"}, "of its warm or cool colours are cool"),
        (_each_twice, {"repeated frames": "warning"}, "wrist: 96 of 180 frames are the one before"),
        (_one_picture, {"repeated frames": "warning"}, "1 picture in 3 episodes or more"),
        (_twice, {"repeated episodes": "warning"}, "1 of 12 compared are there before"),
        (_twice_but_for_the_reward, {"repeated episodes": "warning"}, "1 of 12 compared are there before"),
        (_wrong_gripper, {"gripper polarity": "warning"}, "-1.00 at 2 steps of delay: right if"),
        (_some_wrong_grippers, {"gripper polarity": "warning"}, "in 4 of 12 episodes the other way round"),
        (_tiny, {"action range": "warning"}, "dimension 2: its range is"),
        (_constant, {"action range": "warning"}, "dimension 4: never changes"),
        (_rarely, {"action range": "warning"}, "dimension 4: moves in less than 2 % of the steps"),
        (_outlier, {"action range": "warning"}, "dimension 1: -0.0"),
        (_garbage, {"action range": "error"}, "to 1e+04, but 98 % in"),
        (_nan, {"finite numbers": "error"}, "1 action and 0 values of states are NaN or infinite"),
        (_infinite, {"finite numbers": "error"}, "1 action and"),
        (_bad_state, {"finite numbers": "error"}, "0 actions and 1 value of states"),
        (_silent, {"instructions": "error"}, "none of 12 episodes has one"),
        (_one_silent, {"instructions": "warning"}, "1 of 12 episodes have none, 0 a placeholder"),
        (_dummy, {"instructions": "warning"}, "0 of 12 episodes have none, 1 a placeholder"),
        (_one_task, {"instructions": "warning"}, "all 12 episodes say 'pour'"),
        (_broken_frame, {"episodes": "error"}, "train/0/0/6: the frame cannot be decoded"),
    ],
    ids=lambda one: one.__name__ if callable(one) else "",
)
def test_a_planted_fault_is_the_only_one_found(
    plant: Plant,
    expected: dict[str, str],
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    episodes = clean()
    plant(episodes)
    code = int("error" in expected.values())
    said = examine(capsys, write(tmp_path / "data", episodes), code)
    first = next(iter(expected))
    assert words in said[first]["text"]
    assert alarms(said) == {name: level for name, level in expected.items() if level != "ok"}


def test_clean_data_is_quiet_and_the_report_is_in_columns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "data")
    assert run_doctor(DoctorOptions(folder=data)) == 0
    *lines, counts, then = capsys.readouterr().out.splitlines()
    assert len(lines) == len(CHECKS)
    assert all(line.isascii() and line.startswith("ok  viola  ") for line in lines)
    assert {line[11:30].strip() for line in lines} == {name for name, _ in CHECKS}
    assert "12 of 12 episodes, 192 steps looked at" in lines[0]
    assert "correlate with +1.00 at 2 steps of delay" in lines[6]
    assert counts.startswith("15 ok, 0 warnings, no errors, ")
    assert then == f"next: oxe-mix convert --to llava --data {data}"


def _waits(episodes: list[Recording]) -> None:
    """A still picture while the robot is told to stay is no frozen one."""
    episodes[5].moves[2:10] = 0
    episodes[5].agent[2:10] = [picture(5, 2, 0, quality=80 + t) for t in range(8)]


def _scripted(episodes: list[Recording]) -> None:
    """The same movements before another scene are another episode."""
    episodes[7] = replace(episodes[1], agent=episodes[7].agent, wrist=episodes[7].wrist)


def _dim(episodes: list[Recording]) -> None:
    """A dark room is no black frame."""
    for episode in episodes:
        episode.agent[:] = [jpeg((decode(one) // 4).astype(np.uint8)) for one in episode.agent]


def _radians_and_millimetres(episodes: list[Recording]) -> None:
    for episode in episodes:
        episode.moves[:, :3] *= 1000
        episode.moves[:, 3:] *= 0.01


@pytest.mark.parametrize("plant", [_waits, _scripted, _dim, _radians_and_millimetres])
def test_what_only_looks_like_a_fault_is_left_alone(
    plant: Plant, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    episodes = clean()
    plant(episodes)
    assert alarms(examine(capsys, write(tmp_path / "data", episodes))) == {}


def test_grippers_without_sense_are_no_polarity(cards: Cards) -> None:
    """Of 45 random steps one draw in some hundreds correlates with more than a half."""
    for seed in range(600):
        rng = np.random.default_rng(seed)
        episodes = tuple(_random_gripper(rng, f"viola/train/0/{i}") for i in range(15))
        assert gripper_polarity(_dataset(cards, "viola", episodes=episodes)).level == "ok"


def _random_gripper(rng: np.random.Generator, name: str) -> EpisodeSummary:
    actions = rng.normal(0, 1, (3, 7)).astype(np.float32)
    state = rng.normal(0, 1, 3).astype(np.float32)
    return EpisodeSummary(name, np.arange(3), actions, state, 0, ("go",) * 3, ())


def test_findings_name_the_step_and_end_in_exit_code_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    episodes = clean()
    _nan(episodes)
    assert run_doctor(DoctorOptions(folder=write(tmp_path / "data", episodes))) == 1
    said = capsys.readouterr().out
    # Recording 4 is the third of the first shard.
    assert "e.g. train/0/2/11; drop these episodes: oxe-mix convert --on-bad-record skip" in said
    assert "14 ok, 0 warnings, 1 error, " in said
    assert "next: mend the errors, finite numbers of viola first" in said


def test_text_of_the_data_cannot_command_a_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    episodes = clean()
    for episode in episodes:
        episode.text[:] = ["\x1b[2J\nrm"] * STEPS
    run_doctor(DoctorOptions(folder=write(tmp_path / "data", episodes)))
    said = capsys.readouterr().out
    assert "\x1b" not in said
    assert len(said.splitlines()) == len(CHECKS) + 2


def _flip(shard: Path) -> None:
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda shard: shard.write_bytes(shard.read_bytes()[:-9]), "the file ends inside the record"),
        (lambda shard: shard.unlink(), "cannot be read (No such file or directory)"),
        (lambda shard: shard.write_bytes(b""), "0 records were found, dataset_info.json says 6"),
        (_flip, "the checksum of the data is wrong"),
    ],
    ids=["cut", "missing", "empty", "flipped"],
)
def test_a_damaged_shard_is_an_error_and_the_others_are_looked_at(
    change: Any, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "data")
    change(data / "viola/0.1.0/viola-train.tfrecord-00001-of-00002")
    said = examine(capsys, data, 1)
    assert words in said["episodes"]["text"]
    assert set(alarms(said)) == {"episodes"}
    assert 6 <= int(said["episodes"]["text"].split(" problem")[1].split(" in ")[1].split(" ")[0]) < EPISODES


def test_a_sample_is_bounded_seeded_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    episodes = clean()
    _one_silent(episodes)
    _twice(episodes)
    data = write(tmp_path / "data", episodes)
    found = [examine(capsys, data, episodes=3, seed=seed) for seed in range(8)]
    assert all("3 of 12 episodes, 48 steps looked at" in said["episodes"]["text"] for said in found)
    # The one episode without a text is in a quarter of the samples, and always in the same ones.
    hit = [said["instructions"]["level"] for said in found]
    assert set(hit) == {"ok", "warning"}
    again = [examine(capsys, data, episodes=3, seed=seed)["instructions"]["level"] for seed in range(8)]
    assert again == hit
    assert examine(capsys, data, episodes=3, every=True)["instructions"]["level"] == "warning"
    # Records are compared without being read, all of them.
    assert {said["repeated episodes"]["text"] for said in found} == {"1 of 12 compared are there before"}


def test_held_out_episodes_that_repeat_training_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "data")
    target = data / "viola/0.1.0"
    info = json.loads((target / "dataset_info.json").read_text())
    info["splits"].append({**info["splits"][0], "name": "test", "shardLengths": ["6"]})
    (target / "dataset_info.json").write_text(json.dumps(info))
    shutil.copy(target / "viola-train.tfrecord-00001-of-00002", target / "viola-test.tfrecord-00000-of-00001")
    said = examine(capsys, data)["repeated episodes"]
    assert "6 of 18 compared are there before, 6 of them in another split" in said["text"]
    assert said["examples"][0] == "viola/test/0/0 = viola/train/1/0"


def test_the_cards_own_facts_are_held_against_the_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], cards: Cards
) -> None:
    data, own = write(tmp_path / "data"), tmp_path / "cards"
    own.mkdir()
    text = (Path(cards.file_of(cards.get("viola")))).read_text()
    text = text.replace("train: 135", "train: 5").replace("[clip01, invert]", "[]")
    text = text.replace("normalise_mask", "mods: [flip_wrist_image_channels]\nnormalise_mask")
    (own / "viola.yaml").write_text(text)
    said = examine(capsys, data, cards=own)
    assert "12 in train, the card lists 5" in said["known figures"]["text"]
    assert "-1 to 1, not in [0, 1]" in said["gripper range"]["text"]
    assert "not applied: flip_wrist_image_channels" in said["advised mods"]["text"]
    assert set(alarms(said)) == {"known figures", "gripper range", "gripper polarity", "advised mods"}


def test_a_card_that_does_not_fit_and_one_that_is_missing_are_told_beside_the_rest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "data")
    for name in ("toto", "nobody_knows"):
        shutil.copytree(data / "viola/0.1.0", data / name / "0.1.0")
    said = examine(capsys, data, 1)
    assert said["toto layout"]["level"] == "error"
    assert "no image feature observation/image" in said["toto layout"]["text"]
    assert said["nobody_knows card"]["level"] == "warning"
    assert said["viola episodes"]["level"] == "ok"


def test_a_folder_that_is_neither_is_refused_with_what_to_give(tmp_path: Path) -> None:
    data = write(tmp_path / "data")
    for folder, words in (
        (tmp_path / "nowhere", "no such folder"),
        (data / "viola", f"is one dataset; give the folder of datasets: {data}"),
        (data / "viola/0.1.0", f"is one dataset; give the folder of datasets: {data}"),
        (tmp_path, "neither RLDS datasets"),
    ):
        with pytest.raises(UserError, match=words):
            run_doctor(DoctorOptions(folder=folder))


def _stats(**columns: tuple[float, ...]) -> ActionStats:
    """Of seven dimensions that are well spread but for `columns`."""
    base: dict[str, Any] = {"q01": (-1.0,) * 6 + (0.0,), "q99": (1.0,) * 7}
    base |= {"min": (-1.2,) * 6 + (0.0,), "max": (1.2,) * 6 + (1.0,), "mean": (0.0,) * 7, "std": (1.0,) * 7}
    mask = (True,) * 6 + (False,)
    return ActionStats(**(base | columns), mask=mask, num_transitions=1000, num_trajectories=10)


def _dataset(cards: Cards, name: str = "droid", **changes: Any) -> DatasetSummary:
    base = DatasetSummary(name, cards.get(name), 7, 7, 10, {}, (), _stats())
    return replace(base, **changes)


def test_figures_of_all_steps_are_judged_without_an_episode(cards: Cards) -> None:
    fine = _dataset(cards)
    assert [check(fine).level for check in (action_range, gripper_range, known_figures, width)] == ["ok"] * 4
    assert width(_dataset(cards, usual_width=8)).level == "error"
    percent = _dataset(cards, stats=_stats(q99=(1.0,) * 6 + (100.0,), max=(1.2,) * 6 + (100.0,)))
    assert gripper_range(percent).level == "error"
    metres = _dataset(cards, stats=_stats(q99=(1.0,) * 6 + (0.08,), max=(1.2,) * 6 + (0.08,)))
    assert "moves from 0 to 0.08 only" in gripper_range(metres).text
    # Droid's card has the quantiles of all of it.
    degrees = _dataset(cards, stats=_stats(q01=(-57.0,) * 6 + (0.0,), q99=(57.0,) * 6 + (1.0,)))
    assert "dimension 5: 114 wide, the card says 1.78" in known_figures(degrees).text


def test_the_sign_of_a_gripper_state_is_taken_from_the_card_or_left_open(cards: Cards) -> None:
    signs = {"bridge_orig": 1, "kuka": -1, "droid": -1, "berkeley_fanuc_manipulation": -1, "viola": None}
    assert {name: state_sign(cards.get(name)) for name in signs} == signs
    columns = {"viola": -1, "libero_goal_no_noops": -2, "language_table": None, "roboturk": None}
    assert {name: gripper_column(cards.get(name)) for name in columns} == columns


def test_a_gripper_that_disagrees_with_a_state_of_known_sign_is_an_error(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """bridge_orig: the state's last number is 1 open."""
    from tensorflow_datasets.core.example_parser import tf_example_pb2

    folder, payloads = tmp_path / "data/bridge_orig/1.0.0", list[bytes]()
    shutil.copytree(data / "bridge_orig/1.0.0", folder)
    assert examine(capsys, tmp_path / "data")["gripper polarity"]["level"] == "ok"
    shards = sorted(folder.glob("*.tfrecord-*"))
    for shard in shards:
        with shard.open("rb") as stream:
            for record in read_records(stream, ""):
                example = tf_example_pb2.Example.FromString(record.payload)
                state = example.features.feature["steps/observation/state"].float_list.value
                state[6::7] = [1 - value for value in state[6::7]]
                payloads.append(example.SerializeToString(deterministic=True))
        shard.write_bytes(b"".join(map(frame, payloads)))
        payloads.clear()
    said = examine(capsys, tmp_path / "data", 1)["gripper polarity"]
    assert (said["level"], "though the state counts opening" in said["text"]) == ("error", True)


def test_a_frame_is_read_once_and_a_jpeg_decoded_small(monkeypatch: pytest.MonkeyPatch) -> None:
    reads, encoded = list[int](), [picture(0, t, 0) for t in range(6)]

    def read(t: int) -> bytes:
        reads.append(t)
        return encoded[t]

    seen = track("primary", [partial(read, t) for t in range(6)])
    assert reads == list(range(6))
    assert seen.looked.tolist() == reads
    assert (seen.change[1:, 1] > 50).all()
    assert np.isinf(seen.change[0]).all()
    whole = decode(encoded[0]).reshape(SIDE, 7, SIDE, 7, 3).mean(axis=(1, 3))
    assert np.abs(thumbnail(encoded[0]).astype(float) - whole).mean() < 3
    drafts, original = list[tuple[int, int]](), JpegImageFile.draft

    def draft(image: JpegImageFile, mode: str, size: tuple[int, int]) -> object:
        done = original(image, mode, size)
        drafts.append(image.size)
        return done

    monkeypatch.setattr(JpegImageFile, "draft", draft)
    thumbnail(encoded[0])
    assert drafts == [(56, 56)]


def test_a_long_episode_is_thinned_out_and_a_frame_that_comes_again_is_not_decoded_again() -> None:
    frames = [picture(0, t // 50, 0) for t in range(250)]
    seen = track("primary", [partial(bytes, one) for one in frames])
    assert seen.looked.tolist() == list(range(0, 250, 3))
    assert len(set(seen.marks.tolist())) == 5
    assert (seen.change[1:, 0] > 0).sum() == 4


def test_hues_of_exchanged_channels_are_mirrored() -> None:
    one = pixels(0, 0, 0)[None]
    hues, other = hue_histogram(one), hue_histogram(one[..., ::-1])
    assert hues.argmax() == 2  # 30 to 45 degrees, wood
    assert other.argmax() == 13
    assert np.abs(swapped(hues) - other).sum() < 0.15 * hues.sum()  # noise carries some over an edge
    assert (swapped(swapped(hues)) == hues).all()
    assert hue_histogram(np.full((1, 4, 4, 3), 90, np.uint8)).sum() == 0


def test_downloaded_synthetic_and_converted_data_raise_no_error(
    data: Path, llava: Path, bucket26: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    explained = {"action range", "blank frames", "advised mods", "idle steps"}
    for folder in (data, llava):
        said = alarms(examine(capsys, folder))
        assert {name.split(" ", 1)[1] for name in said} <= explained
        assert set(said.values()) == {"warning"}
    # Its values are random, its pictures sixteen: those warnings are right.
    said = alarms(examine(capsys, bucket26, episodes=8))
    assert {name.split(" ", 1)[1] for name in said} <= explained | {"gripper range", "repeated frames"}
    assert set(said.values()) == {"warning"}


def test_a_converted_folder_shows_the_same_faults(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    episodes = clean()
    _three_swapped(episodes)
    _frozen_once(episodes)
    _one_silent(episodes)
    _outlier(episodes)
    _wrong_gripper(episodes)
    for t in (1, 2):
        episodes[0].agent[t] = jpeg(np.zeros((224, 224, 3), np.uint8))
    episodes[10] = episodes[11]
    data, out = write(tmp_path / "data", episodes), tmp_path / "llava"
    state_and_wrist = ("--state", "--cameras", "primary,wrist", "--chunk", "2")
    convert(data, out, *state_and_wrist, "--val-fraction", "0.2", "--layout", "tar")
    said = examine(capsys, out)
    assert "at 2 steps of delay" in said["gripper polarity"]["text"]  # of a chunk the step's own action
    assert "11 of 11 episodes, 176 steps" in said["episodes"]["text"]  # one was silent
    assert alarms(said) == dict.fromkeys(
        (
            "action range",
            "gripper polarity",
            "frozen frames",
            "blank frames",
            "colour channels",
            "repeated episodes",
        ),
        "warning",
    )
    assert said["blank frames"]["examples"] == ["viola/train/0/0/1", "viola/train/0/0/2"]
    assert said["repeated episodes"]["examples"] in (
        ["viola/train/0/5 = viola/train/1/5"],
        ["viola/train/1/5 = viola/train/0/5"],
    )
    few = examine(capsys, out, episodes=4)
    assert "4 of 11 episodes" in few["episodes"]["text"]


def test_an_answer_that_is_no_action_is_found(
    llava: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(llava, tmp_path / "llava")
    files = sorted((tmp_path / "llava/conversations").glob("kuka-*.jsonl"))
    file = next(file for file in files if file.stat().st_size)
    edit_line(file, 0, lambda sample: sample["conversations"][1].update(value="<ACTION_3>"))
    said = examine(capsys, tmp_path / "llava", 1)["kuka episodes"]
    assert "1 action tokens are no whole number of actions of width 7" in said["text"]


def test_real_episodes_are_found_sound_but_for_the_split_that_repeats_them(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bridge_dataset").symlink_to(shared / "real/bridge_dataset")
    said = examine(capsys, tmp_path, every=True)
    assert alarms(said) == {"repeated episodes": "warning"}
    assert (
        "25 of 50 compared are there before, 25 of them in another split" in said["repeated episodes"]["text"]
    )
    assert "correlate with +0.85 at 2 steps of delay" in said["gripper polarity"]["text"]
    assert "0 of 400 steps" in said["idle steps"]["text"]
