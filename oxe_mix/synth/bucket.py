"""`oxe-mix synth`: an Open-X bucket of our own, written with TFDS's own features, the same bytes for the same
seed.
"""

from __future__ import annotations

import io
import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from oxe_mix.cards import SHIPPED, load_card
from oxe_mix.errors import UserError
from oxe_mix.files import atomic_write, write_json
from oxe_mix.rlds import FEATURES_FILE, INFO_FILE, DatasetInfo, Split
from oxe_mix.synth.robots import ROBOTS, Robot, Step, motions
from oxe_mix.synth.world import draw, sample_scene, walk
from oxe_mix.text import count, say, size
from oxe_mix.tfrecord import FRAME_BYTES, frame

# The feature trees as TFDS's catalogue and builders give them; see each card's sources.
TREES = Path(__file__).parent.parent / "trees"
SHARDS_PER_SPLIT = 5
_OTHER_SPLIT_SHARE = 0.1
_DONE = "synth.json"


@dataclass(frozen=True, slots=True)
class _Shard:
    robot: int  # place in ROBOTS
    split: str
    index: int
    num_shards: int
    episodes: range
    seed: int
    out: Path


def run_synth(out: Path, episodes: int, seed: int, workers: int | None) -> int:
    """Make a bucket of `episodes` training episodes in all; returns the exit code.

    Raises: UserError when the folder holds something else, or the same with other settings.
    """
    settings = {"episodes": episodes, "seed": seed}
    if out.exists() and any(out.iterdir()):
        if (out / _DONE).exists() and json.loads((out / _DONE).read_text())["settings"] == settings:
            say(f"{out}: already made with these settings; nothing to do")
            return 0
        raise UserError(f"{out}: not empty, and not this bucket; delete it or choose another --out")
    shards = [shard for robot in range(len(ROBOTS)) for shard in _shards(robot, episodes, seed, out)]
    with ProcessPoolExecutor(workers) as pool:
        written = dict(zip(shards, pool.map(_write_shard, shards), strict=True))
    for index, robot in enumerate(ROBOTS):
        _write_metadata(robot, {shard: done for shard, done in written.items() if shard.robot == index}, out)
    steps = sum(done[1] for done in written.values())
    num_bytes = sum(done[0] for done in written.values())
    write_json(out / _DONE, {"settings": settings, "steps": steps, "bytes": num_bytes})
    made = sum(len(shard.episodes) for shard in shards)
    say(
        f"asked {count(episodes, 'training episode')}, made {made:,} in all of {len(ROBOTS)} datasets: "
        f"{count(steps, 'step')}, {size(num_bytes)}\n"
        f"result: {out}\nnext: oxe-mix download --mix demo.yaml --source {out}"
    )
    return 0


def _shards(index: int, episodes: int, seed: int, out: Path) -> list[_Shard]:
    robot = ROBOTS[index]
    num_train = max(SHARDS_PER_SPLIT, round(robot.share * episodes))
    ranges = {"train": range(num_train)}
    if robot.other_split:
        ranges[robot.other_split] = range(
            num_train, num_train + max(2, round(_OTHER_SPLIT_SHARE * num_train))
        )
    shards = []
    for split, numbers in ranges.items():
        num_shards = SHARDS_PER_SPLIT if split == "train" else 2
        # Shards of unequal length, as in the bucket.
        cuts = [numbers.start + round(len(numbers) * (i / num_shards) ** 1.1) for i in range(num_shards + 1)]
        parts = [range(a, b) for a, b in pairwise(cuts)]
        shards += [_Shard(index, split, i, num_shards, part, seed, out) for i, part in enumerate(parts)]
    return shards


def _write_shard(shard: _Shard) -> tuple[int, int]:
    """Write one shard; returns its payload bytes and steps."""
    robot, num_bytes, num_steps = ROBOTS[shard.robot], 0, 0
    info = _info(robot)
    file = _folder(robot, shard.out) / info.shard_file(shard.split, shard.index, shard.num_shards)
    with atomic_write(file) as stream:
        for episode in shard.episodes:
            example = _example(robot, np.random.default_rng([shard.seed, shard.robot, episode]), episode)
            payload = _same_bytes(_features(robot.name).serialize_example(example))
            stream.write(frame(payload))
            num_bytes += len(payload)
            num_steps += len(example["steps"])
    return num_bytes, num_steps


def _same_bytes(payload: bytes) -> bytes:
    """The same Example with its features in a fixed order: protobuf leaves the order of a map open."""
    from tensorflow_datasets.core.example_parser import tf_example_pb2

    fixed: bytes = tf_example_pb2.Example.FromString(payload).SerializeToString(deterministic=True)
    return fixed


