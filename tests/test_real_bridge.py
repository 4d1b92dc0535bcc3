"""All stages on 25 real BridgeData V2 episodes, where the folder that holds them is beside the checkout."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert import action_codec as codec
from convert.action_codec import read_codec
from convert.manifest import read_manifest
from oxe_mix.rlds import Episode, parse_features
from oxe_mix.tfrecord import frame, read_records
from tests.conftest import OXE_MIX, PYTHON, ROOT, run


@pytest.fixture(scope="module")
def real(shared: Path) -> Path:
    return shared / "real/bridge_dataset/1.0.0"


@pytest.fixture(scope="module")
def bucket(real: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real episodes as a bucket of five shards, record for record."""
    source = tmp_path_factory.mktemp("real") / "bucket"
    target = source / "bridge_dataset/1.0.0"
    target.mkdir(parents=True)
    payloads = _payloads(real / "bridge_dataset-train.tfrecord-00000-of-00001")
    info = json.loads((real / "dataset_info.json").read_text())
    info["splits"] = [{**info["splits"][0], "shardLengths": ["5"] * 5}]
    (target / "dataset_info.json").write_text(json.dumps(info))
    shutil.copy(real / "features.json", target)
    for i in range(5):
        part = b"".join(map(frame, payloads[5 * i : 5 * i + 5]))
        (target / f"bridge_dataset-train.tfrecord-{i:05d}-of-00005").write_bytes(part)
    return source


@pytest.fixture(scope="module")
def llava(bucket: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Downloaded whole and converted."""
    folder = tmp_path_factory.mktemp("bridge")
    (folder / "mix.yaml").write_text(
        "name: real\ndatasets:\n- {name: bridge_orig, version: 1.0.0, fraction: 1.0}\n"
    )
    where = ("--mix", folder / "mix.yaml", "--source", bucket, "--out", folder / "data", "--workers", "1")
    run(OXE_MIX, "download", *where)
    out = folder / "llava"
    run(
        OXE_MIX, "convert", "--data", folder / "data", "--out", out, "--val-fraction", "0.1", "--workers", "1"
    )
    return out


def _payloads(file: Path) -> list[bytes]:
    with file.open("rb") as stream:
        return [record.payload for record in read_records(stream, str(file))]


def _samples(llava: Path) -> dict[str, dict[str, Any]]:
    files = [file for part in ("conversations", "val") for file in sorted((llava / part).glob("*.jsonl"))]
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return {line["id"]: line for line in lines}


def _recipe(steps_state: np.ndarray[Any, Any], gripper: list[float]) -> list[list[float]]:
    """bridge_orig's recipe in loops: first step off, state differences, binarised gripper, last step off."""
    states, commands = steps_state[1:], gripper[1:]
    carry = commands[-1]
    for t in reversed(range(len(commands))):
        carry = 1.0 if commands[t] > 0.95 else 0.0 if commands[t] < 0.05 else carry
        commands[t] = carry
    return [
        [float(states[t + 1][i] - states[t][i]) for i in range(6)] + [commands[t]]
        for t in range(len(states) - 1)
    ]


def test_real_episodes_arrive_with_their_frames_and_decode_within_half_a_bin(real: Path, llava: Path) -> None:
    samples, stats = _samples(llava), read_codec(llava).datasets["bridge_orig"]
    assert len(samples) == 200
    assert (stats.num_transitions, stats.num_trajectories) == (200, 25)
    tree = parse_features((real / "features.json").read_text(), "")
    by_frame = {(llava / "images" / sample["image"]).read_bytes(): sample for sample in samples.values()}
    assert len(by_frame) == 200
    low, high = np.append(stats.q01[:6], 0), np.append(stats.q99[:6], 1)
    half_a_bin = np.append((high - low)[:6] / 512, 1 / 256)
    everything = []
    for payload in _payloads(real / "bridge_dataset-train.tfrecord-00000-of-00001"):
        episode = Episode(payload, tree)
        frames = episode.values(("observation", "image_0"))
        texts = [text.decode() for text in episode.values(("language_instruction",))]
        actions = _recipe(episode.array(("observation", "state")), episode.array(("action",))[:, 6].tolist())
        assert len(actions) == 8
        for step, action in enumerate(actions, start=1):
            sample = by_frame[frames[step]]
            assert sample["step"] == step
            asked = sample["conversations"][0]["value"]
            assert asked.endswith(f"take to {' '.join(texts[step].split()).lower().rstrip('.')}?")
            decoded = codec.decode(codec.text_to_bins(sample["conversations"][1]["value"], 7), stats)[0]
            assert (np.abs(decoded - np.clip(action, low, high)) <= half_a_bin + 1e-7).all()
            everything.append(action)
    assert np.allclose(stats.q01[:6], np.quantile(everything, 0.01, axis=0)[:6], atol=1e-7)
    # Two in a hundred movements lie outside the quantiles, by their definition; more would be a wrong recipe.
    assert max(read_manifest(llava).datasets[0].clipped) <= 0.025


def test_tfds_reads_the_downloaded_real_episodes(llava: Path) -> None:
    pytest.importorskip("tensorflow", reason="needs the extra tf")
    import tensorflow_datasets as tfds

    builder = tfds.builder_from_directory(str(llava.parent / "data/bridge_orig/1.0.0"))
    assert sum(1 for _ in builder.as_dataset(split="train")) == 25


def test_a_model_trains_and_acts_on_real_episodes(llava: Path, tiny_config: Path, tmp_path: Path) -> None:
    config, out = tmp_path / "c.yaml", tmp_path / "run"
    config.write_text(tiny_config.read_text().replace("max_steps: 12", "max_steps: 3"))
    launch = (PYTHON, "-m", "train_llava.launch", "--config", config, "--llava", llava, "--run", out)
    run(*launch, "--nproc", "1")
    image = next((llava / "images").rglob("*.jpg"))
    said = run(
        PYTHON, "inference_action.py", "--checkpoint", out, "--image", image,
        "--instruction", "put the carrot on the plate", cwd=ROOT,
    )  # fmt: skip
    record = json.loads(said.stdout)
    assert record["unnorm_key"] == "bridge_orig"  # the only one: chosen for the user
    assert np.isfinite(record["actions"]).all()
