"""Augmentation: seeded, within its figures, and nothing at zero strength."""

from __future__ import annotations

import colorsys

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from pydantic import ValidationError

from train_llava.augment import Augment, augment, augment_pixels, recolour

NOTHING = {
    "crop_scale": (1.0, 1.0),
    "brightness": 0.0,
    "contrast": (1.0, 1.0),
    "saturation": (1.0, 1.0),
    "hue": 0.0,
}


def only(**strength: object) -> Augment:
    """Nothing but what is given."""
    return Augment.model_validate(NOTHING | strength)


def pixels(seed: int = 0, height: int = 24, width: int = 32) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_the_figures_are_openvlas() -> None:
    assert Augment().model_dump() == {
        "crop_scale": (0.9, 0.9),
        "crop_ratio": (1.0, 1.0),
        "brightness": 0.2,
        "contrast": (0.8, 1.2),
        "saturation": (0.8, 1.2),
        "hue": 0.05,
    }


def test_zero_strength_changes_nothing() -> None:
    for seed in range(5):
        assert np.array_equal(augment_pixels(pixels(seed), rng(seed), only()), pixels(seed))


def test_the_seed_decides_and_the_image_given_stays_as_it_was() -> None:
    image = Image.fromarray(pixels())
    made = augment(image, rng(1), Augment())
    first, again, other = (np.asarray(augment(image, rng(seed), Augment())) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert np.array_equal(np.asarray(image), pixels())
    assert (made.size, made.mode) == (image.size, "RGB")
    assert np.array_equal(first, augment_pixels(pixels(), rng(1), Augment()))


def test_brightness_is_added_alike_to_every_value_and_stays_in_its_span() -> None:
    grey = np.full((4, 4, 3), 128, np.uint8)
    shifts = [
        int(augment_pixels(grey, rng(seed), only(brightness=0.2))[0, 0, 0]) - 128 for seed in range(300)
    ]
    assert -51 <= min(shifts) < -45
    assert 45 < max(shifts) <= 51
    bright = augment_pixels(pixels(), rng(5), only(brightness=1.0)).astype(int) - pixels()
    assert len(np.unique(bright[(bright + pixels() > 0) & (bright + pixels() < 255)])) == 1


def test_contrast_spreads_each_channel_about_its_mean() -> None:
    plain = np.clip(pixels(), 90, 160)
    out = augment_pixels(plain, rng(), only(contrast=(1.2, 1.2))).astype(float)
    mean = plain.mean(axis=(0, 1))
    assert np.abs(out - (mean + 1.2 * (plain - mean))).max() <= 0.51


def test_a_crop_shows_nine_tenths_of_the_area_anywhere_in_the_image() -> None:
    rows, columns = np.mgrid[0:200, 0:200]
    ramp = np.stack([columns, rows, np.zeros_like(rows)], axis=-1).astype(np.uint8)
    corners = []
    for seed in range(200):
        out = augment_pixels(ramp, rng(seed), only(crop_scale=(0.9, 0.9))).astype(int)
        assert abs(np.ptp(out[100, :, 0]) - 199 * 0.9**0.5) <= 2
        assert abs(np.ptp(out[:, 100, 1]) - 199 * 0.9**0.5) <= 2
        corners.append(out[0, 0, :2])
    left, top = np.array(corners).T
    room = 200 * (1 - 0.9**0.5)
    assert min(left.min(), top.min()) <= 1
    assert room - 1 <= min(left.max(), top.max()) <= room + 1
    assert abs(np.corrcoef(left, top)[0, 1]) < 0.3  # not on the diagonal alone


def test_a_crops_ratio_is_that_of_its_sides() -> None:
    rows, columns = np.mgrid[0:100, 0:200]
    ramp = np.stack([columns, rows, rows], axis=-1).astype(np.uint8)
    out = augment_pixels(ramp, rng(), only(crop_scale=(0.5, 0.5), crop_ratio=(0.5, 0.5))).astype(int)
    assert abs(np.ptp(out[50, :, 0]) - 199 * 0.5) <= 2
    assert abs(np.ptp(out[:, 100, 1]) - 99) <= 2


@pytest.mark.parametrize(("saturation", "hue"), [(1.0, 0.05), (1.0, -0.3), (0.8, 0.0), (1.7, 0.5), (0.5, -1)])
def test_saturation_and_hue_are_those_of_colorsys(saturation: float, hue: float) -> None:
    some = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [0.5, 0.5, 0.5], [0, 0, 0], [1, 1, 1]])
    colours = np.concatenate([some, rng().random((50, 3))]).astype(np.float32)
    out = recolour(colours.T[:, None], saturation, hue)
    for before, after in zip(colours.tolist(), out[:, 0].T.tolist(), strict=True):
        h, s, v = colorsys.rgb_to_hsv(*before)
        assert after == pytest.approx(colorsys.hsv_to_rgb((h + hue) % 1, min(s * saturation, 1), v), abs=1e-5)
    assert out.dtype == np.float32


@pytest.mark.parametrize(
    "wrong",
    [
        {"crop_scale": (0.5, 1.5)},
        {"crop_scale": (0.9, 0.5)},
        {"contrast": (0.0, 1.0)},
        {"hue": 0.6},
        {"brightness": -0.1},
        {"flip": 0.5},
    ],
)
def test_a_strength_that_means_nothing_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Augment.model_validate(wrong)
