"""Open-X datasets of a realistic weight for the benchmarks: toto's own layout, frames as large as real ones.

toto, because it has one camera and its recipe keeps every step: frames in are frames out, on both sides.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oxe_mix.files import write_json
from oxe_mix.rlds import FEATURES_FILE, INFO_FILE, DatasetInfo, Split
from oxe_mix.synth.features import save_features
from oxe_mix.synth.frames import encode
from oxe_mix.synth.world import sample_scene
from oxe_mix.tfrecord import frame

NAME, VERSION = "toto", "0.1.0"
_SHORTEST, _LONGEST = 40, 120  # steps of an episode; the last one may be longer
_POOL = 128  # distinct frames; episodes walk through them from a random one
_FRAMES_PER_SHARD, _MIN_SHARDS = 4_000, 16
_EMBEDDING = 512


@dataclass(frozen=True, slots=True)
class Camera:
    """How the frames of a dataset are stored."""

    encoding: str  # jpeg or png
    height: int = 256
    width: int = 256

    @property
    def name(self) -> str:
        """For folders: `jpeg-256x256`."""
        return f"{self.encoding}-{self.height}x{self.width}"


@dataclass(frozen=True, slots=True)
class _Shard:
    camera: Camera
    file: Path
    seed: int
    lengths: tuple[int, ...]  # steps of each episode


def make_dataset(root: Path, camera: Camera, num_frames: int) -> Path:
    """Write a data folder with one dataset of exactly that many frames, the same bytes each time; returns
    the dataset's own folder.
    """
    folder = root / NAME / VERSION
    folder.mkdir(parents=True)
    lengths = _lengths(num_frames)
    num_shards = min(len(lengths), max(_MIN_SHARDS, num_frames // _FRAMES_PER_SHARD))
    info = DatasetInfo(NAME, VERSION, {}, {"name": NAME, "version": VERSION, "fileFormat": "tfrecord"})
    shards = [
        _Shard(camera, folder / info.shard_file("train", i, num_shards), i, tuple(lengths[i::num_shards]))
        for i in range(num_shards)
    ]
    _pool(camera)  # once, before the processes that use it are forked
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        num_bytes = sum(pool.map(_write_shard, shards))
    split = Split("train", tuple(len(shard.lengths) for shard in shards), num_bytes)
    write_json(folder / INFO_FILE, info.with_splits([split]))
    _save_features(camera, folder)
    return folder


def _lengths(num_frames: int) -> list[int]:
    rng = np.random.default_rng(0)
    lengths, left = [], num_frames
    while left:
        length = int(rng.integers(_SHORTEST, _LONGEST, endpoint=True))
        lengths.append(left if left - length < _SHORTEST else length)
        left -= lengths[-1]
    return lengths


def _save_features(camera: Camera, folder: Path) -> None:
    """toto's features.json with this camera's frames in it."""
    save_features(NAME, folder)
    tree = json.loads((folder / FEATURES_FILE).read_text())
    node = tree
    for name in ("steps", "observation", "image"):
        node = node["featuresDict"]["features"][name]
        node = node["sequence"]["feature"] if "sequence" in node else node
    node["image"] |= {
        "shape": {"dimensions": [str(side) for side in (camera.height, camera.width, 3)]},
        "encodingFormat": camera.encoding,
    }
    write_json(folder / FEATURES_FILE, tree)


def _write_shard(shard: _Shard) -> int:
    """Returns the bytes of its payloads."""
    rng = np.random.default_rng([1, shard.seed])
    pool, num_bytes = _pool(shard.camera), 0
    with shard.file.open("wb") as stream:
        for length in shard.lengths:
            payload = _episode(rng, length, pool)
            stream.write(frame(payload))
            num_bytes += len(payload)
    return num_bytes


def _episode(rng: np.random.Generator, length: int, pool: Sequence[bytes]) -> bytes:
    """One record. Written column by column: TFDS's own serializer would take most of the benchmark's time."""
    from tensorflow_datasets.core.example_parser import tf_example_pb2

    first, last = np.arange(length) == 0, np.arange(length) == length - 1
    start = int(rng.integers(len(pool)))
    columns: dict[str, Any] = {
        "action/open_gripper": rng.random(length) < 0.5,
        "action/rotation_delta": rng.normal(0, 0.05, 3 * length),
        "action/terminate_episode": last.astype(np.float32),
        "action/world_vector": rng.normal(0, 0.02, 3 * length),
        "is_first": first,
        "is_last": last,
        "is_terminal": last,
        "observation/image": [pool[(start + t) % len(pool)] for t in range(length)],
        "observation/natural_language_embedding": np.tile(rng.normal(0, 0.05, _EMBEDDING), length),
        "observation/natural_language_instruction": [sample_scene(rng).instruction.encode()] * length,
        "observation/state": rng.normal(0, 1, 7 * length),
        "reward": last.astype(np.float32),
    }
    example = tf_example_pb2.Example()
    for name, values in columns.items():
        feature = example.features.feature[f"steps/{name}"]
        if isinstance(values, list):
            feature.bytes_list.value.extend(values)
        elif values.dtype == np.bool_:
            feature.int64_list.value.extend(values.tolist())
        else:
            feature.float_list.value.extend(values.tolist())
    record: bytes = example.SerializeToString(deterministic=True)
    return record


@cache
def _pool(camera: Camera) -> tuple[bytes, ...]:
    from PIL import Image

    rng = np.random.default_rng(2)
    return tuple(encode(Image.fromarray(_picture(rng, camera)), camera.encoding) for _ in range(_POOL))


def _picture(rng: np.random.Generator, camera: Camera) -> NDArray[np.uint8]:
    """Light that falls off, things with edges, texture and sensor noise: about what a real frame weighs."""
    from PIL import Image, ImageDraw

    size = (camera.width, camera.height)

    def noise(cells: int, amplitude: float) -> NDArray[np.floating[Any]]:
        grid = rng.integers(0, 256, (cells * camera.height // camera.width, cells, 3), np.uint8)
        smooth = Image.fromarray(grid).resize(size, Image.Resampling.BICUBIC)
        return (np.asarray(smooth, np.float32) - 128) / 128 * amplitude

    things = Image.fromarray(np.clip(128 + noise(4, 90), 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(things)
    for _ in range(12):
        x, y = (int(rng.integers(side)) for side in size)
        box = (x, y, x + int(rng.integers(10, size[0] // 3)), y + int(rng.integers(10, size[1] // 3)))
        (draw.ellipse if rng.random() < 0.5 else draw.rectangle)(box, tuple(rng.integers(0, 256, 3).tolist()))
    texture = noise(camera.width // 4, 12) + rng.normal(0, 4, (camera.height, camera.width, 3))
    return np.clip(np.asarray(things, np.float32) + texture, 0, 255).astype(np.uint8)
