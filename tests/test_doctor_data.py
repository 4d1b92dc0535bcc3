"""`oxe-mix doctor DATA|LLAVA`: each fault is found where it was planted, and clean data is quiet."""

from __future__ import annotations

import json
import re
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
from convert.doctor_labels import readable
from convert.doctor_mends import Place
from convert.doctor_numbers import action_range, known_figures, width
from convert.doctor_summary import DatasetSummary, EpisodeSummary, Outcome
from oxe_mix.cards import Cards
from oxe_mix.errors import UserError
from oxe_mix.images import decode
from oxe_mix.tfrecord import frame, read_records
from tests.conftest import OXE_MIX, ROOT, run
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
from tests.test_doctor_faults import (
    alarms,
    examine,
    frozen_once,
    nan,
    one_silent,
    outlier,
    parse_commands,
    three_swapped,
    twice,
    wrist_swapped,
    wrong_gripper,
)


def test_clean_data_is_quiet_and_what_is_ok_is_told_on_request(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "data")
    assert run_doctor(DoctorOptions(folder=data)) == 0
    first, counts, then = capsys.readouterr().out.splitlines()
    assert first == f"viola: {len(CHECKS)} ok"
    assert re.fullmatch(
        r"16 ok, 0 warnings, no errors, [\d.]+ s; --all-checks prints what is ok, too", counts
    )
    assert then == f"next: oxe-mix convert --to llava --data {data}"
    assert run_doctor(DoctorOptions(folder=data, all_checks=True)) == 0
    again, *lines, counts, _ = capsys.readouterr().out.splitlines()
    assert (again, "--all-checks" in counts) == (first, False)
    assert all(line.isascii() and line.startswith("  ok       ") for line in lines)
    assert [line[11:28].strip() for line in lines] == [name for name, _ in CHECKS]
    assert "12 of 12 episodes, 192 steps looked at" in lines[0]
    assert "correlate with +1.00 at 2 steps of delay" in lines[7]


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


def _far_and_hardly_turning(episodes: list[Recording]) -> None:
    """Metres beside radians: neither is near-constant because the other is large."""
    for episode in episodes:
        episode.moves[:, :3] *= 20
        episode.moves[:, 3:] *= 0.002


@pytest.mark.parametrize("plant", [_waits, _scripted, _dim, _far_and_hardly_turning])
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
    nan(episodes)
    assert run_doctor(DoctorOptions(folder=write(tmp_path / "data", episodes))) == 1
    said = capsys.readouterr().out
    # Recording 4 is the third of the first shard.
    assert "e.g. train/0/2/11\n" in said
    assert "-> leave these episodes out: oxe-mix convert --data" in said
    assert "15 ok, 0 warnings, 1 error, " in said
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
    assert len(said.splitlines()) == len(("viola: 1 warning", "all episodes say", "-> mend", "15 ok", "next"))


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
    one_silent(episodes)
    twice(episodes)
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
    assert "in the place of that split: oxe-mix convert" in said["mend"]
    assert said["mend"].endswith("--val-fraction 0.05")


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
    assert "give it a card of your own" in said["known figures"]["mend"]
    assert "-1 to 1, not in [0, 1]" in said["gripper range"]["text"]
    assert "edit the gripper's ops (clip01, invert, binarize) in a card" in said["gripper range"]["mend"]
    assert "not applied: flip_wrist_image_channels" in said["advised mods"]["text"]
    mods = "give viola mods: [flip_wrist_image_channels] in a mix, say my-mix.yaml: oxe-mix convert --data"
    assert said["advised mods"]["mend"] == f"{mods} {data} --cards {own} --mix my-mix.yaml"
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
    assert "its card asks for: oxe-mix datasets toto" in said["toto layout"]["mend"]
    assert said["nobody_knows card"]["level"] == "warning"
    assert "write one (docs/add-a-robot.md)" in said["nobody_knows card"]["mend"]
    assert said["viola episodes"]["level"] == "ok"


