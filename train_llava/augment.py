"""Augmentation of training frames, as OpenVLA fine-tunes: a crop resized back, then brightness, contrast,
saturation and hue. Nothing here happens without a generator, and evaluation and acting have none.

Source: the figures and their order are OpenVLA's (openvla/openvla, prismatic/vla/datasets/datasets.py,
`image_augment_kwargs`); what they mean is dlimp's (kvablack/dlimp, dlimp/augmentations.py) and tf.image's.
There one seed serves all draws of an image, which ties them together (a crop always lies on the image's
diagonal); here each is drawn on its own.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Positive = Annotated[float, Field(gt=0)]


def _ordered(span: tuple[float, float]) -> tuple[float, float]:
    if span[0] > span[1]:
        raise ValueError(f"the span {span[0]:g} to {span[1]:g} is empty; give the lower end first")
    return span


Share = Annotated[float, Field(gt=0, le=1)]
Shares = Annotated[tuple[Share, Share], AfterValidator(_ordered)]
Factors = Annotated[tuple[Positive, Positive], AfterValidator(_ordered)]


class Augment(BaseModel):
    """How strongly frames are changed; each draw is uniform in its span."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    crop_scale: Shares = (0.9, 0.9)  # of the image's area
    crop_ratio: Factors = (1.0, 1.0)  # the crop's aspect over the image's own
    brightness: Annotated[float, Field(ge=0, le=1)] = 0.2  # added, up or down, to values in [0, 1]
    contrast: Factors = (0.8, 1.2)  # about the mean of each channel
    saturation: Factors = (0.8, 1.2)
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.05  # turns of the colour circle, either way


def augment(image: Image.Image, rng: np.random.Generator, strength: Augment) -> Image.Image:
    """A changed copy of an image, RGB, of the same size.

    Args:
        image: of any mode.
        rng: one per sample, seeded with the run's seed and the sample's position, so that a resumed run sees
            what the first would have.
        strength: of the change.
    """
    cropped = np.asarray(_crop(image.convert("RGB"), rng, strength))
    # One plane a channel: NumPy takes half as long as with the channels side by side.
    planes = cropped.transpose(2, 0, 1).astype(np.float32, order="C") / 255
    planes = np.clip(planes + np.float32(rng.uniform(-strength.brightness, strength.brightness)), 0, 1)
    mean = planes.mean(axis=(1, 2), keepdims=True)
    planes = np.clip((planes - mean) * np.float32(rng.uniform(*strength.contrast)) + mean, 0, 1)
    saturation, hue = rng.uniform(*strength.saturation), rng.uniform(-strength.hue, strength.hue)
    changed = np.rint(recolour(planes, saturation, hue) * 255).astype(np.uint8)
    return Image.fromarray(np.ascontiguousarray(changed.transpose(1, 2, 0)))


def augment_pixels(
    pixels: NDArray[np.uint8], rng: np.random.Generator, strength: Augment
) -> NDArray[np.uint8]:
    """The same for uint8 [H, W, 3]."""
    return np.asarray(augment(Image.fromarray(pixels), rng, strength))


def _crop(image: Image.Image, rng: np.random.Generator, strength: Augment) -> Image.Image:
    """A part of the image, anywhere in it, at the image's own size."""
    scale = rng.uniform(*strength.crop_scale)
    ratio = np.exp(rng.uniform(*np.log(strength.crop_ratio)))
    width = image.width * min(float(np.sqrt(scale * ratio)), 1)
    height = image.height * min(float(np.sqrt(scale / ratio)), 1)
    left, top = rng.uniform(0, image.width - width), rng.uniform(0, image.height - height)
    # Not beyond the edge by a rounding error, which Pillow refuses.
    box = (left, top, min(left + width, image.width), min(top + height, image.height))
    return image.resize(image.size, Image.Resampling.BILINEAR, box=box)


def recolour(planes: NDArray[np.float32], saturation: float, hue: float) -> NDArray[np.float32]:
    """Multiply the saturation and turn the hue, both in HSV.

    Args:
        planes: red, green and blue, [3, H, W], in [0, 1].
        saturation: factor; the product stops at 1.
        hue: turns of the colour circle, in [-1, 1].

    Returns: float32 [3, H, W] in [0, 1]; greys stay what they are.
    """
    red, green, blue = planes
    value = np.maximum(np.maximum(red, green), blue)
    chroma = value - np.minimum(np.minimum(red, green), blue)
    safe = np.where(chroma > 0, chroma, np.float32(1))
    # In sixths of a turn: where the largest channel stands, moved by the difference of the other two.
    sixths = np.where(
        value == red,
        (green - blue) / safe,
        np.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    chroma = np.minimum(chroma * np.float32(saturation), value)
    out = np.empty_like(planes)
    for plane, offset in zip(out, (5, 3, 1), strict=True):
        place = sixths + np.float32((offset + 6 * hue) % 6)
        place -= 6 * np.floor(place / 6)
        plane[:] = value - chroma * np.clip(np.minimum(place, 4 - place), 0, 1)
    return out
