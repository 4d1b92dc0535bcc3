"""What `oxe-mix convert` is measured against: the script that people write. One process, TFDS and TensorFlow
decode every frame, Pillow encodes it again, and one JSON list is written at the end.

python -m benchmarks.usual_way DATASET OUT [LONGER_SIDE]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from oxe_mix.text import say

_QUALITY = 75


def main() -> None:
    """Convert one dataset; prints the number of frames."""
    import tensorflow_datasets as tfds

    data, out = sys.argv[1:3]
    longer_side = int(sys.argv[3]) if len(sys.argv) > 3 else None
    images = Path(out) / "images"
    images.mkdir(parents=True)
    samples = []
    for number, episode in enumerate(tfds.as_numpy(tfds.builder_from_directory(data).as_dataset("train"))):
        for t, step in enumerate(episode["steps"]):
            name = f"{number}_{t}.jpg"
            _resized(Image.fromarray(step["observation"]["image"]), longer_side).save(
                images / name, quality=_QUALITY
            )
            samples.append(_sample(name, step))
    (Path(out) / "conversations.json").write_text(json.dumps(samples))
    say(str(len(samples)))


def _resized(image: Image.Image, longer_side: int | None) -> Image.Image:
    if longer_side is None:
        return image
    scale = longer_side / max(image.size)
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)


def _sample(name: str, step: dict[str, Any]) -> dict[str, Any]:
    action, text = step["action"], step["observation"]["natural_language_instruction"].decode()
    numbers = np.concatenate([action["world_vector"], action["rotation_delta"], [action["open_gripper"]]])
    return {
        "id": name,
        "image": name,
        "conversations": [
            {"from": "human", "value": f"<image>\nWhat action should the robot take to {text}?"},
            {"from": "gpt", "value": " ".join(f"{number:.4f}" for number in numbers)},
        ],
    }


if __name__ == "__main__":
    main()
