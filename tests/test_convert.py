"""Stage 2: right actions, frames as they are, counts that add up, and a result that is whole or absent."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from convert import action_codec as codec
from convert.action_codec import read_codec
from convert.manifest import read_manifest
from convert.prompt import question
from convert.reader import ConversationReader
from oxe_mix.errors import UserError
from oxe_mix.lock import read_lock
from oxe_mix.rlds import Episode, parse_features
from oxe_mix.tfrecord import frame, read_records
from tests.conftest import DATASETS, OXE_MIX, ROOT, run
from tests.converting import content_of, convert, lines_of, viola_episode, viola_folder
from tests.recipes import recorded_actions

GOLDEN = Path(__file__).parent / "golden"


def _samples(llava: Path, name: str) -> dict[str, dict[str, Any]]:
    return {line["id"]: line for part in ("conversations", "val") for line in lines_of(llava, part, name)}


@pytest.mark.parametrize("name", DATASETS)
def test_actions_texts_and_kept_steps_equal_a_second_implementation_on_what_tfds_reads(
    name: str, data: Path, llava: Path
) -> None:
    pytest.importorskip("tensorflow", reason="needs the extra tf")
    import tensorflow_datasets as tfds

    version = next((data / name).iterdir())
    builder = tfds.builder_from_directory(str(version))
    episodes = list(
        tfds.as_numpy(
            builder.as_dataset(split="train", read_config=tfds.ReadConfig(interleave_cycle_length=1))
        )
    )
    stats = read_codec(llava).datasets[name]
    samples = _samples(llava, name)
    expected_ids, everything = set(), []
    places = [
        (shard, i) for shard, n in enumerate(builder.info.splits["train"].shard_lengths) for i in range(n)
    ]
    for (shard, number), episode in zip(places, episodes, strict=True):
        actions, kept, texts = recorded_actions(name, list(episode["steps"]))
        everything += actions
        for action, step, text in zip(actions, kept, texts, strict=True):
            sample = samples[f"{name}/train/{shard}/{number}/{step}"]
            expected_ids.add(sample["id"])
            assert sample["conversations"][0]["value"] == (
                f"<image>\nWhat action should the robot take to {text.lower()}?"
            )
            bins = codec.text_to_bins(sample["conversations"][1]["value"], 7)
            decoded = codec.decode(bins, stats)[0]
            low, high = np.array(stats.q01), np.array(stats.q99)
            low[6], high[6] = 0, 1
            half_a_bin = np.append((high - low)[:6] / 512, 1 / 256)
            assert (np.abs(decoded - np.clip(action, low, high)) <= half_a_bin + 1e-6).all()
    assert expected_ids == set(samples)
    x = np.array(everything)
    assert np.allclose(stats.q01, np.quantile(x, 0.01, axis=0), atol=1e-6)
    assert np.allclose(stats.q99, np.quantile(x, 0.99, axis=0), atol=1e-6)
    assert np.allclose(stats.mean, x.mean(axis=0), atol=1e-6)
    assert (stats.num_transitions, stats.num_trajectories) == (len(x), len(episodes))


def test_every_frame_is_the_records_bytes(data: Path, llava: Path) -> None:
    lock = read_lock(data)
    assert lock is not None
    seen = 0
    from oxe_mix.cards import load_cards

    for dataset in lock.datasets:
        card = load_cards().get(dataset.name)
        folder = data / dataset.folder
        tree = parse_features((folder / "features.json").read_text(), "")
        samples = _samples(llava, dataset.name)
        for index, shard in enumerate(dataset.splits[0].shards):
            with (folder / shard.file).open("rb") as stream:
                for number, record in enumerate(read_records(stream, "")):
                    for step, image in enumerate(Episode(record.payload, tree).values(card.camera_key)):
                        sample = samples.get(f"{dataset.name}/train/{index}/{number}/{step}")
                        if sample is not None:
                            assert (llava / "images" / sample["image"]).read_bytes() == image
                            seen += 1
    assert seen == sum(len(_samples(llava, name)) for name in DATASETS)
    files = [file for file in (llava / "images").rglob("*") if file.is_file()]
    assert len(files) == seen


def test_the_manifest_adds_up_and_hashes_what_is_there(llava: Path) -> None:
    manifest = read_manifest(llava)
    assert manifest.mix == "demo"
    for dataset in manifest.datasets:
        assert dataset.steps.written == len(lines_of(llava, "conversations", dataset.name))
        assert dataset.steps.held_out == len(lines_of(llava, "val", dataset.name)) > 0
        for file in (*dataset.files, *dataset.validation_files):
            assert hashlib.sha256((llava / file.path).read_bytes()).hexdigest() == file.sha256
    bridge = next(d for d in manifest.datasets if d.name == "bridge_orig")
    assert bridge.steps.dropped == {"recipe": 2 * bridge.episodes.total}
    assert sum(d.share for d in manifest.datasets) == pytest.approx(1)
    ids = [line["id"] for part in ("conversations", "val") for line in lines_of(llava, part)]
    assert len(ids) == len(set(ids))


def test_whole_episodes_are_held_out(llava: Path) -> None:
    def episodes(part: str) -> set[str]:
        return {line["id"].rsplit("/", 1)[0] for line in lines_of(llava, part)}

    assert not episodes("conversations") & episodes("val")
    assert {episode.split("/")[0] for episode in episodes("val")} == set(DATASETS)


def test_the_result_is_the_same_bytes_with_one_worker_or_two_and_when_run_again(
    data: Path, llava: Path, tmp_path: Path
) -> None:
    command = (
        OXE_MIX,
        "convert",
        "--data",
        data,
        "--out",
        tmp_path / "again",
        "--val-fraction",
        "0.1",
        "--workers",
    )
    run(*command, "1")
    assert content_of(tmp_path / "again") == content_of(llava)
    run(*command, "2")
    assert content_of(tmp_path / "again") == content_of(llava)


def _num_files(folder: Path) -> int:
    """Files below a folder that another process is writing."""
    return sum(len(files) for _, _, files in os.walk(folder))


def test_killed_at_seeded_moments_and_started_again_the_result_is_the_same(
    data: Path, llava: Path, tmp_path: Path
) -> None:
    out, rng = tmp_path / "killed", random.Random(0)
    command: list[str | Path] = [
        OXE_MIX,
        "convert",
        "--data",
        data,
        "--out",
        out,
        "--val-fraction",
        "0.1",
        "--workers",
        "1",
    ]
    half_done = 0
    for _ in range(4):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        # Kill when so many frames are on disk, under a temporary name or a final one.
        enough = rng.randrange(1, 400)
        while process.poll() is None and _num_files(out / "images") < enough:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        half_done += not (out / "manifest.json").exists() and _num_files(out / "images") > 0
        shutil.rmtree(out / "images")
    assert half_done >= 3
    (out / ".manifest.json.1.tmp").write_text("half a manif")
    run(*command)
    assert content_of(out) == content_of(llava)


def test_data_yaml_is_what_stock_llava_next_loads(llava: Path) -> None:
    """Its loader takes each json_path as it stands, `all` samples, and joins image paths to its image
    folder.
    """
    entries = yaml.safe_load((llava / "data.yaml").read_text())["datasets"]
    assert {entry["sampling_strategy"] for entry in entries} == {"all"}
    lines = [
        json.loads(line) for entry in entries for line in Path(entry["json_path"]).read_text().splitlines()
    ]
    assert len(lines) == read_manifest(llava).num_samples
    for line in lines:
        human, answer = line["conversations"]
        assert (human["from"], answer["from"]) == ("human", "gpt")
        assert human["value"].count("<image>") == 1
        assert (llava / "images" / line["image"]).exists()


def test_a_moved_folder_stays_readable(llava: Path, tmp_path: Path) -> None:
    shutil.copytree(llava, tmp_path / "moved")
    here, moved = ConversationReader(llava, "train"), ConversationReader(tmp_path / "moved", "train")
    assert len(here) == len(moved) == read_manifest(llava).num_samples
    assert [moved[i].id for i in range(len(moved))] == [line["id"] for line in _in_order(llava)]
    assert moved[0].frames[0].file.is_relative_to(tmp_path)
    assert here[len(here) - 1].answer.count("<ACTION_") == 7
    with pytest.raises(IndexError):
        here[len(here)]


def _in_order(llava: Path) -> list[dict[str, Any]]:
    """Training lines in the manifest's order."""
    files = [llava / file.path for dataset in read_manifest(llava).datasets for file in dataset.files]
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def test_without_a_manifest_there_is_no_result(llava: Path, tmp_path: Path) -> None:
    shutil.copytree(llava, tmp_path / "half")
    (tmp_path / "half/manifest.json").unlink()
    with pytest.raises(UserError, match="no finished conversion"):
        ConversationReader(tmp_path / "half", "train")


