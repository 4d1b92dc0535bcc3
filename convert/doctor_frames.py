"""What `oxe-mix doctor` keeps of a camera's frames: a few numbers each. Every frame's bytes are marked, and
every few of them are decoded, once and small.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from oxe_mix.images import check_frame, decode, opened

SIDE = 32  # pixels of the small picture: what is looked at
NUM_HUES = 24
_MOST_DECODED = 100  # frames of one camera of one episode; of more, every second, third, …
_FLAT = 6  # levels of 255 around its mean: a picture that shows nothing, sensor noise included
_GREY = 16  # levels between the strongest and the weakest channel below which a hue is noise

Pixels = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class CameraTrack:
    """One camera over the T steps of an episode; F of the frames were decoded."""

    role: str
    marks: NDArray[np.uint64]  # [T], equal for equal bytes
    looked: NDArray[np.int64]  # [F], places among the T
    flat: NDArray[np.bool_]  # [F], a single colour
    level: NDArray[np.float64]  # [F], mean of the picture, 0 black to 255 white
    change: NDArray[np.float64]  # [F, 2], mean and largest difference to the one before, levels; first is inf
    hues: NDArray[np.float64]  # [NUM_HUES], from red over green to blue: how much colour of each hue, summed
    broken: tuple[tuple[int, str], ...] = ()  # frames that convert refuses: place among the T, reason


def track(
    role: str, frames: Sequence[Callable[[], bytes]], shape: tuple[int | None, ...] = ()
) -> CameraTrack:
    """Look at the frames of one camera, [T], each of which is read once; `shape`: [H, W, C] as declared.

    Raises: UserError for a frame that cannot be read; one that is not whole, has another size or cannot be
        decoded is listed.
    """
    stride = -(-len(frames) // _MOST_DECODED) or 1
    marks, small, looked, broken = list[int](), list[Pixels](), list[int](), list[tuple[int, str]]()
    seen: dict[int, Pixels] = {}
    for t, read in enumerate(frames):
        encoded = read()
        marks.append(_mark(encoded))
        try:
            check_frame(encoded, shape)
            if t % stride:
                continue
            # A frame that comes again is not decoded again.
            picture = seen.get(marks[-1])
            picture = thumbnail(encoded) if picture is None else picture
        except ValueError as error:
            broken.append((t, str(error)))
            continue
        seen = {marks[-1]: picture}
        small.append(picture)
        looked.append(t)
    return _tracked(role, marks, (looked, small), tuple(broken))


def _tracked(
    role: str, marks: list[int], found: tuple[list[int], list[Pixels]], broken: tuple[tuple[int, str], ...]
) -> CameraTrack:
    looked, small = found
    pictures = np.array(small, np.uint8).reshape(-1, SIDE, SIDE, 3)
    levels = pictures.astype(np.float64)
    centre = levels.mean(axis=(1, 2), keepdims=True)
    steps = np.abs(np.diff(levels, axis=0)).reshape(max(0, len(levels) - 1), SIDE * SIDE * 3)
    change = np.full((len(levels), 2), np.inf)
    if len(steps):
        change[1:] = np.stack([steps.mean(axis=1), steps.max(axis=1)], axis=1)
    return CameraTrack(
        role=role,
        marks=np.array(marks, np.uint64),
        looked=np.array(looked, np.int64),
        flat=np.asarray((np.abs(levels - centre) <= _FLAT).all(axis=(1, 2, 3))),
        level=np.asarray(levels.mean(axis=(1, 2, 3))),
        change=change,
        hues=hue_histogram(pictures),
        broken=broken,
    )


def thumbnail(encoded: bytes) -> Pixels:
    """A frame as [SIDE, SIDE, 3] RGB: a JPEG is decoded at a half, quarter or eighth of its size.

    Raises: ValueError for a frame that cannot be decoded.
    """
    from PIL import Image

    if not encoded.startswith(b"\xff\xd8"):
        whole = Image.fromarray(decode(encoded))
        return np.asarray(whole.resize((SIDE, SIDE), Image.Resampling.BOX))
    try:
        with opened(encoded) as image:
            image.draft("RGB", (SIDE, SIDE))
            return np.asarray(image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX))
    except ValueError as error:
        raise ValueError(f"the frame cannot be decoded ({error})") from error


def hue_histogram(pictures: Pixels) -> NDArray[np.float64]:
    """How much colour there is of each hue.

    Args:
        pictures: [F, H, W, 3], RGB.

    Returns: float64 [NUM_HUES], summed over the pictures; bin i holds hues of 15 i to 15 (i + 1) degrees,
        each pixel with its chroma in [0, 1] over the pixels of a picture. Nearly grey pixels count nothing.
    """
    if not pictures.size:
        return np.zeros(NUM_HUES)
    pixels = pictures.reshape(-1, 3).astype(np.float64)
    high, low = pixels.max(axis=1), pixels.min(axis=1)
    chroma = high - low
    coloured = chroma >= _GREY
    r, g, b = pixels[coloured].T
    high, chroma = high[coloured], chroma[coloured]
    sixth = np.where(
        high == r, ((g - b) / chroma) % 6, np.where(high == g, (b - r) / chroma + 2, (r - g) / chroma + 4)
    )
    bins = (sixth * (NUM_HUES / 6)).astype(np.int64) % NUM_HUES
    weight = chroma / 255 / (pictures.shape[1] * pictures.shape[2])
    return np.bincount(bins, weight, NUM_HUES).astype(np.float64)


def swapped(hues: NDArray[np.float64]) -> NDArray[np.float64]:
    """The histogram of the same pictures with red and blue exchanged: hue h becomes 240 - h degrees."""
    return hues[(2 * NUM_HUES // 3 - 1 - np.arange(NUM_HUES)) % NUM_HUES]


def _mark(encoded: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(encoded, digest_size=8).digest())