def test_a_folder_that_is_neither_is_refused_with_what_to_give(tmp_path: Path) -> None:
    data = write(tmp_path / "data")
    for folder, words in (
        (tmp_path / "nowhere", "no such folder; give one that download, pack or convert wrote"),
        (data / "viola/0.1.0/features.json", "is a file; give the folder that download, pack or convert"),
        (data / "viola", f"is one dataset; give the folder of datasets: {data}"),
        (data / "viola/0.1.0", f"is one dataset; give the folder of datasets: {data}"),
        (tmp_path, "neither RLDS datasets"),
    ):
        with pytest.raises(UserError, match=words):
            run_doctor(DoctorOptions(folder=folder))


def _stats(num_trajectories: int = 10, **columns: tuple[float, ...]) -> ActionStats:
    """Of seven dimensions that are well spread but for `columns`."""
    base: dict[str, Any] = {"q01": (-1.0,) * 6 + (0.0,), "q99": (1.0,) * 7}
    base |= {"min": (-1.2,) * 6 + (0.0,), "max": (1.2,) * 6 + (1.0,), "mean": (0.0,) * 7, "std": (1.0,) * 7}
    mask = (True,) * 6 + (False,)
    return ActionStats(**(base | columns), mask=mask, num_transitions=1000, num_trajectories=num_trajectories)


def _dataset(cards: Cards, name: str = "droid", **changes: Any) -> DatasetSummary:
    base = DatasetSummary(name, cards.get(name), 7, 7, 10, {}, (), _stats())
    return replace(base, **changes)


def _typed(outcome: Outcome) -> str:
    """What mends it, for a folder called d."""
    mend = Place(Path("d")).fill(outcome.mend, "droid")
    parse_commands(mend)
    return mend


def test_figures_of_all_steps_are_judged_without_an_episode(cards: Cards) -> None:
    fine = _dataset(cards)
    assert [check(fine).level for check in (action_range, gripper_range, known_figures, width)] == ["ok"] * 4
    other = width(_dataset(cards, usual_width=8))
    assert (other.level, _typed(other)) == (
        "error",
        "convert it alone: oxe-mix convert --data d --only droid",
    )
    percent = _dataset(cards, stats=_stats(q99=(1.0,) * 6 + (100.0,), max=(1.2,) * 6 + (100.0,)))
    assert gripper_range(percent).level == "error"
    metres = _dataset(cards, stats=_stats(q99=(1.0,) * 6 + (0.08,), max=(1.2,) * 6 + (0.08,)))
    assert "moves from 0 to 0.08 only" in gripper_range(metres).text
    assert "no op scales it: pack your own recordings with 0 to 1" in _typed(gripper_range(metres))
    for check in (readable, action_range):
        nothing = check(_dataset(cards, stats=None))
        assert (nothing.level, "pack it again" in _typed(nothing)) == ("error", True)
    # Droid's card has the quantiles of all of it.
    degrees = _dataset(cards, stats=_stats(q01=(-57.0,) * 6 + (0.0,), q99=(57.0,) * 6 + (1.0,)))
    assert "dimension 5: 114 wide, the card says 1.78" in known_figures(degrees).text
    assert "another unit? the recipe: oxe-mix datasets droid; " in _typed(known_figures(degrees))


def test_a_dimension_may_rest_in_a_few_episodes(cards: Cards) -> None:
    stuck: dict[str, Any] = dict.fromkeys(("min", "max", "q01", "q99"), (0.25,) * 6 + (1.0,))
    said = [action_range(_dataset(cards, stats=_stats(num_trajectories=num, **stuck))) for num in (3, 4)]
    assert [one.level for one in said] == ["ok", "error"]
    assert "never changes; its bins say nothing; nothing ever moves" in said[1].text


def test_a_mend_has_the_folders_and_cards_of_the_command() -> None:
    mend = "a: oxe-mix report FOLDER; b: oxe-mix convert --data DATA --only NAME; oxe-mix datasets NAME CARDS"
    plain, own, converted = (
        Place(Path("my data")),
        Place(Path("d"), cards=Path("c")),
        Place(Path("l"), converted=True, cards=Path("l/cards")),
    )
    assert [place.fill(mend, "x").split("; ") for place in (plain, own, converted)] == [
        [
            "a: oxe-mix report 'my data'",
            "b: oxe-mix convert --data 'my data' --only x",
            "oxe-mix datasets x",
        ],
        [
            "a: oxe-mix report d --cards c",
            "b: oxe-mix convert --data d --cards c --only x",
            "oxe-mix datasets x --cards c",
        ],
        [
            "a: oxe-mix report l",
            "b: oxe-mix convert --data DATA --cards l/cards --only x",
            "oxe-mix datasets x --cards l/cards",
        ],
    ]


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
    assert "add invert to the gripper's ops, or take it away, in a card of your own" in said["mend"]


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


