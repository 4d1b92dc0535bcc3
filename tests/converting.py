"""What the tests of stage 2 share: episodes written record by record, the command, and what it left."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from convert.lines import index_of
from oxe_mix.synth.features import blank as _blank
from oxe_mix.synth.features import feature_tree as _tree
from oxe_mix.synth.features import features as _features
from oxe_mix.synth.frames import black as _black
from oxe_mix.tfrecord import frame
from tests.conftest import OXE_MIX, run


def viola_episode(
    texts: list[str],
    gripper: float = -1.0,
    image: bytes | None = None,
    moves: list[float] | None = None,
    wrist: bytes | None = None,
) -> bytes:
    """A record; `moves`: what the robot is told at each step, in all three directions, else the step's
    number.
    """

    blank = _blank(_tree("viola")["features"]["steps"]["feature"])
    steps = []
    for t, text in enumerate(texts):
        observation = {
            **blank["observation"],
            "agentview_rgb": image or _black(224, 224, "jpeg"),
            "eye_in_hand_rgb": wrist or _black(224, 224, "jpeg"),
            "natural_language_instruction": text,
        }
        action = {**blank["action"], "world_vector": np.full(3, t if moves is None else moves[t], np.float32)}
        action["gripper_closedness_action"] = np.float32(gripper)
        steps.append({**blank, "observation": observation, "action": action})
    payload = _features("viola").serialize_example({"steps": steps})
    assert isinstance(payload, bytes)
    return payload


def viola_folder(folder: Path, bucket: Path, payloads: list[bytes]) -> Path:
    """A viola of one shard with these records, in a data folder without a lock."""
    target = folder / "viola/0.1.0"
    target.mkdir(parents=True)
    shutil.copy(bucket / "viola/0.1.0/features.json", target)
    info = json.loads((bucket / "viola/0.1.0/dataset_info.json").read_text())
    info["splits"] = [
        {"name": "train", "shardLengths": [str(len(payloads))], "numBytes": str(sum(map(len, payloads)))}
    ]
    (target / "dataset_info.json").write_text(json.dumps(info))
    (target / "viola-train.tfrecord-00000-of-00001").write_bytes(b"".join(map(frame, payloads)))
    return folder


def picture(width: int, height: int, kind: str = "JPEG", seed: int = 0) -> bytes:
    """An encoded frame of smooth noise."""
    small = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).save(out, kind)
    return out.getvalue()


def convert(data: Path, out: Path, *more: str, code: int = 0) -> str:
    """Run the command with one worker; returns all that it said."""
    done = run(OXE_MIX, "convert", "--data", data, "--out", out, "--workers", "1", *more, code=code)
    return done.stdout + done.stderr


def lines_of(llava: Path, part: str = "conversations", name: str = "*") -> list[dict[str, Any]]:
    """The samples of a part, in order of their files."""
    files = sorted((llava / part).glob(f"{name}-*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def content_of(folder: Path) -> dict[str, str]:
    """Hashes of everything but the file that holds absolute paths, and the busy mark."""
    skip = (".oxe-mix.busy", "data.yaml", "data_val.yaml")
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.name not in skip]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def edit_line(file: Path, number: int, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a sample of a converted folder, and index and hash with it, so that nothing but the sample is
    wrong.
    """
    lines = file.read_text().splitlines()
    sample = json.loads(lines[number])
    change(sample)
    lines[number] = json.dumps(sample, separators=(",", ":"))
    old = hashlib.sha256(file.read_bytes()).hexdigest()
    file.write_text("".join(f"{line}\n" for line in lines))
    index = np.load(index_of(file))
    ends = np.cumsum([len(line.encode()) + 1 for line in lines])
    index[:, 1], index[:, 0] = ends, [0, *ends[:-1]]
    np.save(index_of(file), index)
    new = hashlib.sha256(file.read_bytes()).hexdigest()
    manifest = file.parent.parent / "manifest.json"
    manifest.write_text(manifest.read_text().replace(old, new))
