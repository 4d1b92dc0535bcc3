"""`oxe-mix pack`: a user's folder of episodes becomes RLDS that TFDS, verify and convert read."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from oxe_mix.errors import UserError
from oxe_mix.pack import PackOptions, run_pack
from oxe_mix.rlds import Episode, parse_features
from oxe_mix.tfrecord import read_records
from tests.conftest import OXE_MIX, ROOT, run

EXAMPLE = ROOT / "examples/my_robot"
CARD = EXAMPLE / "cards/my_robot.yaml"
STATE, ACTION, TEXT = ("observation", "state"), ("action",), ("language_instruction",)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The example's episodes, to be spoilt."""
    return Path(shutil.copytree(EXAMPLE / "episodes", tmp_path / "episodes"))


def pack(source: Path, card: Path = CARD, shard_mb: float = 256.0) -> Path:
    """Pack into `data` beside the source; returns the dataset's folder."""
    out = source.parent / "data"
    assert run_pack(PackOptions(episodes=source, card=card, out=out, shard_mb=shard_mb)) == 0
    return out / "my_robot/1.0.0"


def _episodes(dataset: Path, split: str = "train") -> list[Episode]:
    tree = parse_features((dataset / "features.json").read_text(), "features.json")
    found = []
    for file in sorted(dataset.glob(f"my_robot-{split}.*")):
        with file.open("rb") as stream:
            found += [Episode(record.payload, tree) for record in read_records(stream, file.name)]
    return found


def _bytes(dataset: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in dataset.iterdir()}


def rows_of(folder: Path) -> list[list[str]]:
    with (folder / "steps.csv").open(newline="") as stream:
        return list(csv.reader(stream))