def _example(robot: Robot, rng: np.random.Generator, episode: int) -> dict[str, Any]:
    """One episode as TFDS takes it: what the robot writes, laid over zeros for everything else in the
    tree.
    """
    tree = _tree(robot.name)["features"]
    scene = sample_scene(rng)
    steps = robot.write(robot, motions(walk(scene)), scene.instruction)
    blank = _blank(tree["steps"]["feature"])
    cameras = tree["steps"]["feature"]["features"]["observation"]["features"]
    out = []
    for t, step in enumerate(steps):
        pose = step.pop("frame")
        for name, shows in robot.cameras.items():
            height, width, _ = cameras[name]["shape"]
            view = (
                _encode(draw(scene, pose, width, height, robot.table), cameras[name])
                if shows == "table"
                else None
            )
            step.setdefault("observation", {})[name] = view or _black(
                width, height, cameras[name]["encoding"]
            )
        step |= {"is_first": t == 0, "is_last": t == len(steps) - 1, "is_terminal": t == len(steps) - 1}
        step |= {"reward": np.float32(t == len(steps) - 1)}
        out.append(_overlay(blank, step))
    top = _blank({"kind": "dict", "features": {k: v for k, v in tree.items() if k != "steps"}})
    return {**_overlay(top, _episode_fields(robot, tree, episode)), "steps": out}


def _episode_fields(robot: Robot, tree: dict[str, Any], episode: int) -> Step:
    fields: Step = {}
    if "success" in tree:
        fields["success"] = True
    if "episode_id" in tree:
        fields["episode_id"] = f"{robot.name}_{episode}"
    if robot.name == "bridge_orig":
        fields["episode_metadata"] = {"episode_id": episode, "has_image_0": True, "has_language": True}
    return fields


def _blank(node: dict[str, Any]) -> Any:
    """Zeros, empty texts and False for everything below a node of a feature tree; frames are left to the
    caller.
    """
    match node["kind"]:
        case "dict":
            return {name: _blank(child) for name, child in node["features"].items()}
        case "text":
            return ""
        case "scalar" | "tensor" if node["dtype"] == "string":
            return ""
        case "scalar" | "tensor":
            return np.zeros(node.get("shape", ()), node["dtype"])
        case _:
            return None


def _overlay(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`above` laid over `below`. Raises: KeyError for a key that the tree does not have."""
    merged = dict(below)
    for key, value in above.items():
        merged[key] = _overlay(below[key], value) if isinstance(below[key], dict) else value
    return merged


def _encode(image: Any, feature: dict[str, Any]) -> bytes:
    out = io.BytesIO()
    if feature["encoding"] == "png":
        image.save(out, "PNG", compress_level=1)
    else:
        image.save(out, "JPEG", quality=90)
    return out.getvalue()


@cache
def _black(width: int, height: int, encoding: str) -> bytes:
    from PIL import Image

    return _encode(Image.new("RGB", (width, height)), {"encoding": encoding})


@cache
def _tree(name: str) -> dict[str, Any]:
    tree: dict[str, Any] = json.loads((TREES / f"{name}.json").read_text())
    return tree


@cache
def _features(name: str) -> Any:
    """The tree as TFDS's own FeaturesDict."""
    return _tfds_feature(_tree(name))


def _tfds_feature(node: dict[str, Any]) -> Any:
    import tensorflow_datasets as tfds

    match node["kind"]:
        case "dict":
            return tfds.features.FeaturesDict(
                {name: _tfds_feature(child) for name, child in node["features"].items()}
            )
        case "dataset":
            return tfds.features.Dataset(_tfds_feature(node["feature"]))
        case "image":
            # An encoding that no source states is taken for JPEG.
            encoding = "png" if node["encoding"] == "png" else "jpeg"
            return tfds.features.Image(shape=tuple(node["shape"]), dtype=np.uint8, encoding_format=encoding)
        case "text":
            return tfds.features.Text()
        case "scalar":
            return tfds.features.Scalar(_dtype(node))
        case "tensor":
            encoding = node["encoding"] if node["encoding"] == "zlib" else "none"
            return tfds.features.Tensor(shape=tuple(node["shape"]), dtype=_dtype(node), encoding=encoding)
        case kind:
            raise ValueError(f"unknown node {kind}")


def _dtype(node: dict[str, Any]) -> Any:
    return np.str_ if node["dtype"] == "string" else np.dtype(node["dtype"])


def _write_metadata(robot: Robot, written: dict[_Shard, tuple[int, int]], out: Path) -> None:
    splits = []
    for name in dict.fromkeys(shard.split for shard in written):
        own = {shard: done for shard, done in written.items() if shard.split == name}
        splits.append(
            Split(name, tuple(len(shard.episodes) for shard in own), sum(done[0] for done in own.values()))
        )
    folder = _folder(robot, out)
    _features(robot.name).save_config(str(folder))
    assert (folder / FEATURES_FILE).exists()
    write_json(folder / INFO_FILE, _info(robot).with_splits(splits))
    file_bytes = sum(done[0] + FRAME_BYTES * len(shard.episodes) for shard, done in written.items())
    assert file_bytes == sum(file.stat().st_size for file in folder.glob("*.tfrecord-*"))


def _info(robot: Robot) -> DatasetInfo:
    card = load_card(SHIPPED / f"{robot.name}.yaml")
    # bridge_orig's own release is called bridge_dataset, in its files as well as its folder.
    name = card.names[-1]
    raw = {
        "citation": "",
        "description": "A synthetic world in the true layout of this dataset, made by oxe-mix synth.",
        "fileFormat": "tfrecord",
        "moduleName": "oxe_mix.synth",
        "name": name,
        "releaseNotes": {card.version: "Synthetic."},
        "version": card.version,
    }
    return DatasetInfo(name, card.version, {}, raw)


def _folder(robot: Robot, out: Path) -> Path:
    card = load_card(SHIPPED / f"{robot.name}.yaml")
    return out / card.names[-1] / card.version
