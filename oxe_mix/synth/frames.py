"""Encoded frames: any image, black ones for missing cameras, and coloured ones that cost little."""

from __future__ import annotations

import io
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from oxe_mix.synth.features import Node, image_encoding

if TYPE_CHECKING:
    from PIL.Image import Image

# None is a grey and none is nearly the same with red and blue exchanged: a flip of the channels shows.
COLORS = ((210, 60, 30), (30, 120, 220), (220, 190, 40), (40, 170, 230))
PLACES = 4  # of the block in a coloured frame, from left to right
_UNKNOWN_SIDE = 64  # pixels, where the tree leaves a side open
# One shade of depth: 0.25 m, in the units of each way to store it.
_SHADE = {"uint8": 20, "uint16": 250, "float32": 0.25}


def encode(image: Image, encoding: str) -> bytes:
    """The image as a PNG or JPEG file. PNG is packed lightly, for speed."""
    out = io.BytesIO()
    if encoding == "png":
        image.save(out, "PNG", compress_level=1)
    else:
        image.save(out, "JPEG", quality=90)
    return out.getvalue()


@cache
def black(width: int, height: int, encoding: str) -> bytes:
    """What a missing camera shows."""
    from PIL import Image

    return encode(Image.new("RGB", (width, height)), encoding)


def coloured(node: Node, hue: int, step: int) -> bytes:
    """A frame as an image node of a feature tree wants it: a flat colour, or depth, with a block that moves
    by the step.
    """
    return _coloured(tuple(node["shape"]), node["dtype"], image_encoding(node), hue, step % PLACES)


@cache
def _coloured(shape: tuple[int | None, ...], dtype: str, encoding: str, hue: int, place: int) -> bytes:
    from PIL import Image

    pixels = _pixels(tuple(side or _UNKNOWN_SIDE for side in shape), dtype, hue, place)
    if dtype == "float32":  # TFDS stores the four bytes of a float as the four channels of a PNG
        pixels = pixels.view(np.uint8)
    return encode(Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels), encoding)


def _pixels(shape: tuple[int, ...], dtype: str, hue: int, place: int) -> NDArray[Any]:
    height, width, channels = shape
    ground: Any = COLORS[hue] if channels == 3 else _SHADE[dtype] * (hue + 2)
    block: Any = COLORS[(hue + 1) % len(COLORS)] if channels == 3 else _SHADE[dtype]
    pixels = np.empty(shape, dtype)
    pixels[:] = ground
    left = place * width // PLACES
    pixels[height // 4 : height // 2, left : left + width // PLACES] = block
    return pixels
