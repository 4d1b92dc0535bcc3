"""Mods: what a mix asks for is changed, and nothing else; the counts and the lock say so."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from oxe_mix.lock import read_lock
from oxe_mix.tfrecord import frame, read_records
from tests.conftest import OXE_MIX, run
from tests.test_download import _content, _download


def _mix(tmp_path: Path, dataset: str, version: str, mods: str, fraction: float = 1.0) -> Path:
    file = tmp_path / "mods.yaml"
    entry = f"{{name: {dataset}, version: {version}, fraction: {fraction}, mods: [{mods}]}}"
    file.write_text(f"name: mods\ndatasets:\n- {entry}\n")
    return file


def _payloads(data: Path, dataset: str) -> list[bytes]:
    """Every record of a downloaded dataset, in the order of its shards."""
    out = []
    for file in sorted((data / dataset).glob(f"*/{dataset}-train.tfrecord-*")):
        with file.open("rb") as stream:
            out += [record.payload for record in read_records(stream, str(file))]
    return out


def _example(payload: bytes) -> dict[str, list[Any]]:
    from tensorflow_datasets.core.example_parser import tf_example_pb2

    features = tf_example_pb2.Example.FromString(payload).features.feature
    return {
        name: list(getattr(f, f.WhichOneof("kind") or "int64_list").value) for name, f in features.items()
    }


def _pixels(encoded: bytes) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(encoded)), np.int16)


@pytest.fixture(scope="module")
def half_failed(bucket: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """kuka with every second grasp marked as failed, and one shard without any success."""
    from tensorflow_datasets.core.example_parser import tf_example_pb2

    source = tmp_path_factory.mktemp("half") / "bucket"
    shutil.copytree(bucket / "kuka", source / "kuka")
    for number, file in enumerate(sorted((source / "kuka/0.1.0").glob("kuka-train*"))):
        with file.open("rb") as stream:
            payloads = [record.payload for record in read_records(stream, str(file))] * 4
        examples = [tf_example_pb2.Example.FromString(payload) for payload in payloads]
        for i, example in enumerate(examples):
            good = i % 2 == 0 and number != 2
            example.features.feature["success"].int64_list.value[:] = [int(good)]
        file.write_bytes(b"".join(frame(e.SerializeToString(deterministic=True)) for e in examples))
    info = json.loads((source / "kuka/0.1.0/dataset_info.json").read_text())
    split = info["splits"][0]
    split["shardLengths"] = [str(4 * int(n)) for n in split["shardLengths"]]
    (source / "kuka/0.1.0/dataset_info.json").write_text(json.dumps(info))
    return source


def test_filter_success_keeps_successes_byte_for_byte_and_the_counts_follow(
    half_failed: Path, tmp_path: Path
) -> None:
    raw, out = tmp_path / "raw", tmp_path / "data"
    _download(_mix(tmp_path, "kuka", "0.1.0", ""), half_failed, raw)
    said = _download(_mix(tmp_path, "kuka", "0.1.0", "filter_success"), half_failed, out)
    everything = _payloads(raw, "kuka")
    good = [payload for payload in everything if _example(payload)["success"] == [1]]
    assert 0 < len(good) < len(everything)
    assert _payloads(out, "kuka") == good
    assert f"done {len(good)}, dropped by mods {len(everything) - len(good)}" in said
    lock = read_lock(out)
    assert lock is not None
    split = lock.datasets[0].splits[0]
    assert lock.datasets[0].mods == ("filter_success",)
    assert (split.taken, split.episodes) == (len(everything), len(good))
    assert any(shard.episodes == 0 < shard.taken for shard in split.shards)
    info = json.loads((out / "kuka/0.1.0/dataset_info.json").read_text())["splits"][0]
    assert [int(n) for n in info["shardLengths"]] == [shard.episodes for shard in split.shards]
    assert int(info["numBytes"]) == sum(map(len, good))
    run(OXE_MIX, "verify", out)


def test_tfds_reads_a_filtered_dataset_though_a_shard_is_empty(half_failed: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorflow", reason="needs the extra tf")
    import tensorflow_datasets as tfds

    out = tmp_path / "data"
    _download(_mix(tmp_path, "kuka", "0.1.0", "filter_success"), half_failed, out)
    builder = tfds.builder_from_directory(str(out / "kuka/0.1.0"))
    assert len(list(builder.as_dataset(split="train"))) == len(_payloads(out, "kuka"))


def test_growing_a_filtered_mix_equals_a_fresh_download(half_failed: Path, tmp_path: Path) -> None:
    out, fresh = tmp_path / "data", tmp_path / "fresh"
    _download(_mix(tmp_path, "kuka", "0.1.0", "filter_success", 0.3), half_failed, out)
    larger = _mix(tmp_path, "kuka", "0.1.0", "filter_success", 0.7)
    _download(larger, half_failed, out)
    _download(larger, half_failed, fresh)
    assert _content(out) == _content(fresh)


def test_mods_that_leave_no_episode_are_an_error_and_no_dataset(half_failed: Path, tmp_path: Path) -> None:
    from oxe_mix.cards import load_cards
    from oxe_mix.rlds import parse_dataset_info
    from oxe_mix.selection import select

    assert load_cards().get("kuka").names == ("kuka",)
    source = half_failed / "kuka/0.1.0"
    info = parse_dataset_info((source / "dataset_info.json").read_text(), "")
    # The seed whose permutation begins with the shard that has no success.
    seed = next(s for s in range(99) if select(info, info.splits["train"], 0.1, s)[0].source_shard == 2)
    mix = _mix(tmp_path, "kuka", "0.1.0", "filter_success", 0.1)
    mix.write_text(mix.read_text() + f"seed: {seed}\n")
    said = _download(mix, half_failed, tmp_path / "data", code=2)
    assert "kuka (train): the mods left none of 2 episodes" in said
    assert not list((tmp_path / "data").glob("kuka/*/*"))


@pytest.mark.parametrize(
    ("dataset", "version", "camera", "other"),
    [
        ("viola", "0.1.0", "agentview_rgb", "eye_in_hand_rgb"),
        ("iamlab_cmu_pickup_insert_converted_externally_to_rlds", "0.1.0", "image", "wrist_image"),
    ],
    ids=["jpeg", "png"],
)
def test_a_flip_reverses_one_cameras_channels_and_nothing_else(
    bucket: Path, tmp_path: Path, dataset: str, version: str, camera: str, other: str
) -> None:
    raw, out = tmp_path / "raw", tmp_path / "data"
    _download(_mix(tmp_path, dataset, version, "", 0.2), bucket, raw)
    _download(_mix(tmp_path, dataset, version, f"{{flip_channels: [{camera}]}}", 0.2), bucket, out)
    column = f"steps/observation/{camera}"
    for before, after in zip(_payloads(raw, dataset), _payloads(out, dataset), strict=True):
        old, new = _example(before), _example(after)
        assert new[f"steps/observation/{other}"] == old[f"steps/observation/{other}"]
        assert {k: v for k, v in new.items() if k != column} == {k: v for k, v in old.items() if k != column}
        for one, two in zip(old[column], new[column], strict=True):
            image = Image.open(io.BytesIO(two))
            assert image.format == Image.open(io.BytesIO(one)).format
            if image.format == "PNG":
                np.testing.assert_array_equal(_pixels(two), _pixels(one)[..., ::-1])
            else:
                assert np.abs(_pixels(two) - _pixels(one)[..., ::-1]).mean() < 1.0
                plain = io.BytesIO()
                image.save(plain, "JPEG", quality=95, subsampling=0)
                same: Any = Image.open(plain)
                reference: Any = image
                assert same.quantization == reference.quantization
                assert [layer[1:3] for layer in reference.layer] == [(1, 1)] * 3  # 4:4:4


def test_the_published_flip_names_mean_the_cameras_that_a_dataset_has(bucket: Path, tmp_path: Path) -> None:
    name = "iamlab_cmu_pickup_insert_converted_externally_to_rlds"
    raw, one, two = tmp_path / "raw", tmp_path / "one", tmp_path / "two"
    _download(_mix(tmp_path, name, "0.1.0", ""), bucket, raw)
    _download(_mix(tmp_path, name, "0.1.0", "flip_image_channels"), bucket, one)
    _download(_mix(tmp_path, name, "0.1.0", "flip_image_channels, flip_image_channels"), bucket, two)
    flipped = _example(_payloads(one, name)[0])["steps/observation/image"][0]
    original = _example(_payloads(raw, name)[0])["steps/observation/image"][0]
    np.testing.assert_array_equal(_pixels(flipped), _pixels(original)[..., ::-1])
    assert _payloads(two, name) == _payloads(raw, name)  # twice is not at all: nothing is encoded anew


def test_resize_shrinks_colour_frames_and_features_json_says_so(bucket: Path, tmp_path: Path) -> None:
    raw, out = tmp_path / "raw", tmp_path / "data"
    _download(_mix(tmp_path, "language_table", "0.0.1", ""), bucket, raw)
    _download(_mix(tmp_path, "language_table", "0.0.1", "{resize: 160}"), bucket, out)
    old = _example(_payloads(raw, "language_table")[0])
    new = _example(_payloads(out, "language_table")[0])
    assert Image.open(io.BytesIO(old["steps/observation/rgb"][0])).size == (640, 360)
    assert {Image.open(io.BytesIO(f)).size for f in new["steps/observation/rgb"]} == {(160, 90)}
    folder = out / "language_table/0.0.1"
    assert '"90"' in (folder / "features.json").read_text()
    tfds = pytest.importorskip("tensorflow_datasets")
    pytest.importorskip("tensorflow", reason="needs the extra tf")
    episode = next(iter(tfds.builder_from_directory(str(folder)).as_dataset(split="train")))
    assert next(iter(episode["steps"]))["observation"]["rgb"].shape == (90, 160, 3)


def test_a_record_that_no_mod_changes_keeps_its_bytes(bucket: Path, tmp_path: Path) -> None:
    raw, out = tmp_path / "raw", tmp_path / "data"
    _download(_mix(tmp_path, "viola", "0.1.0", "", 0.3), bucket, raw)
    _download(_mix(tmp_path, "viola", "0.1.0", "{resize: 512}", 0.3), bucket, out)  # never enlarged
    assert _payloads(out, "viola") == _payloads(raw, "viola")


@pytest.mark.parametrize(
    ("mods", "message"),
    [
        ("filter_success", "mod filter_success: no flag called success in an episode"),
        ("{flip_channels: [front]}", "mod flip_channels: no colour frames called observation/front"),
        ("flip_image_channels", "mod flip_image_channels: no colour frames called observation/image"),
        ("resize_and_jpeg_encode", "is not carried over"),
        ("flip_colours", "unknown mod 'flip_colours'"),
        ("{resize: 4}", "resize: Input should be greater than or equal to 16"),
    ],
)
def test_a_mod_that_does_not_fit_is_refused_before_any_byte(
    bucket: Path, tmp_path: Path, mods: str, message: str
) -> None:
    said = _download(_mix(tmp_path, "viola", "0.1.0", mods), bucket, tmp_path / "data", code=2)
    assert message in said
    assert len(said.strip().splitlines()) == 1
    assert not list(tmp_path.glob("data/*/*/*.tfrecord*"))


def test_other_mods_into_the_same_folder_are_refused(bucket: Path, tmp_path: Path) -> None:
    _download(_mix(tmp_path, "viola", "0.1.0", "", 0.2), bucket, tmp_path / "data")
    other = _mix(tmp_path, "viola", "0.1.0", "{resize: 64}", 0.2)
    assert "viola has other mods" in _download(other, bucket, tmp_path / "data", code=2)


def test_convert_applies_the_mods_that_the_download_did_not_and_none_twice(
    half_failed: Path, tmp_path: Path
) -> None:
    """Mods by the download, or by the conversion of a folder without a lock: the same frames."""
    mix = _mix(tmp_path, "kuka", "0.1.0", "filter_success, flip_image_channels")
    with_mods, raw = tmp_path / "with", tmp_path / "raw"
    _download(mix, half_failed, with_mods)
    shutil.copytree(half_failed, raw)
    for data in (with_mods, raw):
        out = data.with_suffix(".llava")
        run(OXE_MIX, "convert", "--mix", mix, "--data", data, "--out", out, "--workers", "1")
    one, two = (
        sorted(f.read_bytes() for f in tmp_path.glob(f"{n}.llava/images/**/*.jpg")) for n in ("with", "raw")
    )
    assert len(one) > 10
    assert one == two
    manifest = json.loads((tmp_path / "raw.llava/manifest.json").read_text())["datasets"][0]["episodes"]
    assert manifest["dropped"]["filtered_by_mods"] > 0
    assert manifest["total"] == manifest["written"] + sum(manifest["dropped"].values())
    stats = [json.loads((tmp_path / f"{n}.llava/action_codec.json").read_text()) for n in ("with", "raw")]
    # The shards come in another order, and with it the last digit of a sum; quantiles do not care.
    for key in ("q01", "q99", "min", "max", "num_transitions", "num_trajectories"):
        assert stats[0]["datasets"]["kuka"][key] == stats[1]["datasets"]["kuka"][key], key


def test_convert_refuses_a_mix_without_a_mod_that_the_download_applied(bucket: Path, tmp_path: Path) -> None:
    _download(_mix(tmp_path, "viola", "0.1.0", "{resize: 64}", 0.2), bucket, tmp_path / "data")
    mix = _mix(tmp_path, "viola", "0.1.0", "")
    done = run(OXE_MIX, "convert", "--mix", mix, "--data", tmp_path / "data", "--out", tmp_path / "l", code=2)
    assert "which this mix does not have" in done.stderr
