"""The bucket that we make ourselves: true layouts, the same bytes for the same seed, and a task that can be
learnt.
"""

from __future__ import annotations

import hashlib
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from oxe_mix.synth.robots import ROBOTS
from oxe_mix.synth.world import COLORS, GRID, Pose, draw, sample_scene, walk
from tests.conftest import DATASETS, OXE_MIX, run


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
