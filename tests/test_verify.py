"""`oxe-mix verify`: every kind of damage is named with its place, and a good folder is quiet."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from oxe_mix.tfrecord import frame
from tests.conftest import OXE_MIX, run
from tests.test_download import _content, _download, _payloads

VIOLA = "viola/0.1.0"


@pytest.fixture
def copy(data: Path, tmp_path: Path) -> Path:
    """A download of our own to damage."""
    shutil.copytree(data, tmp_path / "data")
    return tmp_path / "data"


def _shard(data: Path) -> Path:
    return sorted((data / VIOLA).glob("viola-train*"))[1]


def _flip(shard: Path) -> None:
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)


def _cut(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[:-7])


def _lose_a_record(shard: Path) -> None:
    shard.write_bytes(b"".join(map(frame, _payloads(shard)[:-1])))


def _swap_a_record(shard: Path) -> None:
    """As many records of the same length, all their checksums right: only the lock knows."""
    records = _payloads(shard)
    records[0] = records[0][:-1] + bytes([records[0][-1] ^ 1])
    shard.write_bytes(b"".join(map(frame, records)))


def _pointer(shard: Path) -> None:
    shard.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 1\n")


def _page(shard: Path) -> None:
    shard.write_text("<!DOCTYPE html><html><body>Sign in</body></html>")


def _packed(shard: Path) -> None:
    shard.write_bytes(gzip.compress(shard.read_bytes()))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_flip, "the checksum of the data is wrong"),
        (_cut, "the file ends inside the record"),
        (_lose_a_record, "records, dataset_info.json says"),
        (_swap_a_record, "the lock says"),
        (_pointer, "this is a git-LFS pointer"),
        (_page, "this is an HTML page"),
        (_packed, "this is gzip data"),
        (Path.unlink, "not there, though dataset_info.json lists it"),
    ],
)
def test_a_damaged_shard_is_named_and_the_exit_code_says_so(
    copy: Path, damage: Callable[[Path], None], message: str
) -> None:
    shard = _shard(copy)
    damage(shard)
    done = run(OXE_MIX, "verify", copy, code=1)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert any(f"{shard}" in line and message in line for line in errors)
    assert all(VIOLA in line for line in errors)
    assert "run oxe-mix download again" in done.stdout


def test_a_good_folder_is_quiet_and_says_what_was_read(data: Path) -> None:
    done = run(OXE_MIX, "verify", data)
    assert done.stderr == ""
    assert "109 records in 27 shards" in done.stdout
    assert "0 problems" in done.stdout
    report = json.loads(run(OXE_MIX, "verify", data, "--json").stdout)
    assert report["problems"] == []
    assert sum(dataset["records"] for dataset in report["datasets"]) == 109


def test_a_folder_that_no_download_wrote_is_checked_against_its_own_metadata(
    bucket: Path, tmp_path: Path
) -> None:
    done = run(OXE_MIX, "verify", bucket)
    assert "no oxe-mix.lock.json here" in done.stdout
    shutil.copytree(bucket / "viola", tmp_path / "viola")
    _flip(_shard(tmp_path))
    assert "the checksum of the data is wrong" in run(OXE_MIX, "verify", tmp_path, code=1).stderr
    (tmp_path / "empty").mkdir()
    assert (
        "no NAME/VERSION/dataset_info.json here" in run(OXE_MIX, "verify", tmp_path / "empty", code=2).stderr
    )


def test_a_file_is_no_folder_of_datasets(tmp_path: Path) -> None:
    (tmp_path / "mix.yaml").write_text("name: m")
    said = run(OXE_MIX, "verify", tmp_path / "mix.yaml", code=2).stderr
    assert said.startswith(f"error: {tmp_path / 'mix.yaml'}: no NAME/VERSION/dataset_info.json here")


def test_metadata_that_disagrees_with_the_files_is_named(copy: Path) -> None:
    file = copy / VIOLA / "dataset_info.json"
    info = json.loads(file.read_text())
    info["splits"][0]["numBytes"] = "1"
    file.write_text(json.dumps(info))
    assert "numBytes of train is 1, its files hold" in run(OXE_MIX, "verify", copy, code=1).stderr


def test_files_that_nothing_lists_and_features_that_no_card_fits_are_named(copy: Path) -> None:
    shutil.copy(_shard(copy), copy / VIOLA / "viola-train.tfrecord-00000-of-00009")
    features = copy / "bridge_orig/1.0.0/features.json"
    features.write_text(features.read_text().replace('"image_0"', '"image_9"'))
    said = run(OXE_MIX, "verify", copy, code=1).stderr
    assert "viola-train.tfrecord-00000-of-00009: dataset_info.json does not list it" in said
    assert "no image feature observation/image_0" in said


def test_an_unfinished_download_does_not_pass(copy: Path) -> None:
    lock = copy / "oxe-mix.lock.json"
    lock.write_text(lock.read_text().replace('"complete": true', '"complete": false'))
    assert "the download is not finished" in run(OXE_MIX, "verify", copy, code=1).stderr


def test_what_verify_found_is_mended_by_removing_it_and_downloading_again(
    bucket: Path, data: Path, copy: Path
) -> None:
    _swap_a_record(_shard(copy))
    run(OXE_MIX, "verify", copy, code=1)
    _shard(copy).unlink()
    said = _download(Path("demo.yaml"), bucket, copy)
    assert "fetched 1 shard," in said
    assert _content(copy) == _content(data)
