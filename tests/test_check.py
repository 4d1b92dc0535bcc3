"""`oxe-mix check`: quiet on what convert wrote, and every fault that is planted is found and placed."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import OXE_MIX, run
from tests.converting import content_of, convert, edit_line, picture, viola_episode, viola_folder


@pytest.fixture(scope="module", params=["files", "tar"])
def converted(request: pytest.FixtureRequest, bucket: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two cameras, chunks of two, one episode held out."""
    folder = tmp_path_factory.mktemp("check")
    records = [
        viola_episode(["Go"] * 3, image=picture(224, 224, seed=n), wrist=picture(224, 224, seed=9 - n))
        for n in range(3)
    ]
    data = viola_folder(folder / "data", bucket, records)
    more = ("--cameras", "primary,wrist", "--chunk", "2", "--val-fraction", "0.01", "--layout", request.param)
    convert(data, folder / "llava", *more)
    return folder / "llava"


def _check(folder: Path, *more: str, code: int = 0) -> str:
    done = run(OXE_MIX, "check", folder, *more, code=code)
    return done.stdout + done.stderr


def test_what_convert_wrote_is_found_right_and_left_as_it_is(converted: Path) -> None:
    before = content_of(converted)
    said = _check(converted, "--decode")
    assert "9 samples, 18 images, 0 problems" in said
    assert f"next: make train LLAVA={converted}" in said
    assert content_of(converted) == before
    report = json.loads(_check(converted, "--json").splitlines()[-1])
    assert report == {"event": "checked", "samples": 9, "images": 18, "problems": []}


def test_every_dataset_of_the_demo_and_openvlas_bins_pass(llava: Path, data: Path, tmp_path: Path) -> None:
    assert "0 problems" in _check(llava)
    run(OXE_MIX, "convert", "--data", data, "--out", tmp_path / "o", "--binning", "openvla255", "--state")
    assert "0 problems" in _check(tmp_path / "o")


def _swap(sample: dict[str, object], turn: int, old: str, new: str) -> None:
    conversation = sample["conversations"][turn]  # type: ignore[index]
    conversation["value"] = re.sub(old, new, conversation["value"], count=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: _swap(s, 0, "<image>\n", ""), "1 <image> marks, 2 images"),
        (lambda s: _swap(s, 1, r"<ACTION_\d+>", ""), "13 action tokens are no whole number of actions"),
        (lambda s: _swap(s, 1, r"(<ACTION_\d+>){7}", ""), "1 actions, a chunk has 2"),
        (lambda s: _swap(s, 1, r"<ACTION_\d+>", "<ACTION_256>"), "is not made of the tokens"),
        (lambda s: _swap(s, 1, r"<ACTION_\d+>$", "<ACTION_3>"), "below a gripper's range"),
        (lambda s: s.update(id="viola/train/0/2/7"), "the id viola/train/0/2/7 is not that of its place"),
        (lambda s: s.update(dataset="kuka"), "is not that of its place"),
        (lambda s: s.update(step="1"), "is no sample (TypeError: a field has another type)"),
        (lambda s: s.pop("image"), "is no sample (KeyError: 'image')"),
        (lambda s: s.update(image=["viola/train/0/9_9.jpg"] * 2), "viola/train/0/9_9.jpg"),
        (lambda s: s.update(image=["../../../etc/passwd"] * 2), "../../../etc/passwd"),
    ],
)
def test_a_line_that_is_wrong_is_named(
    change: Callable[[dict[str, object]], None], message: str, converted: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "llava"
    shutil.copytree(converted, folder)
    file = next((folder / "conversations").glob("*.jsonl"))
    edit_line(file, 2, change)
    said = _check(folder, code=1)
    assert f"error: {file}:3: " in said
    assert message in said
    assert "1 problem," in said


def test_an_id_that_comes_twice_is_named(converted: Path, tmp_path: Path) -> None:
    folder = tmp_path / "llava"
    shutil.copytree(converted, folder)
    file = next((folder / "conversations").glob("*.jsonl"))
    first = json.loads(file.read_text().splitlines()[0])
    edit_line(file, 1, lambda sample: sample.update(first))
    assert f"the id {first['id']} comes twice" in _check(folder, code=1)


def _damage_lines(folder: Path) -> str:
    file = next((folder / "conversations").glob("*.jsonl"))
    file.write_text(file.read_text() + "{}\n")
    return "is not the file that the manifest tells of"


def _damage_index(folder: Path) -> str:
    file = next((folder / "conversations").glob("*.index.npy"))
    index = np.load(file)
    index[1, 0] += 1
    np.save(file, index)
    return "its index does not fit its lines"


def _damage_codec(folder: Path) -> str:
    file = folder / "action_codec.json"
    file.write_text(file.read_text() + " ")
    return "action_codec.json: is not the one that the manifest tells of"


def _damage_frame(folder: Path) -> str:
    """A bit of a frame's middle: header and end stay, so only the checksum shows it."""
    file = next(file for file in sorted((folder / "images").rglob("*")) if file.suffix in (".jpg", ".tar"))
    content = bytearray(file.read_bytes())
    content[(file.suffix == ".tar" and 512 + 1500) or len(content) // 2] ^= 4
    file.write_bytes(content)
    return "the frames are not those that were written"


def _remove_frames(folder: Path) -> str:
    file = next(file for file in sorted((folder / "images").rglob("*")) if file.suffix in (".jpg", ".tar"))
    file.unlink()
    return "viola/train/0/"


def _add_stranger(folder: Path) -> str:
    (folder / "conversations/extra.jsonl").write_text("{}\n")
    return "extra.jsonl: the manifest does not tell of it"


@pytest.mark.parametrize(
    "damage", [_damage_lines, _damage_index, _damage_codec, _damage_frame, _remove_frames, _add_stranger]
)
def test_a_folder_that_changed_since_is_told(
    damage: Callable[[Path], str], converted: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "llava"
    shutil.copytree(converted, folder)
    message = damage(folder)
    said = _check(folder, code=1)
    assert message in said
    assert "run oxe-mix convert again" in said


def test_a_folder_that_is_no_conversion_is_refused(data: Path, tmp_path: Path) -> None:
    for folder in (data, tmp_path, tmp_path / "nowhere"):
        assert "no manifest.json, so no finished conversion" in _check(folder, code=2)
