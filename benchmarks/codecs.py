"""What it costs to decode and encode one frame, by library: why frames that must change go through these.

python -m benchmarks.codecs   writes benchmarks/results/DATE-codecs.json
"""

from __future__ import annotations

import io
import timeit
from collections.abc import Callable

import numpy as np
import pyspng
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from benchmarks.results import write_result
from oxe_mix.images import FrameChange, reencode
from oxe_mix.text import say, table

_SIZES = ((256, 256), (640, 480))
_ROUNDS, _CALLS = 5, 40


def main() -> None:
    """Measure every step for frames of two sizes, in milliseconds: the fastest of some rounds."""
    figures = {f"{width}x{height}": _figures(width, height) for width, height in _SIZES}
    names = list(next(iter(figures.values())))
    rows = [(name, *(f"{own[name]:.2f}" for own in figures.values())) for name in names]
    say(table(("milliseconds a frame, one core", *figures), rows))
    say(f"result: {write_result('codecs', ('pillow', 'simplejpeg', 'numpy'), {'milliseconds': figures})}")


def _figures(width: int, height: int) -> dict[str, float]:
    pixels = _picture(width, height)
    image = Image.fromarray(pixels)
    png, jpeg = _saved(image, "PNG"), _saved(image, "JPEG")
    small = (256, 256 * height // width)
    work: dict[str, Callable[[], object]] = {
        "decode PNG, Pillow": lambda: np.asarray(Image.open(io.BytesIO(png)).convert("RGB")),
        "decode PNG, spng": lambda: pyspng.load(png),
        "decode JPEG, Pillow": lambda: np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB")),
        "decode JPEG, simplejpeg": lambda: simplejpeg.decode_jpeg(jpeg, "RGB"),
        "encode JPEG 95, Pillow": lambda: _saved(image, "JPEG"),
        "encode JPEG 95, simplejpeg": lambda: simplejpeg.encode_jpeg(
            pixels, quality=95, colorspace="RGB", colorsubsampling="444"
        ),
        "Lanczos to 256, Pillow": lambda: image.resize(small, Image.Resampling.LANCZOS),
        "ours: PNG to JPEG 95": lambda: reencode(png, FrameChange(jpeg_quality=95)),
        "ours: JPEG to 128": lambda: reencode(jpeg, FrameChange(max_side=128)),
    }
    return {name: round(_milliseconds(one), 3) for name, one in work.items()}


def _milliseconds(work: Callable[[], object]) -> float:
    return min(timeit.repeat(work, number=_CALLS, repeat=_ROUNDS)) / _CALLS * 1000


def _picture(width: int, height: int) -> NDArray[np.uint8]:
    """Smooth colours and some noise, so that sizes are those of a camera's frames."""
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (height // 16, width // 16, 3), np.uint8))
    smooth = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC), np.int64)
    noise = rng.integers(-12, 13, (height, width, 3))
    pixels: NDArray[np.uint8] = np.clip(smooth + noise, 0, 255).astype(np.uint8)
    return pixels


def _saved(image: Image.Image, kind: str) -> bytes:
    out = io.BytesIO()
    options = {"quality": 95, "subsampling": 0} if kind == "JPEG" else {}
    image.save(out, kind, **options)
    return out.getvalue()


if __name__ == "__main__":
    main()
