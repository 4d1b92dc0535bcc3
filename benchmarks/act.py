"""How fast a robot gets its actions, on a CPU: our decoder, token by token and in one pass, beside
`generate` with anyres_max_9 over the same weights, in turns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.acting_models import NARROW, WIDE, Ours, Usual
from benchmarks.gpu_model import Shape
from benchmarks.results import write_result
from oxe_mix.text import say, table
from train_llava.acting.policy import Latency
from train_llava.quiet import quiet_libraries

_CHUNK = 8
_SIZES = {"256x256": (256, 256), "480x640": (480, 640)}  # height x width of the cameras' frames
_PACKAGES = ("torch", "transformers", "numpy", "pillow")
Answer = Callable[[Image.Image], Latency]


def main() -> None:
    """Measure, print and record."""
    quiet_libraries()
    shapes = (NARROW, WIDE)
    figures = {shape.name: measure(shape, torch.device("cpu"), torch.float32, rounds=20) for shape in shapes}
    say(f"result: {write_result('act-cpu', _PACKAGES, figures)}")


def measure(shape: Shape, device: torch.device, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """p50 and p95 of each part, ms, and actions/s by the median of the whole."""
    ours = Ours(shape, device, dtype)
    parallel = Ours(shape, device, dtype, _CHUNK)
    asked: dict[str, tuple[Answer, int]] = {
        "generate, anyres_max_9": (Usual(ours).answer, 1),
        "token by token": (ours.answer, 1),
        f"one pass, chunk {_CHUNK}": (parallel.answer, _CHUNK),
    }
    weights = sum(weight.numel() for weight in ours.model.parameters())
    say(f"\n{shape.name}: {weights / 1e6:.1f} M weights")
    found: dict[str, Any] = {"weights": weights, "device": str(device), "dtype": str(dtype), "rounds": rounds}
    for name, (height, width) in _SIZES.items():
        pixels = np.random.default_rng(0).integers(0, 256, (rounds + 2, height, width, 3), np.uint8)
        spent: dict[str, list[Latency]] = {way: [] for way in asked}
        for number, image in enumerate(map(Image.fromarray, pixels)):
            for way, (answer, _) in asked.items():
                took = answer(image)
                if number >= 2:  # the first two warm up
                    spent[way].append(took)
        found[name] = {way: _figures(spent[way], actions) for way, (_, actions) in asked.items()}
        say(_shown(name, found[name]))
    return found


def _figures(spent: list[Latency], actions: int) -> dict[str, Any]:
    parts = {
        part: [getattr(one, part) for one in spent] for part in ("preprocess", "prefill", "decode", "total")
    }
    spread = {
        part: {f"p{share}": round(float(np.percentile(ms, share)), 2) for share in (50, 95)}
        for part, ms in parts.items()
    }
    return {"ms": spread, "actions_per_s": round(1000 * actions / spread["total"]["p50"], 3)}


def _shown(name: str, found: dict[str, Any]) -> str:
    first = next(iter(found.values()))["actions_per_s"]
    rows = [
        (
            way,
            *(f"{own['ms'][part]['p50']:.0f} / {own['ms'][part]['p95']:.0f}" for part in own["ms"]),
            f"{own['actions_per_s']:.2f}",
            f"{own['actions_per_s'] / first:.1f}",
        )
        for way, own in found.items()
    ]
    header = ("ms p50 / p95", "preprocess", "prefill", "decode", "total", "actions/s", "x")
    return f"\nframes of {name}\n{table(header, rows)}"


if __name__ == "__main__":
    main()
