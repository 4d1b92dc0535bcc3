"""The bucket that we make ourselves: true layouts, the same bytes for the same seed, and a task that can be
learnt.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oxe_mix.cards import Cards, load_cards
from oxe_mix.errors import UserError
from oxe_mix.rlds import parse_dataset_info, parse_features
from oxe_mix.synth.features import feature_tree, save_features
from oxe_mix.synth.plan import SynthOptions, _cut, plan_bucket
from oxe_mix.synth.robots import ROBOTS
from oxe_mix.synth.world import COLORS, GRID, Pose, draw, sample_scene, walk
from oxe_mix.tfrecord import read_records
from tests.conftest import DATASETS, OXE_MIX, PYTHON, run


def _hashes(folder: Path) -> dict[str, str]:
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def test_the_same_seed_gives_the_same_bytes_whatever_the_number_of_workers(tmp_path: Path) -> None:
    for name, seed, workers in (("one", 3, 1), ("two", 3, 2), ("other", 4, 2)):
        options = ("--episodes", "30", "--seed", str(seed), "--workers", str(workers))
        run(OXE_MIX, "synth", "--out", tmp_path / name, *options)
    assert _hashes(tmp_path / "one") == _hashes(tmp_path / "two")
    assert _hashes(tmp_path / "one") != _hashes(tmp_path / "other")


def test_it_holds_the_six_datasets_in_their_own_names_and_versions(bucket: Path) -> None:
    assert {robot.name for robot in ROBOTS} == set(DATASETS)
    names = {"/".join(file.parts[-3:-1]) for file in bucket.glob("*/*/dataset_info.json")}
    assert "bridge_dataset/1.0.0" in names  # as its makers call it
    assert "language_table/0.0.1" in names
    assert len(names) == 6


def test_tfds_finds_nothing_to_complain_about(bucket: Path) -> None:
    pytest.importorskip("tensorflow", reason="needs the extra tf")
    import tensorflow_datasets as tfds

    for info in bucket.glob("*/*/dataset_info.json"):
        builder = tfds.builder_from_directory(str(info.parent))
        for split, expected in builder.info.splits.items():
            assert sum(1 for _ in builder.as_dataset(split=split)) == expected.num_examples


def test_an_unclean_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    assert "not empty" in run(OXE_MIX, "synth", "--out", tmp_path, code=2).stderr


def test_the_walk_ends_closed_on_the_named_block_one_cell_at_a_time() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        scene = sample_scene(rng)
        poses = walk(scene)
        assert poses[0] == Pose(scene.start, closed=False)
        assert poses[-1] == Pose(scene.blocks[scene.target], closed=True)
        for one, other in pairwise(poses):
            assert max(abs(a - b) for a, b in zip(one.cell, other.cell, strict=True)) <= 1
            assert other.closed >= one.closed


def test_the_picture_shows_every_block_and_the_gripper_and_nothing_is_outside_it() -> None:
    rng = np.random.default_rng(1)
    for _ in range(50):
        scene = sample_scene(rng)
        assert all(0 <= x < GRID for cell in (*scene.blocks.values(), scene.start) for x in cell)
        view = np.asarray(draw(scene, Pose(scene.start, closed=False), 64, 48, (200, 200, 200)))
        for color, (column, row) in scene.blocks.items():
            centre = view[round((row + 0.5) * 12), round((column + 0.5) * 16)]
            assert tuple(centre) == COLORS[color]


def test_the_instruction_alone_and_the_picture_alone_do_not_give_the_action() -> None:
    """The same picture with another block named, and the same words over another picture, lead elsewhere."""
    rng = np.random.default_rng(2)
    scene = sample_scene(rng)
    other = next(color for color in scene.blocks if color != scene.target)
    renamed = type(scene)(scene.blocks, other, scene.start)
    assert walk(renamed)[-1].cell != walk(scene)[-1].cell
    same_words = [s for s in (sample_scene(rng) for _ in range(60)) if s.instruction == scene.instruction]
    assert len({walk(s)[1].cell[0] - s.start[0] for s in same_words}) == 3


def test_the_settings_are_noted_and_a_second_run_does_nothing(bucket: Path) -> None:
    assert json.loads((bucket / "synth.json").read_text())["settings"] == {"episodes": 120, "seed": 7}
    assert (
        "nothing to do" in run(OXE_MIX, "synth", "--out", bucket, "--episodes", "120", "--seed", "7").stdout
    )


# --- a bucket of every dataset of a mix ---

MIX_DATASETS = 26


@pytest.fixture(scope="module")
def open_x(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Every dataset of the default mix, 6 training episodes in 4 shards each; and what the command said."""
    out = tmp_path_factory.mktemp("open_x") / "open_x"
    options = ("--mix", "default.yaml", "--episodes", "6", "--shards", "4", "--seed", "3")
    return out, run(OXE_MIX, "synth", "--out", out, *options).stdout


