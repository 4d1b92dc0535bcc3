"""mixtures/default.yaml whole, at its true fractions: 26 datasets in their true trees, many small shards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from oxe_mix.cards import load_cards
from oxe_mix.lock import Lock, read_lock
from oxe_mix.mix import Mix, load_mix
from oxe_mix.rlds import parse_dataset_info
from oxe_mix.tfrecord import read_records
from tests.conftest import OXE_MIX, run

EPISODES = 32  # of each dataset, as the fixture makes them


@pytest.fixture(scope="module")
def mix() -> Mix:
    return load_mix(Path("default.yaml"), load_cards())


@pytest.fixture(scope="module")
def data26(bucket26: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data26") / "data"
    run(OXE_MIX, "download", "--mix", "default.yaml", "--source", bucket26, "--out", out)
    return out


@pytest.fixture(scope="module")
def lock(data26: Path) -> Lock:
    lock = read_lock(data26)
    assert lock is not None
    return lock


def test_every_dataset_is_there_with_exactly_its_share(mix: Mix, lock: Lock) -> None:
    assert [dataset.name for dataset in lock.datasets] == [spec.name for spec in mix.datasets]
    assert len(lock.datasets) == 26
    for spec, dataset in zip(mix.datasets, lock.datasets, strict=True):
        (split,) = dataset.splits
        assert split.of_episodes == EPISODES
        assert split.taken == max(1, round(EPISODES * spec.fraction)), spec.name
        assert dataset.mods == spec.mods
        assert split.episodes == split.taken or spec.mods == ("filter_success",)


def test_a_plain_reader_agrees_with_the_lock_on_every_record(data26: Path, lock: Lock) -> None:
    """Of datasets without mods each record is the source's; of all, counts and checksums are the lock's."""
    compared = 0
    for dataset in lock.datasets:
        info = parse_dataset_info((data26 / dataset.folder / "dataset_info.json").read_text(), "")
        for split in dataset.splits:
            assert info.splits[split.split].shard_lengths == tuple(shard.episodes for shard in split.shards)
            for shard in split.shards:
                records = _records(data26 / dataset.folder / shard.file)
                assert len(records) == shard.episodes
                source = _records(Path(dataset.source) / shard.source_file)
                assert len(source) == shard.of_episodes
                if not dataset.mods:
                    assert records == source[: shard.taken]
                    compared += len(records)
                elif dataset.mods == ("filter_success",):
                    assert set(records) <= set(source[: shard.taken])
    assert compared > 150


def test_tfds_agrees_with_the_lock_on_every_dataset(data26: Path, lock: Lock) -> None:
    pytest.importorskip("tensorflow", reason="needs the extra tf")
    import tensorflow_datasets as tfds

    for dataset in lock.datasets:
        builder = tfds.builder_from_directory(str(data26 / dataset.folder))
        decoders = {"steps": tfds.decode.SkipDecoding()}
        read = sum(1 for _ in builder.as_dataset(split="train", decoders=decoders))
        assert read == dataset.splits[0].episodes, dataset.name
        assert builder.info.splits["train"].num_examples == dataset.splits[0].episodes


def test_the_flips_of_the_mix_reach_the_frames(data26: Path, lock: Lock) -> None:
    """Four datasets and fmb's four cameras: what was stored blue first is red first now."""
    flipped = [dataset for dataset in lock.datasets if dataset.mods and dataset.mods != ("filter_success",)]
    assert len(flipped) == 5
    for dataset in flipped:
        shard = dataset.splits[0].shards[0]
        before = _records(Path(dataset.source) / shard.source_file)[0]
        after = _records(data26 / dataset.folder / shard.file)[0]
        assert before != after, dataset.name


def test_verify_finds_nothing_wrong_with_it(data26: Path) -> None:
    report = json.loads(run(OXE_MIX, "verify", data26, "--json").stdout)
    assert report["problems"] == []
    assert len(report["datasets"]) == 26


def _records(file: Path) -> list[bytes]:
    with file.open("rb") as stream:
        return [record.payload for record in read_records(stream, str(file))]