def test_the_formats_are_the_golden_ones(llava: Path, request: pytest.FixtureRequest) -> None:
    manifest = json.loads((llava / "manifest.json").read_text())
    manifest["lock_sha256"] = "depends on the source's path"
    first = {**manifest["datasets"][0], "image_bytes": "depends on the JPEG encoder", "frames": []}
    text = json.dumps(
        {
            "conversation": _in_order(llava)[0],
            "action_codec.json viola": json.loads((llava / "action_codec.json").read_text())["datasets"][
                "viola"
            ],
            "dataset_statistics.json viola": json.loads((llava / "dataset_statistics.json").read_text())[
                "viola"
            ],
            "manifest.json": {
                **manifest,
                "datasets": [{**first, "files": first["files"][:1], "validation_files": []}],
            },
        },
        indent=1,
    )
    file = GOLDEN / "llava.json"
    if request.config.getoption("--rewrite-golden"):
        file.write_text(text + "\n")
    assert json.loads(file.read_text()) == json.loads(text)


# --- data with faults: a dataset of its own, written record by record ---


def test_an_episode_without_any_instruction_is_dropped_and_counted(bucket: Path, tmp_path: Path) -> None:
    payloads = [
        viola_episode(["", "Push it.", ""]),
        viola_episode(["", " "]),
        viola_episode(["Go", "Come", "Go"]),
    ]
    out = tmp_path / "llava"
    said = convert(viola_folder(tmp_path / "data", bucket, payloads), out)
    assert "no_instruction 2" in said
    asked = [line["conversations"][0]["value"] for line in lines_of(out, "conversations")]
    # Unlabelled steps of a labelled episode stay, with its first instruction.
    assert asked == [question(text) for text in ("push it", "push it", "push it", "go", "come", "go")]
    dataset = read_manifest(out).datasets[0]
    assert dataset.episodes.dropped == {"no_instruction": 1}
    # Statistics are over every step, before anything is dropped.
    assert read_codec(out).datasets["viola"].num_transitions == 8