def _mix(file: Path, *names: str) -> Path:
    cards = load_cards()
    rows = [f"- {{name: {name}, version: {cards.get(name).version}, fraction: 1}}" for name in names]
    file.write_text("\n".join([f"name: {file.stem}", "datasets:", *rows, ""]))
    return file


def test_every_dataset_of_the_mix_lies_under_its_cards_name_with_the_splits_of_its_card(
    open_x: tuple[Path, str], cards: Cards
) -> None:
    infos = [parse_dataset_info(f.read_text(), str(f)) for f in open_x[0].glob("*/*/dataset_info.json")]
    assert len(infos) == MIX_DATASETS
    # Only bridge_orig's own release is called otherwise; fmb has an alias, too, and does not use it.
    assert {info.name for info in infos if info.name not in {card.name for card in cards}} == {
        "bridge_dataset"
    }
    assert {info.version for info in infos} == {"0.1.0", "0.0.1", "1.0.0"}
    for info in infos:
        train = info.splits.pop("train")
        assert (train.num_episodes, len(train.shard_lengths)) == (6, 4)
        listed = set(cards.get(info.name).episodes) - {"train"}
        assert set(info.splits) == (listed or ({"val"} if info.name == "bridge_dataset" else set()))
        assert all(split.shard_lengths == (1, 1) for split in info.splits.values())


def test_tfds_reads_every_dataset_of_the_mix(open_x: tuple[Path, str], tmp_path: Path, cards: Cards) -> None:
    pytest.importorskip("tensorflow", reason="needs the extra tf")
    import tensorflow_datasets as tfds

    for info in open_x[0].glob("*/*/dataset_info.json"):
        builder = tfds.builder_from_directory(str(info.parent))
        for split, expected in builder.info.splits.items():
            episodes = list(builder.as_dataset(split=split).take(2))
            assert len(episodes) == min(2, expected.num_examples)
            for episode in episodes:
                steps = list(episode["steps"].as_numpy_iterator())
                assert [step["is_first"] for step in steps] == [t == 0 for t in range(len(steps))]
                assert [step["is_last"] for step in steps] == [t == len(steps) - 1 for t in range(len(steps))]
        save_features(cards.get(builder.name).name, tmp_path)
        assert (info.parent / "features.json").read_bytes() == (tmp_path / "features.json").read_bytes()


def test_the_command_that_it_names_downloads_the_mix(open_x: tuple[Path, str], tmp_path: Path) -> None:
    command = shlex.split(open_x[1].split("next: ")[1])
    assert command == ["oxe-mix", "download", "--mix", "default.yaml", "--source", str(open_x[0])]
    run(OXE_MIX, *command[1:], "--out", tmp_path / "data")
    assert len(list((tmp_path / "data").glob("*/*/dataset_info.json"))) == MIX_DATASETS


def test_an_episode_depends_on_its_dataset_and_the_seed_not_on_the_mix_or_the_workers(tmp_path: Path) -> None:
    names = ("viola", "berkeley_autolab_ur5", "bc_z")
    for out, seed, workers, these in (
        ("all", 1, 1, names),
        ("turned", 1, 2, names[::-1]),
        ("one", 1, 1, names[2:]),
        ("other", 2, 1, names[2:]),
    ):
        mix = _mix(tmp_path / f"{out}.yaml", *these)
        options = ("--episodes", "5", "--shards", "3", "--seed", str(seed), "--workers", str(workers))
        run(OXE_MIX, "synth", "--out", tmp_path / out, "--mix", mix, *options)
    for name in names:
        assert _hashes(tmp_path / "all" / name) == _hashes(tmp_path / "turned" / name)
    bc_z = _hashes(tmp_path / "one/bc_z")
    assert _hashes(tmp_path / "all/bc_z") == bc_z
    assert not any(
        of == bc_z[file] for file, of in _hashes(tmp_path / "other/bc_z").items() if "tfrecord" in file
    )


