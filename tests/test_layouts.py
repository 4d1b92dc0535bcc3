"""Files or tars, one camera or several, lines or one array: the same samples, found at random."""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

from convert.action_codec import read_codec
from convert.frames import TarWriter, open_frames, read_tar_index
from convert.manifest import read_manifest
from convert.reader import ConversationReader
from oxe_mix.errors import UserError
from tests.conftest import OXE_MIX, run
from tests.converting import content_of, convert, lines_of, picture, viola_episode, viola_folder


@pytest.fixture(scope="session")
def tars(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the fixture `llava` holds, in tars, and as one array beside the lines."""
    out = tmp_path_factory.mktemp("tars") / "llava"
    run(
        OXE_MIX, "convert", "--data", data, "--out", out, "--val-fraction", "0.1", "--layout", "tar", "--json"
    )
    return out


@pytest.mark.parametrize("part", ["train", "val"])
def test_a_reader_gives_the_same_from_either_layout(part: str, llava: Path, tars: Path) -> None:
    files, tarred = ConversationReader(llava, part), ConversationReader(tars, part)  # type: ignore[arg-type]
    assert len(files) == len(tarred) > 30
    for i in np.random.default_rng(0).permutation(len(files)).tolist():
        one, other = files[i], tarred[i]
        assert [frame.read() for frame in one.frames] == [frame.read() for frame in other.frames]
        assert (one.id, one.images, one.question, one.answer, one.step) == (
            other.id,
            other.images,
            other.question,
            other.answer,
            other.step,
        )
    assert files.ranges == tarred.ranges


def test_a_tar_is_what_webdataset_expects_and_its_index_says_where(tars: Path) -> None:
    """Its rule: before the first dot of a member's name stands the sample, behind it what it is."""
    files = sorted((tars / "images").glob("*.tar"))
    assert len(files) == len(list((tars / "conversations").glob("*.jsonl")))
    names = set()
    for file in files:
        index = read_tar_index(file)
        with tarfile.open(file) as tar:
            members = tar.getmembers()
            assert [member.name for member in members] == list(index)
            for member in members:
                body = tar.extractfile(member)
                assert body is not None
                assert body.read() == index[member.name].read()
                assert (member.mode, member.mtime, member.isreg()) == (0o644, 0, True)
                names.add(member.name)
        assert file.stat().st_size % tarfile.RECORDSIZE == 0
    asked = {line["image"] for part in ("conversations", "val") for line in lines_of(tars, part)}
    assert names == asked
    # Unpacked they are the other layout.
    assert all(name.endswith((".jpg", ".png")) and name.count("/") == 3 for name in names)


def test_no_data_yaml_promises_stock_llava_what_lies_in_tars(llava: Path, tars: Path) -> None:
    assert (llava / "data.yaml").exists()
    assert not (tars / "data.yaml").exists()


def test_the_array_holds_the_lines_in_order(tars: Path, llava: Path) -> None:
    manifest = read_manifest(tars)
    for name, files in (
        ("conversations.json", [f for d in manifest.datasets for f in d.files]),
        ("val.json", [f for d in manifest.datasets for f in d.validation_files]),
    ):
        lines = [json.loads(line) for f in files for line in (tars / f.path).read_text().splitlines()]
        assert json.loads((tars / name).read_text()) == lines
        assert len(lines) > 30
    assert not (llava / "conversations.json").exists()


def test_another_layout_into_the_same_folder_leaves_nothing_of_the_first(
    tars: Path, data: Path, tmp_path: Path
) -> None:
    shutil.copytree(tars, tmp_path / "llava")
    more = ("--val-fraction", "0.1")
    run(OXE_MIX, "convert", "--data", data, "--out", tmp_path / "llava", *more)
    run(OXE_MIX, "convert", "--data", data, "--out", tmp_path / "fresh", *more)
    assert content_of(tmp_path / "llava") == content_of(tmp_path / "fresh")


@pytest.mark.parametrize(("layout", "mark"), [("files", "-"), ("tar", ".")])
def test_several_cameras_are_several_images_in_the_order_asked_for(
    layout: str, mark: str, bucket: Path, tmp_path: Path
) -> None:
    front, wrist = picture(224, 224, seed=1), picture(224, 224, seed=2)
    record = viola_episode(["Go"] * 3, image=front, wrist=wrist)
    out = tmp_path / "llava"
    convert(
        viola_folder(tmp_path / "data", bucket, [record]),
        out,
        "--cameras",
        "wrist,primary",
        "--layout",
        layout,
    )
    first = lines_of(out)[0]
    assert first["conversations"][0]["value"].startswith("<image>\n<image>\nWhat action")
    assert first["image"] == [f"viola/train/0/0_0{mark}wrist.jpg", f"viola/train/0/0_0{mark}primary.jpg"]
    sample = ConversationReader(out, "train")[2]
    assert [frame.read() for frame in sample.frames] == [wrist, front]
    frames = open_frames(out, layout)  # type: ignore[arg-type]
    assert frames.read(first["image"][0]) == wrist
    assert read_manifest(out).datasets[0].cameras == ("wrist", "primary")
    assert read_manifest(out).datasets[0].images == 6


def test_a_camera_that_a_dataset_lacks_is_refused_or_left_out_by_name(data: Path, tmp_path: Path) -> None:
    words = ("--only", "kuka", "--only", "viola", "--cameras", "primary,wrist")
    said = convert(data, tmp_path / "no", *words, code=2)
    assert "error: kuka: has no wrist camera; leave it out, or go on with --allow-missing" in said
    assert not (tmp_path / "no").exists()
    said = convert(data, tmp_path / "yes", *words, "--allow-missing")
    assert "warning: kuka: has no wrist camera" in said
    images = {line["dataset"]: line["image"] for line in lines_of(tmp_path / "yes")}
    assert isinstance(images["kuka"], str)
    assert len(images["viola"]) == 2
    assert [d.cameras for d in read_manifest(tmp_path / "yes").datasets] == [
        ("primary", "wrist"),
        ("primary",),
    ]
    # Who acts asks as the training did.
    codec = read_codec(tmp_path / "yes")
    assert codec.asking_of("kuka").cameras == ("primary",)
    assert codec.asking_of("viola").cameras == ("primary", "wrist")


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "viola/../../../../x.jpg"])
def test_no_image_is_read_from_outside_the_folder(name: str, llava: Path, tmp_path: Path) -> None:
    out = tmp_path / "llava"
    shutil.copytree(llava, out)
    file = next(f for f in sorted((out / "conversations").glob("viola-*.jsonl")) if f.stat().st_size)
    first, *others = file.read_text().splitlines(keepends=True)
    image = json.loads(first)["image"]
    file.write_text("".join([first.replace(image, name[: len(image)].ljust(len(image), "g")), *others]))
    reader = ConversationReader(out, "train")
    with pytest.raises(UserError, match="outside"):
        reader[reader.ranges["viola"][0]]
    with pytest.raises(UserError, match="outside"):
        open_frames(out, "files").read(name)