def test_an_episode_too_short_for_the_recipe_is_dropped_and_counted(bucket: Path, tmp_path: Path) -> None:
    """bridge_orig drops the first and the last step: of one or two steps nothing stays."""
    source = bucket / "bridge_dataset/1.0.0"
    with sorted(source.glob("*-train*"))[0].open("rb") as stream:
        payload = next(read_records(stream, "")).payload
    target = tmp_path / "data/bridge_orig/1.0.0"
    target.mkdir(parents=True)
    shutil.copy(source / "features.json", target)
    payloads = [_first_steps(payload, n) for n in (1, 2, 4)]
    info = json.loads((source / "dataset_info.json").read_text())
    info["splits"] = [{"name": "train", "shardLengths": ["3"], "numBytes": str(sum(map(len, payloads)))}]
    (target / "dataset_info.json").write_text(json.dumps(info))
    (target / "bridge_dataset-train.tfrecord-00000-of-00001").write_bytes(b"".join(map(frame, payloads)))
    convert(tmp_path / "data", tmp_path / "llava")
    dataset = read_manifest(tmp_path / "llava").datasets[0]
    assert dataset.episodes.dropped == {"too_short": 2}
    assert (dataset.steps.total, dataset.steps.written, dataset.steps.dropped) == (7, 2, {"recipe": 5})