def test_a_bucket_of_another_mix_is_refused_and_the_same_one_is_not_made_twice(
    open_x: tuple[Path, str], tmp_path: Path
) -> None:
    settings = json.loads((open_x[0] / "synth.json").read_text())["settings"]
    assert settings["datasets"]["jaco_play/0.1.0"] == {"train": 6, "test": 2}
    assert {key: settings[key] for key in ("mix", "shards", "seed")} == {
        "mix": "default",
        "shards": 4,
        "seed": 3,
    }
    again = ("--out", open_x[0], "--episodes", "6", "--seed", "3")
    said = run(OXE_MIX, "synth", "--mix", "default.yaml", "--shards", "4", *again).stdout
    assert "nothing to do" in said
    (tmp_path / "mix").mkdir()
    fewer = _mix(tmp_path / "mix/default.yaml", "viola")
    for other in (("--mix", "default.yaml"), ("--mix", "default.yaml", "--shards", "3"), ("--mix", fewer)):
        shards = () if "--shards" in other else ("--shards", "4" if fewer in other else "5")
        assert "not this bucket" in run(OXE_MIX, "synth", *other, *shards, *again, code=2).stderr


def test_without_a_mix_the_number_of_shards_may_be_chosen(tmp_path: Path) -> None:
    run(OXE_MIX, "synth", "--out", tmp_path / "b", "--episodes", "12", "--shards", "2")
    assert len(list((tmp_path / "b/viola/0.1.0").glob("viola-train.tfrecord-*-of-00002"))) == 2
    assert json.loads((tmp_path / "b/synth.json").read_text())["settings"] == {
        "episodes": 12,
        "seed": 0,
        "shards": 2,
    }


def test_what_cannot_be_made_is_said_in_one_line(tmp_path: Path) -> None:
    def said(**options: Any) -> str:
        with pytest.raises(UserError) as error:
            plan_bucket(SynthOptions(tmp_path, **options))
        return str(error.value)

    assert said(episodes=5) == "--episodes 5: six datasets need at least 6"
    assert "fewer than the 16 shards" in said(mix=Path("default.yaml"), episodes=15)
    with pytest.raises(UserError, match="atlantis: no feature tree is shipped"):
        feature_tree("atlantis")


def test_making_any_mix_imports_no_tensorflow(tmp_path: Path) -> None:
    """The float depth of berkeley_autolab_ur5 is what TFDS would start it for."""
    mix = _mix(tmp_path / "mix.yaml", "berkeley_autolab_ur5")
    made = f"SynthOptions(out=Path({str(tmp_path / 'b')!r}), mix=Path({str(mix)!r}), episodes=1, shards=1)"
    (tmp_path / "tensorflow").mkdir()
    (tmp_path / "tensorflow/__init__.py").write_text("raise AssertionError('TensorFlow was imported')")
    code = (
        f"import sys; from pathlib import Path; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from oxe_mix.synth.bucket import run_synth; from oxe_mix.synth.plan import SynthOptions\n"
        f"run_synth({made})"
    )
    run(PYTHON, "-c", code)


@given(st.integers(1, 40), st.integers(0, 400))
def test_shards_hold_every_episode_once_in_order_and_none_is_empty(shards: int, more: int) -> None:
    numbers = range(7, 7 + shards + more)
    cut = _cut(numbers, shards)
    assert [number for part in cut for number in part] == list(numbers)
    assert len(cut) == shards
    assert all(cut)


def test_a_mix_writes_both_kinds_of_kuka_grasps(open_x: tuple[Path, str]) -> None:
    folder = open_x[0] / "kuka/0.1.0"
    tree = parse_features((folder / "features.json").read_text(), "features.json")
    assert ("success",) in tree.episode
    flags = Counter(_flag(payload) for payload in _payloads(folder))
    assert sum(flags.values()) == 6
    assert set(flags) == {0, 1}


def _payloads(folder: Path) -> Iterator[bytes]:
    for file in sorted(folder.glob("*.tfrecord-*")):
        with file.open("rb") as stream:
            yield from (record.payload for record in read_records(stream, file.name))


def _flag(payload: bytes) -> int:
    from tensorflow_datasets.core.example_parser import tf_example_pb2

    value: int = tf_example_pb2.Example.FromString(payload).features.feature["success"].int64_list.value[0]
    return value