@pytest.mark.parametrize("damage", ["cut", "gone", "index"])
def test_lines_that_are_not_what_the_manifest_says_are_refused_when_opened(
    damage: str, llava: Path, tmp_path: Path
) -> None:
    shutil.copytree(llava, tmp_path / "llava")
    file = sorted((tmp_path / "llava/conversations").glob("bridge_orig-*.jsonl"))[0]
    index = file.with_name(file.name.replace(".jsonl", ".index.npy"))
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-5])
    elif damage == "gone":
        file.unlink()
    else:
        index.write_bytes(b"no index")
    with pytest.raises(UserError, match=r"bridge_orig-train-00000-of-00005\.jsonl"):
        ConversationReader(tmp_path / "llava", "train")


def test_a_tar_that_ends_early_is_named(tars: Path, tmp_path: Path) -> None:
    shutil.copytree(tars, tmp_path / "llava")
    reader = ConversationReader(tmp_path / "llava", "train")
    frame = reader[len(reader) - 1].frames[0]
    frame.file.write_bytes(frame.file.read_bytes()[: frame.offset + 10])
    with pytest.raises(UserError, match=rf"{frame.file}, at byte .*: the file ends inside the frame"):
        frame.read()


def test_long_names_and_any_size_make_a_tar_that_others_read(tmp_path: Path) -> None:
    frames = {"d/s/0/1_2.jpg": b"x" * 512, f"{'n' * 120}/s/0/1_3.jpg": b"", "ü/s/0/1_4.png": b"y" * 1025}
    with TarWriter(tmp_path / "a.tar") as writer:
        offsets = [writer.add(name, frame) for name, frame in frames.items()]
    with tarfile.open(tmp_path / "a.tar") as tar:
        read = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    assert read == frames
    content = (tmp_path / "a.tar").read_bytes()
    assert [content[at : at + len(f)] for at, f in zip(offsets, frames.values(), strict=True)] == list(
        frames.values()
    )


def test_a_tar_that_fails_half_way_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with TarWriter(tmp_path / "a.tar") as writer:
            writer.add("d/s/0/1_2.jpg", b"x")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list(tmp_path.iterdir()) == []