def _first_steps(payload: bytes, number: int) -> bytes:
    """An episode cut to its first steps."""
    from tensorflow_datasets.core.example_parser import tf_example_pb2

    example = tf_example_pb2.Example.FromString(payload)
    total = len(example.features.feature["steps/is_first"].int64_list.value)
    for name, feature in example.features.feature.items():
        if name.startswith("steps/"):
            values = getattr(feature, feature.WhichOneof("kind")).value
            del values[len(values) // total * number :]
    return bytes(example.SerializeToString())


@pytest.mark.parametrize("text", [".", " . ", "look at <image> first"])
def test_an_instruction_that_no_prompt_can_hold_counts_as_none(
    bucket: Path, tmp_path: Path, text: str
) -> None:
    data = viola_folder(tmp_path / "data", bucket, [viola_episode([text] * 2), viola_episode(["Go"])])
    assert "no_instruction 2" in convert(data, tmp_path / "llava")


def test_one_dataset_in_two_versions_is_refused_without_a_mix(data: Path, tmp_path: Path) -> None:
    for version in ("0.1.0", "0.2.0"):
        shutil.copytree(data / "viola/0.1.0", tmp_path / "data/viola" / version)
    assert "holds viola more than once" in convert(tmp_path / "data", tmp_path / "llava", code=2)


def test_an_action_that_is_not_finite_ends_the_run_with_its_place(bucket: Path, tmp_path: Path) -> None:
    payloads = [viola_episode(["Go"] * 2), viola_episode(["Go"] * 2, gripper=float("nan"))]
    data = viola_folder(tmp_path / "data", bucket, payloads)
    said = convert(data, tmp_path / "llava", code=1)
    assert re.search(r"00000-of-00001: record 1 at byte \d+: step 0, dimension 6: action is nan", said)
    assert not (tmp_path / "llava/manifest.json").exists()


@pytest.mark.parametrize(
    ("image", "message"),
    [(b"\xff\xd8\xff" + b"x" * 50, "the frame of 53 bytes is cut off"), (b"GIF89a", "neither JPEG nor PNG")],
)
def test_a_broken_frame_ends_the_run_with_its_place(
    bucket: Path, tmp_path: Path, image: bytes, message: str
) -> None:
    data = viola_folder(
        tmp_path / "data", bucket, [viola_episode(["Go"] * 2), viola_episode(["Go"], image=image)]
    )
    said = convert(data, tmp_path / "llava", code=1)
    assert "00000-of-00001: record 1 at byte " in said
    assert message in said


def test_a_shard_that_was_cut_off_is_named(bucket: Path, tmp_path: Path) -> None:
    data = viola_folder(tmp_path / "data", bucket, [viola_episode(["Go"] * 2)])
    shard = next(data.rglob("*.tfrecord-*"))
    shard.write_bytes(shard.read_bytes()[:-5])
    assert f"{shard}: record 0 at byte 0: " in convert(data, tmp_path / "llava", code=1)


def test_converting_into_the_same_folder_leaves_nothing_of_the_earlier_result(
    bucket: Path, tmp_path: Path
) -> None:
    out = tmp_path / "llava"
    convert(viola_folder(tmp_path / "large", bucket, [viola_episode(["Go"] * 4)] * 3), out)
    small = viola_folder(tmp_path / "small", bucket, [viola_episode(["Stay"] * 2)])
    convert(small, out)
    convert(small, tmp_path / "fresh")
    assert content_of(out) == content_of(tmp_path / "fresh")


@pytest.mark.parametrize("name", ["thesis.txt", "val/labels.csv", "images/a/b/c/pic.jpg"])
def test_a_folder_with_other_things_is_left_alone(data: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("mine")
    assert f"holds other things ({name.split('/', 1)[0]})" in convert(data, tmp_path, code=2)
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == [tmp_path / name]


def test_a_run_is_left_alone(data: Path, tmp_path: Path) -> None:
    """Its launcher leaves the same mark of who was busy there as convert does."""
    names = (".oxe-mix.busy", "action_codec.json", "config.json")
    for name in names:
        (tmp_path / name).write_text("{}")
    assert "holds other things" in convert(data, tmp_path, code=2)
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == dict.fromkeys(names, "{}")


def test_a_download_is_not_converted_into_itself(data: Path) -> None:
    before = content_of(data)
    assert "holds a download" in convert(data, data, code=2)
    assert content_of(data) == before


def test_weights_decide_the_share(data: Path, tmp_path: Path) -> None:
    mix = tmp_path / "mix.yaml"
    mix.write_text(
        "name: two\ndatasets:\n- {name: viola, version: 0.1.0, fraction: 1, weight: 3}\n"
        "- {name: kuka, version: 0.1.0, fraction: 1}\n"
    )
    convert(data, tmp_path / "llava", "--mix", str(mix))
    viola, kuka = read_manifest(tmp_path / "llava").datasets
    assert viola.share / kuka.share == pytest.approx(3 * viola.steps.written / kuka.steps.written)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Pick up  the Carrot.", "pick up the carrot"),
        ("ÄPFEL\nholen", "äpfel holen"),
    ],
)
def test_the_question_is_one_line_in_lower_case(text: str, expected: str) -> None:
    assert question(text) == f"<image>\nWhat action should the robot take to {expected}?"


@pytest.mark.parametrize("text", ["", " \n", "look at <image> first"])
def test_an_instruction_that_would_break_the_prompt_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="instruction"):
        question(text)


def test_held_out_episodes_stay_the_same_when_a_mix_grows(bucket: Path, tmp_path: Path) -> None:
    """An episode is held out by its place at the source, which growing does not change."""
    held: list[set[bytes]] = []
    mix = tmp_path / "mix.yaml"
    for fraction in (0.3, 0.6, 1.0):
        mix.write_text(f"name: m\ndatasets:\n- {{name: viola, version: 0.1.0, fraction: {fraction}}}\n")
        data, out = tmp_path / "data", tmp_path / f"llava{fraction}"
        run(OXE_MIX, "download", "--mix", mix, "--source", bucket, "--out", data, "--workers", "1")
        convert(data, out, "--val-fraction", "0.05")
        held.append({(out / "images" / line["image"]).read_bytes() for line in lines_of(out, "val")})
    assert held[0]
    assert held[0] <= held[1] <= held[2]


def test_no_module_imports_tensorflow() -> None:
    packages = ("oxe_mix", "convert", "pipelines", "train_llava")
    files = [file for name in packages for file in (ROOT / name).rglob("*.py")] + [
        ROOT / "inference_action.py"
    ]
    importing = re.compile(r"^\s*(import|from)\s+(tensorflow|keras)\b", re.MULTILINE)
    assert importing.search("    import tensorflow as tf")
    assert not [file for file in files if importing.search(file.read_text())]
