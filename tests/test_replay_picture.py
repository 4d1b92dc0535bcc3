"""The picture of a replay shows what it is given, where it belongs."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from train_llava.acting.replay_picture import Drawing, Seen, draw_replay


def drawing(**changed: Any) -> Drawing:
    rng = np.random.default_rng(0)
    frame = np.full((30, 40, 3), (200, 30, 30), np.uint8)
    usual: dict[str, Any] = {
        "title": "“put $\\frac$ on the plate” " + "and more " * 30,  # no formula
        "subtitle": "viola/train/0/3",
        "names": tuple("abcdefg"),
        "steps": np.arange(5, 25),
        "asked": np.arange(5, 25, 4),
        "recorded": rng.normal(size=(20, 7)),
        "predicted": rng.normal(size=(20, 7)),
        "mean": np.zeros(7),
        "seen": {"primary": [Seen(5, frame), Seen(24, frame)]},
    }
    return Drawing(**(usual | changed))


def drawn(file: Path, **changed: Any) -> tuple[bytes, np.ndarray[Any, Any]]:
    draw_replay(drawing(**changed), file)
    data = file.read_bytes()
    return data, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


def test_the_picture_shows_curves_and_frames_and_nothing_else_changes_it(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    data, pixels = drawn(file)
    assert pixels.shape == (985, 1200, 3)
    assert drawn(file)[0] == data
    assert not list(tmp_path.glob(".*"))
    red = (np.abs(pixels - (200, 30, 30)).sum(axis=2) < 30).nonzero()
    assert len(red[0]) > 2 * 100 * 100  # two frames, large enough to be looked at
    assert red[0].max() < 260  # above the curves
    blue = np.abs(pixels - (0x1F, 0x5F, 0xA8)).sum(axis=2) < 60
    assert blue.sum() > 2000
    # Other values of one dimension are another curve in its own place, and nothing else.
    for which, color in (("predicted", (0x1F, 0x5F, 0xA8)), ("recorded", (0xF0, 0xB5, 0x83))):
        other = getattr(drawing(), which).copy()
        other[10:, 5] *= -1
        after = drawn(file, **{which: other})[1]
        changed = (after != pixels).any(axis=2).nonzero()
        assert changed[1].min() > 600
        assert changed[0].min() > 590
        assert changed[0].max() < 790
        drew = [np.abs(own - color).sum(axis=2) < 30 for own in (pixels, after)]
        assert (drew[0] != drew[1]).sum() > 500
    green = {"primary": [Seen(5, np.full((30, 40, 3), (30, 200, 30), np.uint8))] * 2}
    assert (drawn(file, seen=green)[1] != pixels).any(axis=2).nonzero()[0].max() < 260
    ones = {"recorded": np.ones((20, 8)), "predicted": np.ones((20, 8)), "mean": np.ones(8)}
    seen = drawing().seen | {"wrist": drawing().seen["primary"]}
    assert drawn(file, names=tuple("abcdefgh"), seen=seen, **ones)[1].shape == (1140, 1200, 3)