# What is true of the demo's data: cameras that the synthetic world does not have are black, as absent ones
# are in bridge_orig, and the demo's mix takes kuka's failures, too.
DEMO = {
    "bridge_orig blank frames": "warning",
    "viola blank frames": "warning",
    "iamlab_cmu_pickup_insert_converted_externally_to_rlds blank frames": "warning",
    "kuka advised mods": "warning",
}


def test_the_demo_raises_the_warnings_that_are_true_of_it(
    data: Path, llava: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for every in (False, True):
        assert alarms(examine(capsys, data, every=every)) == DEMO
        assert alarms(examine(capsys, llava, every=every)) == {}


@pytest.mark.parametrize("episodes", [1, 2, 3, 5, 32])
def test_every_dataset_of_the_default_mix_raises_what_is_true_of_random_values(
    episodes: int, bucket26: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Grippers are random numbers beside 0 to 1, all pictures are of sixteen, nobody applied a mod, and of
    language_table's steps half are told to stay.
    """
    said = alarms(examine(capsys, bucket26, episodes=episodes))
    explained = {"gripper range", "repeated frames", "advised mods", "blank frames", "idle steps"}
    assert {name.split(" ", 1)[1] for name in said} <= explained
    assert {name for name in said if name.endswith("blank frames")} == set(DEMO) - {"kuka advised mods"}
    assert {name for name in said if name.endswith("idle steps")} <= {"language_table idle steps"}
    assert set(said.values()) == {"warning"}


def test_a_converted_folder_shows_the_same_faults(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    episodes = clean()
    three_swapped(episodes)
    frozen_once(episodes)
    one_silent(episodes)
    outlier(episodes)
    wrong_gripper(episodes)
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
            "instructions",
        ),
        "warning",
    )
    assert said["blank frames"]["examples"] == ["viola/train/0/0/1", "viola/train/0/0/2"]
    assert said["repeated episodes"]["examples"] in (
        ["viola/train/0/5 = viola/train/1/5"],
        ["viola/train/1/5 = viola/train/0/5"],
    )
    assert "1 of 12 episodes have none" in said["instructions"]["text"]  # the manifest has counted it
    few = examine(capsys, out, episodes=4)
    assert "1 of 12 episodes have none" in few["instructions"]["text"]
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
    assert f"see all of it: oxe-mix check {tmp_path / 'llava'} --decode; convert it again: " in said["mend"]


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


def test_a_conversion_is_judged_by_the_cards_that_lie_in_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A robot of one's own has no other card; by its card three of four episodes never move."""
    robot, data, out = tmp_path / "my_robot", tmp_path / "data", tmp_path / "llava"
    shutil.copytree(ROOT / "examples/my_robot", robot)
    for number in range(3):
        file = robot / f"episodes/{number:04d}/steps.csv"
        head, *rows = file.read_text().splitlines()
        still = [
            ["0" if name.startswith("action.") else cell for name, cell in zip(*pair, strict=True)]
            for pair in ((head.split(","), row.split(",")) for row in rows)
        ]
        file.write_text("\n".join([head, *map(",".join, still)]))
    card = robot / "cards/my_robot.yaml"
    run(OXE_MIX, "pack", robot / "episodes", "--card", card, "--out", data)
    convert(data, out, "--cards", str(card.parent))
    said = examine(capsys, out)["idle steps"]
    assert said["level"] == "warning"
    assert "3 episodes without any movement" in said["text"]
    (out / "cards/my_robot.yaml").unlink()
    assert "not looked at: no card" in examine(capsys, out)["idle steps"]["text"]


def test_the_hues_of_three_episodes_are_no_sign(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    episodes = clean()
    wrist_swapped(episodes)
    data = write(tmp_path / "data", episodes)
    said = [examine(capsys, data, episodes=num)["colour channels"]["level"] for num in (2, 3, 4)]
    assert said == ["ok", "ok", "warning"]
