"""Stage 2 through failures: broken records, kills, and any number of workers."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from convert.manifest import read_manifest
from oxe_mix.tfrecord import Damage, frame, scan_records
from tests.conftest import OXE_MIX, run
from tests.converting import content_of, convert, lines_of, picture, viola_episode, viola_folder

GOOD = ["Push it"] * 3
SKIP = ("--on-bad-record", "skip")


def _with_faults(folder: Path, bucket: Path) -> tuple[Path, list[int]]:
    """Six records: 1 fails its checksum, 3 has an action that is no number, 4 a frame that is cut off.
    Returns the folder and the offsets of all records.
    """
    payloads = [
        viola_episode(GOOD),
        viola_episode(["Never"] * 4),
        viola_episode(GOOD),
        viola_episode(["No"] * 2, gripper=float("nan")),
        viola_episode(["Cut"] * 2, image=picture(224, 224)[:-40]),
        viola_episode(GOOD),
    ]
    data = viola_folder(folder, bucket, payloads)
    shard = next(data.rglob("*.tfrecord-*"))
    content = bytearray(shard.read_bytes())
    offsets = [sum(len(frame(p)) for p in payloads[:n]) for n in range(len(payloads))]
    content[offsets[1] + 100] ^= 1
    shard.write_bytes(content)
    return data, offsets


def test_a_broken_record_ends_the_run_with_shard_offset_and_number(bucket: Path, tmp_path: Path) -> None:
    data, offsets = _with_faults(tmp_path / "data", bucket)
    said = convert(data, tmp_path / "llava", code=1)
    assert f"viola-train.tfrecord-00000-of-00001: record 1 at byte {offsets[1]}: the checksum" in said
    assert not (tmp_path / "llava/manifest.json").exists()


def test_broken_records_are_skipped_counted_and_listed_when_asked_for(bucket: Path, tmp_path: Path) -> None:
    data, offsets = _with_faults(tmp_path / "data", bucket)
    out = tmp_path / "llava"
    said = convert(data, out, *SKIP, "--max-bad", "3")
    dataset = read_manifest(out).datasets[0]
    assert [record.record for record in dataset.bad_records] == [1, 3, 4]
    for record, why in zip(dataset.bad_records, ("checksum", "action is nan", "cut off"), strict=True):
        assert f"record {record.record} at byte {offsets[record.record]}: " in record.error
        assert why in record.error
        assert f"skipped {record.error}" in said
    # The steps of one that cannot be read are not known.
    assert (dataset.episodes.total, dataset.episodes.dropped) == (6, {"bad_record": 3})
    assert (dataset.steps.total, dataset.steps.written, dataset.steps.dropped) == (13, 9, {"bad_record": 4})
    assert sorted({line["episode"] for line in lines_of(out)}) == [0, 2, 5]
    assert len(list((out / "images").rglob("*.jpg"))) == 9


def test_more_broken_records_than_allowed_end_the_run(bucket: Path, tmp_path: Path) -> None:
    data, _ = _with_faults(tmp_path / "data", bucket)
    said = convert(data, tmp_path / "llava", *SKIP, "--max-bad", "2", code=1)
    assert "with it more than --max-bad 2 records are broken" in said
    assert not (tmp_path / "llava/manifest.json").exists()


def test_the_limit_is_of_all_shards_together(bucket: Path, tmp_path: Path) -> None:
    data, _ = _with_faults(tmp_path / "data", bucket)
    version = data / "viola/0.1.0"
    shard = next(version.glob("*.tfrecord-*"))
    for index in (0, 1):
        shutil.copy(shard, version / f"viola-train.tfrecord-0000{index}-of-00002")
    shard.unlink()
    info = json.loads((version / "dataset_info.json").read_text())
    info["splits"][0]["shardLengths"] = ["6", "6"]
    (version / "dataset_info.json").write_text(json.dumps(info))
    said = convert(data, tmp_path / "llava", *SKIP, "--max-bad", "5", code=1)
    assert "6 records broken, --max-bad allows 5" in said
    convert(data, tmp_path / "llava", *SKIP, "--max-bad", "6")
    assert read_manifest(tmp_path / "llava").datasets[0].episodes.dropped == {"bad_record": 6}


@pytest.mark.parametrize("cut", [5, 40_000])
def test_what_lies_behind_a_cut_counts_as_broken(cut: int, bucket: Path, tmp_path: Path) -> None:
    """Nobody can find a record behind one whose end is not known."""
    data = viola_folder(tmp_path / "data", bucket, [viola_episode(GOOD) for _ in range(4)])
    shard = next(data.rglob("*.tfrecord-*"))
    whole = shard.read_bytes()
    left = len(whole) - cut
    shard.write_bytes(whole[:left])
    num_whole = left // (len(whole) // 4)
    convert(data, tmp_path / "llava", *SKIP)
    dataset = read_manifest(tmp_path / "llava").datasets[0]
    assert dataset.episodes.written == num_whole
    assert dataset.episodes.dropped == {"bad_record": 4 - num_whole}


def test_reading_goes_on_behind_a_record_whose_data_alone_is_damaged(tmp_path: Path) -> None:
    payloads = [b"a" * 10, b"b" * 20, b"c" * 30]
    content = bytearray(b"".join(map(frame, payloads)))
    content[26 + 12 + 3] ^= 1  # inside the data of the second
    file = tmp_path / "x"
    file.write_bytes(content)
    with file.open("rb") as stream:
        found = list(scan_records(stream, "x"))
    assert [isinstance(one, Damage) for one in found] == [False, True, False]
    assert [(one.number, one.offset) for one in found] == [(0, 0), (1, 26), (2, 62)]
    content[62] ^= 1  # the length of the third
    file.write_bytes(content)
    with file.open("rb") as stream:
        *_, last = scan_records(stream, "x")
    assert isinstance(last, Damage)
    assert last.rest


def test_a_dataset_of_which_nothing_is_left_is_told_by_the_exit_code(bucket: Path, tmp_path: Path) -> None:
    """The other dataset is a result, and the manifest says what is missing."""
    viola_folder(tmp_path / "data", bucket, [viola_episode([""] * 3)])
    shutil.copytree(bucket / "kuka", tmp_path / "data/kuka")
    said = convert(tmp_path / "data", tmp_path / "llava", code=1)
    assert "error: viola: no sample to train on" in said
    assert read_manifest(tmp_path / "llava").missing == ("viola: no sample to train on",)


def test_one_episode_alone_cannot_be_held_out_and_that_is_said(bucket: Path, tmp_path: Path) -> None:
    data = viola_folder(tmp_path / "data", bucket, [viola_episode(GOOD)])
    said = convert(data, tmp_path / "llava", "--val-fraction", "0.5", code=1)
    assert "error: viola: no sample held out" in said


@pytest.mark.parametrize("layout", ["files", "tar"])
def test_what_was_finished_before_a_kill_is_not_done_again(layout: str, data: Path, tmp_path: Path) -> None:
    command: list[str | Path] = [OXE_MIX, "convert", "--data", data, "--workers", "1", "--layout", layout]
    whole, out = tmp_path / "whole", tmp_path / "killed"
    run(*command, "--out", whole)
    scratch = out / ".partial"
    process = subprocess.Popen([*command, "--out", out], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and len(list(scratch.glob("*.report.json"))) < 4:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    reports = sorted(scratch.glob("*.report.json"))
    assert len(reports) >= 4
    assert not (out / "manifest.json").exists()
    stems = [report.name.removesuffix(".report.json") for report in reports]
    files = [file for stem in stems for file in (out / "conversations").glob(f"{stem}*")]
    finished = {file: file.stat().st_ino for file in files}
    # One of them lost its frames since: that one is not trusted.
    lost = _frames_of(out, stems[0])
    shutil.rmtree(lost) if lost.is_dir() else lost.unlink()
    run(*command, "--out", out)
    assert content_of(out) == content_of(whole)
    again = {file for file, inode in finished.items() if file.stat().st_ino != inode}
    assert again == {file for file in finished if file.name.startswith(stems[0])}


def _frames_of(out: Path, stem: str) -> Path:
    """Where the frames of a shard lie."""
    tar = out / "images" / f"{stem}.tar"
    name, split, index, _, _ = stem.rsplit("-", 4)
    return tar if tar.exists() else out / "images" / name / split / str(int(index))


def test_other_options_after_a_kill_make_what_they_always_make(data: Path, tmp_path: Path) -> None:
    command: list[str | Path] = [OXE_MIX, "convert", "--data", data, "--workers", "1", "--out"]
    out, more = tmp_path / "killed", ("--chunk", "2", "--stride", "2")
    process = subprocess.Popen([*command, out], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list((out / ".partial").glob("*.report.json")):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    run(*command, out, *more)
    run(*command, tmp_path / "fresh", *more)
    assert content_of(out) == content_of(tmp_path / "fresh")


def test_eight_workers_make_the_same_bytes_as_one(data: Path, llava: Path, tmp_path: Path) -> None:
    run(
        OXE_MIX, "convert", "--data", data, "--out", tmp_path / "8", "--val-fraction", "0.1", "--workers", "8"
    )
    assert content_of(tmp_path / "8") == content_of(llava)


def test_data_that_changed_since_a_kill_is_read_again(bucket: Path, tmp_path: Path) -> None:
    """The notes of a shard name its size and time."""
    first, second = viola_episode(GOOD), viola_episode(["Pull it"] * 3)
    data, out = viola_folder(tmp_path / "data", bucket, [first]), tmp_path / "llava"
    convert(data, out)
    (out / "manifest.json").unlink()
    shard = next(data.rglob("*.tfrecord-*"))
    before = shard.stat()
    shard.write_bytes(frame(second))
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    convert(data, out)
    assert "pull it" in lines_of(out)[0]["conversations"][0]["value"]