def write_rows(folder: Path, rows: list[list[str]]) -> None:
    with (folder / "steps.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows(rows)


def test_numbers_texts_and_frames_arrive_as_they_are_for_tfds_too(source: Path) -> None:
    tfds = pytest.importorskip("tensorflow_datasets")
    pytest.importorskip("tensorflow")
    dataset = pack(source)
    builder = tfds.builder_from_directory(str(dataset))
    assert builder.info.splits["train"].num_examples == 4
    read = list(tfds.as_numpy(builder.as_dataset(split="train", shuffle_files=False)))
    for number, (theirs, ours) in enumerate(zip(read, _episodes(dataset), strict=True)):
        folder = source / f"{number:04d}"
        header, *rows = rows_of(folder)
        numbers = np.array([row[1:] for row in rows], np.float64).astype(np.float32)
        assert header[1:8] == [f"state.{n}" for n in ("x", "y", "z", "roll", "pitch", "yaw", "gripper")]
        np.testing.assert_array_equal(ours.array(STATE), numbers[:, :7])
        np.testing.assert_array_equal(ours.array(ACTION), numbers[:, 7:])
        files = [folder / f"image/{t:04d}.jpg" for t in range(len(rows))]
        assert ours.values(("observation", "image")) == [file.read_bytes() for file in files]
        steps = list(theirs["steps"])
        assert theirs["episode_metadata"]["file_path"] == folder.name.encode()
        np.testing.assert_array_equal([step["action"] for step in steps], numbers[:, 7:])
        np.testing.assert_array_equal([step["observation"]["state"] for step in steps], numbers[:, :7])
        text = (folder / "instruction.txt").read_text().strip().encode()
        assert {step["language_instruction"] for step in steps} == {text}
        assert steps[3]["observation"]["image"].shape == (64, 64, 3)
        last = [False] * (len(rows) - 1) + [True]
        assert [step["is_first"] for step in steps] == last[::-1]
        assert [step["is_last"] for step in steps] == [step["is_terminal"] for step in steps] == last


def test_folders_one_level_below_are_splits(source: Path) -> None:
    for name, split in (("0000", "train"), ("0001", "train"), ("0002", "val"), ("0003", "train")):
        (source / split).mkdir(exist_ok=True)
        (source / name).rename(source / split / name)
    dataset = pack(source)
    assert [e.num_steps for e in _episodes(dataset)] == [11, 10, 9]
    assert [e.num_steps for e in _episodes(dataset, "val")] == [11]
    assert "0 problems" in run(OXE_MIX, "verify", dataset.parents[1], "--cards", CARD.parent).stdout


def test_frames_stand_in_the_order_of_their_numbers(source: Path) -> None:
    before = _episodes(pack(source))[0].values(("observation", "image"))
    for file in sorted((source / "0000/image").iterdir()):
        file.rename(file.with_name(f"view{int(file.stem) * 5}.JPEG"))
    assert sorted(path.name for path in (source / "0000/image").iterdir())[1:3] == [
        "view10.JPEG",
        "view15.JPEG",
    ]
    assert _episodes(pack(source))[0].values(("observation", "image")) == before
    shutil.copytree(source / "0003", source / "10")
    (source / "0003").rename(source / "2")
    assert [e.num_steps for e in _episodes(pack(source))] == [11, 10, 11, 9, 9]
    assert _episodes(pack(source))[3].values(TEXT)[0] == b"Pick up the blue block."


def test_however_a_spreadsheet_saves_the_table_the_bytes_are_the_same(source: Path) -> None:
    plain = _bytes(pack(source))
    for folder in source.iterdir():
        rows = [row[1:] for row in rows_of(folder)]  # without time_s: the mark is before state.x
        rows[0] = [f" {name.replace('state.', 'observation.state.')}" for name in rows[0]]
        lines = [",".join(f'"{cell}"' for cell in row) for row in rows]
        text = "\ufeff" + "\r\n".join([*lines, "", ""])
        (folder / "steps.csv").write_bytes(text.encode())
        (folder / "instruction.txt").write_bytes(b"\xef\xbb\xbf" + (folder / "instruction.txt").read_bytes())
    assert _bytes(pack(source)) == plain


def test_columns_of_a_later_file_are_taken_by_name(source: Path) -> None:
    plain = _bytes(pack(source))
    write_rows(source / "0002", [row[::-1] for row in rows_of(source / "0002")])
    assert _bytes(pack(source)) == plain


def test_a_step_may_have_its_own_instruction(source: Path) -> None:
    (source / "0001/instruction.txt").unlink()
    header, *rows = rows_of(source / "0001")
    texts = ['reach, "slowly"', "", *(["grip"] * (len(rows) - 2))]
    write_rows(
        source / "0001", [[*header, "instruction"], *([*r, t] for r, t in zip(rows, texts, strict=True))]
    )
    dataset = pack(source)
    assert _episodes(dataset)[1].values(TEXT) == [text.encode() for text in texts]
    run(
        OXE_MIX,
        "convert",
        "--data",
        dataset.parents[1],
        "--cards",
        CARD.parent,
        "--out",
        source.parent / "llava",
    )
    lines = (source.parent / "llava/conversations/my_robot-train-00000-of-00001.jsonl").read_text()
    assert lines.count("to grip?") == len(rows) - 2


def test_one_column_may_be_a_whole_key_and_cameras_may_be_png_grey_or_of_16_bits(source: Path) -> None:
    text = CARD.read_text().replace("wrist: null}", "wrist: hand}\ndepth: {primary: depth}")
    text = text.replace("{key: [action], ops: [{slice: [6, null]}, clip01]}", "{key: [grip], ops: [clip01]}")
    card = source.parent / "my_robot.yaml"
    card.write_text(text)
    rng = np.random.default_rng(0)
    for folder in source.iterdir():
        rows = rows_of(folder)
        rows[0][rows[0].index("action.gripper")] = "grip"
        write_rows(folder, rows)
        for name in ("hand", "depth"):
            (folder / name).mkdir()
        for t in range(len(rows) - 1):
            grey = rng.integers(0, 255, (8, 6)).astype(np.uint8)
            Image.fromarray(grey).save(folder / f"hand/{t}.png")
            Image.fromarray(grey.astype(np.uint16) * 200).save(folder / f"depth/{t}.png")
    dataset = pack(source, card)
    tree = parse_features((dataset / "features.json").read_text(), "features.json")
    shapes = {key[-1]: (f.shape, f.dtype, f.encoding) for key, f in tree.step.items() if f.kind == "image"}
    assert shapes["hand"] == ((8, 6, 1), "uint8", "png")
    assert shapes["depth"] == ((8, 6, 1), "uint16", "png")
    assert tree.step[("grip",)].shape == (1,)
    first = _episodes(dataset)[0]
    assert first.values(("observation", "depth"))[2] == (source / "0000/depth/2.png").read_bytes()
    tfds = pytest.importorskip("tensorflow_datasets")
    pytest.importorskip("tensorflow")
    episodes = tfds.builder_from_directory(str(dataset)).as_dataset(split="train")
    episode = next(iter(tfds.as_numpy(episodes)))
    step = next(iter(episode["steps"]))
    with Image.open(source / "0000/depth/0.png") as image:
        np.testing.assert_array_equal(step["observation"]["depth"][..., 0], np.array(image))


def test_shards_follow_the_size_and_hold_every_episode_once(source: Path) -> None:
    whole = [e.values(TEXT)[0] for e in _episodes(pack(source))]
    dataset = pack(source, shard_mb=0.04)
    names = sorted(file.name for file in dataset.glob("*.tfrecord-*"))
    assert names == [f"my_robot-train.tfrecord-0000{i}-of-00002" for i in range(2)]
    assert json.loads((dataset / "dataset_info.json").read_text())["splits"][0]["shardLengths"] == ["2", "2"]
    assert [e.values(TEXT)[0] for e in _episodes(dataset)] == whole
    assert len(list(pack(source, shard_mb=1e-6).glob("*.tfrecord-*"))) == 4
    with pytest.raises(UserError, match="--shard-mb 0 is not above 0"):
        pack(source, shard_mb=0)


def test_a_second_run_gives_the_same_bytes_and_a_mended_source_takes_their_place(source: Path) -> None:
    first = _bytes(pack(source))
    assert _bytes(pack(source)) == first
    broken = source / "0001/image/0002.jpg"
    broken.write_bytes(broken.read_bytes()[:-9])
    with pytest.raises(UserError, match="truncated"):
        pack(source)
    dataset = source.parent / "data/my_robot/1.0.0"
    assert _bytes(dataset) == first  # a run that fails leaves what was there
    shutil.rmtree(source / "0001")
    assert [e.num_steps for e in _episodes(pack(source))] == [11, 11, 9]
    assert sorted(path.name for path in dataset.parents[1].iterdir()) == [".oxe-mix.busy", "my_robot"]


def test_a_folder_that_holds_something_else_is_left_alone(source: Path) -> None:
    dataset = pack(source)
    (dataset / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds something that pack did not write"):
        pack(source)
    (dataset / "notes.txt").unlink()
    info = dataset / "dataset_info.json"
    info.write_text(info.read_text().replace("oxe_mix.pack", "another.builder"))
    before = _bytes(dataset)
    with pytest.raises(UserError, match="holds something that pack did not write"):
        pack(source)
    assert _bytes(dataset) == before


def test_a_killed_run_leaves_no_dataset_and_the_next_one_gives_the_same_bytes(tmp_path: Path) -> None:
    source = tmp_path / "episodes"
    source.mkdir()
    for number in range(200):
        (source / str(number)).symlink_to(EXAMPLE / f"episodes/000{number % 4}")
    command = [OXE_MIX, "pack", str(source), "--card", str(CARD), "--out", str(tmp_path / "killed")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "killed").glob(".pack/new/.*.tmp")) and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert list((tmp_path / "killed").glob(".pack/new/.*.tmp"))
    assert not list((tmp_path / "killed").rglob("dataset_info.json"))
    run(*command)
    clean = pack(source)
    assert _bytes(tmp_path / "killed/my_robot/1.0.0") == _bytes(clean)
    assert len(_episodes(clean)) == 200
    assert [e.values(TEXT)[0] for e in _episodes(clean)[8:12]] == [
        e.values(TEXT)[0] for e in _episodes(clean)[:4]
    ]


def _slopes(said: str) -> dict[str, str]:
    return {
        row[0]: row[-1] for row in map(str.split, said.splitlines()) if row and row[0].startswith("action.")
    }


def test_a_wrong_sign_or_unit_shows_in_the_table(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pack(source)
    slopes = _slopes(capsys.readouterr().out)
    assert (len(slopes), set(slopes.values())) == (7, {"1"})
    for folder in source.iterdir():
        header, *rows = rows_of(folder)
        x, yaw, grip = (header.index(f"action.{name}") for name in ("x", "yaw", "gripper"))
        for row in rows:
            row[x], row[yaw] = str(-float(row[x])), str(np.rad2deg(float(row[yaw])))
            row[grip] = str(1 - float(row[grip]))
        write_rows(folder, [header, *rows])
    pack(source)
    slopes = _slopes(capsys.readouterr().out)
    assert (slopes["action.x"], slopes["action.y"], slopes["action.yaw"]) == ("-1", "1", "0.0175")
    assert abs(float(slopes["action.gripper"])) < 0.3
