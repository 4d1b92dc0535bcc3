"""What it costs to decode and encode a frame with the codecs one could take, and what they make of damaged
frames.

python -m benchmarks.codecs [SECONDS]   writes benchmarks/results/DATE-codecs.json

Pillow, simplejpeg and what `oxe_mix/images.py` makes of them; OpenCV, too, where it is installed, which it
need not be. Codecs take turns in every round, so that none has the quieter machine.
"""

from __future__ import annotations

import io
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image

from benchmarks.results import write_result
from benchmarks.rlds_maker import Camera
from benchmarks.rlds_maker import _pool as frames_of
from oxe_mix.images import FrameChange, decode, frame_info, reencode, shrunk
from oxe_mix.text import say, table

_ROUNDS, _FRAMES, _QUALITY, _SIDE = 7, 32, 95, 256
_SIZES = ((256, 256), (480, 640))
_HAS_OPENCV = find_spec("cv2") is not None
_PACKAGES = (
    "pillow",
    "simplejpeg",
    "pyspng-seunglab",
    "numpy",
    *(("opencv-python-headless",) if _HAS_OPENCV else ()),
)

Codec = Callable[[bytes], Any]


def main() -> None:
    """Measure all of it, print it and write the result."""
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 0.25
    costs: dict[str, dict[str, float]] = {}
    for height, width in _SIZES:
        for encoding in ("jpeg", "png"):
            frames = frames_of(Camera(encoding, height, width))[:_FRAMES]
            where = f"{encoding} {height}x{width}"
            for task, codecs in _tasks(encoding, height).items():
                costs[f"{where}: {task}"] = _compare(codecs, frames, seconds)
    damage = _damage()
    rows = [(task, codec, f"{us:,.1f}") for task, own in costs.items() for codec, us in own.items()]
    say(table(("task", "codec", "us a frame"), rows))
    rows = [(what, codec, f"{share:.0%}") for what, own in damage.items() for codec, share in own.items()]
    say("\n" + table(("damaged frames", "codec", "refused"), rows))
    figures = {"us_per_frame": costs, "share_of_damaged_frames_refused": damage}
    say(f"result: {write_result('codecs', _PACKAGES, figures)}")


def _tasks(encoding: str, height: int) -> dict[str, dict[str, Codec]]:
    """What is compared for frames of an encoding: by task and codec, each from encoded bytes."""
    cv = _opencv() if _HAS_OPENCV else {}
    if encoding == "jpeg":
        decoders: dict[str, Codec] = {"pillow": _pillow, "simplejpeg": decode, **_only(cv, "decode")}
    else:
        decoders = {"pillow": decode, **_only(cv, "decode")}
    ways: dict[str, dict[str, Codec]] = {"prove whole": {"frame_info": frame_info}, "decode": decoders}
    if encoding == "png":
        ways[f"to JPEG {_QUALITY}"] = {
            "pillow": _pillow_again,
            "images.reencode": partial(reencode, change=FrameChange(jpeg_quality=_QUALITY)),
            **_only(cv, "to JPEG"),
        }
    if height > _SIDE:
        ways[f"to {_SIDE} pixels"] = {
            "pillow": partial(_pillow_again, kind=encoding, max_side=_SIDE),
            "images.reencode": partial(reencode, change=FrameChange(max_side=_SIDE)),
        }
    return ways


def _only(codecs: dict[str, Codec], task: str) -> dict[str, Codec]:
    return {"opencv": codecs[task]} if task in codecs else {}


def _pillow(frame: bytes) -> Any:
    return np.asarray(Image.open(io.BytesIO(frame)).convert("RGB"))


def _pillow_again(frame: bytes, kind: str = "jpeg", max_side: int | None = None) -> bytes:
    """What most scripts do, with Pillow throughout."""
    image: Image.Image = Image.open(io.BytesIO(frame))
    image = image.convert("RGB")
    if max_side is not None:
        image = image.resize(shrunk(*image.size, max_side), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    if kind == "png":
        image.save(out, "PNG")
    else:
        image.save(out, "JPEG", quality=_QUALITY, subsampling=0)
    return out.getvalue()


def _opencv() -> dict[str, Codec]:
    """Not for resizing: its Lanczos does not smooth what it shrinks, so it makes another picture."""
    cv2: Any = import_module("cv2")  # installed or not, mypy need not know it
    cv2.setNumThreads(1)
    options = [
        cv2.IMWRITE_JPEG_QUALITY,
        _QUALITY,
        cv2.IMWRITE_JPEG_SAMPLING_FACTOR,
        cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444,
    ]

    def pixels(frame: bytes) -> Any:
        found = cv2.imdecode(np.frombuffer(frame, np.uint8), cv2.IMREAD_COLOR)
        if found is None:
            raise ValueError("not decoded")
        return found

    return {"decode": pixels, "to JPEG": lambda frame: cv2.imencode(".jpg", pixels(frame), options)[1]}


def _compare(codecs: dict[str, Codec], frames: Sequence[bytes], seconds: float) -> dict[str, float]:
    """Median microseconds a frame of each codec, over rounds of so many seconds."""
    rounds: dict[str, list[float]] = {name: [] for name in codecs}
    for _ in range(_ROUNDS):
        for name, codec in codecs.items():
            done, start = 0, time.perf_counter()
            while (spent := time.perf_counter() - start) < seconds:
                for frame in frames:
                    codec(frame)
                done += len(frames)
            rounds[name].append(spent / done * 1e6)
    return {name: round(statistics.median(own), 1) for name, own in rounds.items()}


def _damage() -> dict[str, dict[str, float]]:
    """Which share of damaged JPEGs a decoder refuses; what it does not refuse it fills in by guessing."""
    frames = frames_of(Camera("jpeg"))
    damages: dict[str, Callable[[bytes, int], bytes]] = {
        "cut at a random place": lambda frame, at: frame[:at],
        "40 zeros, end in place": lambda frame, at: frame[:at] + bytes(40) + frame[at + 40 :],
        "a sector of zeros, end in place": lambda frame, at: frame[:at] + bytes(512) + frame[at + 512 :],
        "one bit": lambda frame, at: frame[:at] + bytes([frame[at] ^ 8]) + frame[at + 1 :],
    }
    decoders: dict[str, Codec] = {
        "pillow": _pillow,
        "simplejpeg, strict": decode,
        "simplejpeg, not strict": partial(simplejpeg.decode_jpeg, strict=False),
        **(_only(_opencv(), "decode") if _HAS_OPENCV else {}),
    }
    return {
        what: {
            name: _refused(
                [damage(frame, at) for frame, at in zip(frames, _places(frames), strict=True)], codec
            )
            for name, codec in decoders.items()
        }
        for what, damage in damages.items()
    }


def _places(frames: Sequence[bytes]) -> list[int]:
    """Behind the headers, and not the last sector."""
    rng = np.random.default_rng(3)
    return [int(rng.integers(700, len(frame) - 520)) for frame in frames]


def _refused(frames: Sequence[bytes], codec: Codec) -> float:
    refused = 0
    for frame in frames:
        try:
            codec(frame)
        except (ValueError, OSError):
            refused += 1
    return refused / len(frames)


if __name__ == "__main__":
    main()
