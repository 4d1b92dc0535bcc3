"""A small clean dataset in viola's layout, made so that `oxe-mix doctor` finds nothing, and ways to write it.

A test plants exactly one fault into the recordings, or into the files, and looks at what is said.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from oxe_mix.synth.features import blank, feature_tree, save_features, serialize
from oxe_mix.tfrecord import frame

STEPS, EPISODES = 16, 12
WOOD, STEEL = (168, 122, 74), (120, 124, 126)
TASKS = ("put the bowl on the plate", "open the drawer", "push the red mug", "close the lid")


@dataclass
class Recording:
    """One episode as a test may change it, T steps."""

    moves: np.ndarray[Any, Any]  # [T, 6], position and rotation
    closing: np.ndarray[Any, Any]  # [T], 1 closes, -1 opens
    width: np.ndarray[Any, Any]  # [T], of the gripper: follows two steps later
    agent: list[bytes]  # frames of the primary camera
    wrist: list[bytes]
    text: list[str]
    reward: float = 0.0


Plant = Callable[[list[Recording]], object]


def clean() -> list[Recording]:
    """Episodes without a fault."""
    return [_recording(seed) for seed in range(EPISODES)]


def _recording(seed: int) -> Recording:
    rng = np.random.default_rng(seed)
    t = np.arange(STEPS)
    closed = (t >= 5 + seed % 3) & (t < 12)
    return Recording(
        moves=(rng.normal(0, 1, (STEPS, 6)) * [0.02, 0.02, 0.02, 0.1, 0.1, 0.1]).astype(np.float32),
        closing=np.where(closed, 1.0, -1.0).astype(np.float32),
        width=np.where(np.roll(closed, 2), 0.01, 0.08).astype(np.float32),
        agent=[picture(seed, i, 0) for i in range(STEPS)],
        wrist=[picture(seed, i, 1) for i in range(STEPS)],
        text=[TASKS[seed % len(TASKS)]] * STEPS,
    )


@cache
def pixels(seed: int, step: int, camera: int) -> np.ndarray[Any, Any]:
    """A wooden table with a steel arm that moves, and the noise of a sensor."""
    rng = np.random.default_rng([seed, step, camera])
    image = np.full((224, 224, 3), WOOD, np.float64)
    image[: 40 + 20 * camera] = STEEL
    left = (10 + 12 * step + 17 * seed) % 180
    image[70:190, left : left + 40] = STEEL
    image[200:216, 16 * (seed % 12) : 16 * (seed % 12) + 16] = (200, 40, 30)
    return np.clip(image + rng.normal(0, 3, image.shape), 0, 255).astype(np.uint8)


def picture(seed: int, step: int, camera: int, *, swap: bool = False, quality: int = 90) -> bytes:
    """The same as a JPEG; `swap`: red and blue exchanged."""
    shown = pixels(seed, step, camera)
    return jpeg(shown[:, :, ::-1] if swap else shown, quality)


def jpeg(shown: np.ndarray[Any, Any], quality: int = 90) -> bytes:
    """Pixels as a JPEG."""
    out = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(shown)).save(out, "JPEG", quality=quality)
    return out.getvalue()


def payload(recording: Recording) -> bytes:
    """The record that TFDS makes of a recording."""
    below = blank(feature_tree("viola")["features"]["steps"]["feature"])
    steps = []
    for t in range(len(recording.text)):
        observation = {
            **below["observation"],
            "agentview_rgb": recording.agent[t],
            "eye_in_hand_rgb": recording.wrist[t],
            "gripper_states": recording.width[t : t + 1],
            "natural_language_instruction": recording.text[t],
        }
        action = {
            **below["action"],
            "world_vector": recording.moves[t, :3],
            "rotation_delta": recording.moves[t, 3:],
            "gripper_closedness_action": recording.closing[t],
        }
        reward = np.float32(recording.reward)
        steps.append({**below, "observation": observation, "action": action, "reward": reward})
    return serialize("viola", {"steps": steps})


@cache
def _clean_payload(seed: int) -> bytes:
    return payload(_recording(seed))


def write(folder: Path, recordings: Iterable[Recording] | None = None, num_shards: int = 2) -> Path:
    """A data folder that holds these recordings, else the clean ones, as viola, without a lock; one after the
    other goes to the next shard.
    """
    if recordings is None:
        payloads = [_clean_payload(seed) for seed in range(EPISODES)]
    else:
        payloads = [payload(recording) for recording in recordings]
    target = folder / "viola/0.1.0"
    target.mkdir(parents=True)
    save_features("viola", target)
    parts = [payloads[i::num_shards] for i in range(num_shards)]
    for i, part in enumerate(parts):
        name = f"viola-train.tfrecord-{i:05d}-of-{num_shards:05d}"
        (target / name).write_bytes(b"".join(map(frame, part)))
    split = {
        "name": "train",
        "shardLengths": [str(len(part)) for part in parts],
        "numBytes": str(sum(map(len, payloads))),
    }
    info = {"name": "viola", "version": "0.1.0", "fileFormat": "tfrecord", "splits": [split]}
    (target / "dataset_info.json").write_text(json.dumps(info))
    return folder
