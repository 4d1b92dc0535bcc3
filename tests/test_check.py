"""`oxe-mix check`: quiet on what convert wrote, and every fault that is planted is found and placed."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import tarfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert.frames import TarWriter, read_tar_index
from tests.conftest import OXE_MIX, PYTHON, run
from tests.converting import content_of, convert, edit_line, picture, viola_episode, viola_folder

# For faults that look the same in either layout.
FILES, TARS = (pytest.mark.parametrize("converted", [layout], indirect=True) for layout in ("files", "tar"))


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
    counts = {"samples": 9, "images": 18}
    datasets = [{"name": "viola", **counts, "problems": {}}]
    assert report == {"event": "checked", **counts, "datasets": datasets, "problems": []}


def test_every_dataset_of_the_demo_and_openvlas_bins_pass(llava: Path, data: Path, tmp_path: Path) -> None:
    assert "0 problems" in _check(llava)
    convert(data, tmp_path / "o", "--only", "bridge_orig", "--binning", "openvla255", "--state")
    assert "0 problems" in _check(tmp_path / "o")


def _swap(sample: dict[str, Any], turn: int, old: str, new: str) -> None:
    conversation = sample["conversations"][turn]
    conversation["value"] = re.sub(old, new, conversation["value"], count=1)


@FILES
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
        (
            lambda s: _swap(s, 1, r"<ACTION_\d+>", "<ACTION_99999999999999999999>"),
            "is not made of the tokens",
        ),
        (lambda s: s.update(image=["viola/train/0/9_9.jpg"] * 2), "0/9_9.jpg is of another place than"),
        (lambda s: s.update(image=["../../../etc/passwd"] * 2), "etc/passwd is of another place than"),
        (lambda s: s.update(image=[name + "x" for name in s["image"]]), "x: "),
        (lambda s: s.update(image=[re.sub(r"_\d", r"\g<0>0", name) for name in s["image"]]), "another place"),
    ],
)
def test_a_line_that_is_wrong_is_named(
    change: Callable[[dict[str, Any]], None], message: str, converted: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "llava"
    shutil.copytree(converted, folder)
    file = next((folder / "conversations").glob("*.jsonl"))
    edit_line(file, 2, change)
    said = _check(folder, code=1)
    assert f"error: {file}:3: " in said
    assert message in said
    assert "1 problem," in said


@FILES
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
    return ".jsonl:2: its index has the line in another place"


def _flatten_index(folder: Path) -> str:
    file = next((folder / "conversations").glob("*.index.npy"))
    np.save(file, np.load(file).ravel())
    return f"{file}: is int64 of ("


def _empty_index(folder: Path) -> str:
    file = next((folder / "conversations").glob("*.index.npy"))
    file.write_bytes(b"")
    return f"{file}: cannot be read (No data left in file)"


def _shorten_index(folder: Path) -> str:
    file = next((folder / "conversations").glob("*.index.npy"))
    np.save(file, np.load(file)[:-1])
    return "not int64 of 6 rows"


def _remove_lines(folder: Path) -> str:
    file = next((folder / "conversations").glob("*.jsonl"))
    file.unlink()
    return f"{file}: cannot be read (No such file or directory)"


def _rename_dataset_of_codec(folder: Path) -> str:
    file, manifest = folder / "action_codec.json", folder / "manifest.json"
    old = hashlib.sha256(file.read_bytes()).hexdigest()
    file.write_text(file.read_text().replace('"viola"', '"kuka"'))
    manifest.write_text(manifest.read_text().replace(old, hashlib.sha256(file.read_bytes()).hexdigest()))
    return "the codec does not know viola"


def _edit_manifest(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest["datasets"][0])
    (folder / "manifest.json").write_text(json.dumps(manifest))


def _miscount(folder: Path) -> str:
    _edit_manifest(folder, lambda dataset: dataset.update(images=17))
    return "manifest.json: viola: samples, held out, images, bytes: (6, 3, 17, "


def _list_a_shard_twice(folder: Path) -> str:
    def change(dataset: dict[str, Any]) -> None:
        for kind in ("files", "frames"):
            text = json.dumps(dataset[kind][0])
            dataset[kind].append(json.loads(text.replace("of-00001", "of-00002")))

    _edit_manifest(folder, change)
    return "another file holds the same shard"


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


def _add_strange_folder(folder: Path) -> str:
    (folder / "images/old/train/3").mkdir(parents=True)
    (folder / "images/old/train/3/0_0.jpg").write_bytes(picture(16, 16))
    return "images/old: the manifest does not tell of it"


def _add_frame(folder: Path) -> str:
    """A frame that no sample names, where the frames of the shard are."""
    tar = next((folder / "images").glob("*.tar"), None)
    if tar is None:
        (folder / "images/viola/train/0/7_7.jpg").write_bytes(picture(16, 16))
    else:
        frames = [(name, frame.read()) for name, frame in read_tar_index(tar).items()]
        with TarWriter(tar) as writer:
            for name, encoded in [*frames, ("viola/train/0/7_7.jpg", picture(16, 16))]:
                writer.add(name, encoded)
    return "images/viola/train/0/7_7.jpg: no sample names it"


def _assert_told(damage: Callable[[Path], str], converted: Path, tmp_path: Path) -> None:
    shutil.copytree(converted, folder := tmp_path / "llava")
    message = damage(folder)
    said = _check(folder, code=1)
    assert message in said
    assert "run oxe-mix convert again" in said


@FILES
@pytest.mark.parametrize(
    "damage",
    [
        _damage_lines,
        _remove_lines,
        _damage_index,
        _flatten_index,
        _empty_index,
        _shorten_index,
        _damage_codec,
        _rename_dataset_of_codec,
        _miscount,
        _list_a_shard_twice,
        _add_stranger,
        _add_strange_folder,
    ],
)
def test_a_folder_that_changed_since_is_told(
    damage: Callable[[Path], str], converted: Path, tmp_path: Path
) -> None:
    _assert_told(damage, converted, tmp_path)


@pytest.mark.parametrize("damage", [_damage_frame, _remove_frames, _add_frame])
def test_frames_that_changed_since_are_told(
    damage: Callable[[Path], str], converted: Path, tmp_path: Path
) -> None:
    _assert_told(damage, converted, tmp_path)


def _rename_member(content: bytearray, start: int) -> str:
    """With a right checksum."""
    info = tarfile.TarInfo.frombuf(bytes(content[start : start + 512]), "utf-8", "strict")
    name = info.name
    info.name = name.replace("0_1", "0_9")
    content[start : start + 512] = info.tobuf(tarfile.USTAR_FORMAT)
    return f"its members are not those of its index, from {name} on"


def _end_early(content: bytearray, start: int) -> str:
    content[start : start + 512] = bytes(512)
    return "its members are not those of its index, from viola/train/0/0_1.primary.jpg on"


def _spoil_first_header(content: bytearray, _: int) -> str:
    content[:512] = b"x" * 512
    return "is no whole tar with an index"


@TARS
@pytest.mark.parametrize("damage", [_rename_member, _end_early, _spoil_first_header])
def test_a_tar_that_other_tools_would_read_otherwise_is_told(
    damage: Callable[[bytearray, int], str], converted: Path, tmp_path: Path
) -> None:
    """The frames themselves, which the index finds, are all there."""
    shutil.copytree(converted, folder := tmp_path / "llava")
    file = next((folder / "images").glob("*.tar"))
    content = bytearray(file.read_bytes())
    message = damage(content, content.index(b"viola/train/0/0_1.primary"))
    file.write_bytes(content)
    said = _check(folder, code=1)
    assert f"{file}: {message}" in said
    assert "1 problem," in said


@FILES
def test_hidden_files_are_nobodys_business(converted: Path, tmp_path: Path) -> None:
    shutil.copytree(converted, folder := tmp_path / "llava")
    for place in (
        "conversations/.DS_Store",
        "images/.hidden/x",
        "images/viola/train/0/.x",
        "val/.x.jsonl.1.tmp",
    ):
        (folder / place).parent.mkdir(exist_ok=True)
        (folder / place).write_text("x")
    assert "0 problems" in _check(folder)


@FILES
def test_a_frame_that_only_decoding_shows_to_be_broken_is_told(converted: Path, tmp_path: Path) -> None:
    shutil.copytree(converted, folder := tmp_path / "llava")
    file = next(file for file in sorted((folder / "images").rglob("*")) if file.suffix in (".jpg", ".tar"))
    content = bytearray(file.read_bytes())
    begin = content.index(b"\xff\xda") + 200
    content[begin : begin + 600] = bytes(600)
    file.write_bytes(content)
    said = _check(folder, "--decode", code=1)
    assert "cannot be decoded" in said
    assert re.search(r"viola-train-00000-of-00001\.jsonl:1: viola/train/0/0_0-primary\.jpg", said)
    assert "cannot be decoded" not in _check(folder, code=1)


@FILES
def test_only_twenty_problems_are_shown_and_all_are_counted(converted: Path, tmp_path: Path) -> None:
    shutil.copytree(converted, folder := tmp_path / "llava")
    for number in range(30):
        (folder / f"conversations/{number}.jsonl").write_text("{}\n")
    said = _check(folder, code=1)
    assert said.count("error: ") == 20
    assert "and 10 more; --json lists them all" in said
    assert "30 problems" in said
    assert len(json.loads(_check(folder, "--json", code=1).splitlines()[-1])["problems"]) == 30


@FILES
@pytest.mark.parametrize("path", ["conversations/other.jsonl", "../viola-train-00000-of-00001.jsonl"])
def test_files_that_convert_would_not_call_so_are_refused(path: str, converted: Path, tmp_path: Path) -> None:
    shutil.copytree(converted, folder := tmp_path / "llava")
    _edit_manifest(folder, lambda dataset: dataset["files"][0].update(path=path))
    assert "the files of viola are not called as convert calls them" in _check(folder, code=2)


def test_workers_end_when_the_command_is_killed() -> None:
    code = (
        "import os\n"
        "from concurrent.futures import ProcessPoolExecutor\n"
        "from convert.check import _end_with\n"
        "pool = ProcessPoolExecutor(2, initializer=_end_with, initargs=(os.getpid(),))\n"
        "assert pool.submit(os.getppid).result() == os.getpid()\n"
        "os.kill(os.getpid(), 9)\n"
    )
    command = subprocess.Popen([PYTHON, "-c", code], stdout=subprocess.PIPE, start_new_session=True)
    try:
        # The pipe ends with the last of those who hold it, and the workers do.
        command.communicate(timeout=60)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(command.pid, signal.SIGKILL)
    assert command.returncode == -signal.SIGKILL


def test_a_folder_that_is_no_conversion_is_refused(data: Path, tmp_path: Path) -> None:
    for folder in (data, tmp_path):
        assert "no manifest.json, so no finished conversion" in _check(folder, code=2)
    assert "no such folder" in _check(tmp_path / "nowhere", code=2)
