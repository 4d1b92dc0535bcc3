"""Frames of an episode, thinned and scaled until they fit into their part of the page."""

from __future__ import annotations

from functools import partial

import numpy as np

from oxe_mix.errors import UserError
from oxe_mix.images import decode, shrunk
from train_llava.report.figures import arrows, thin
from train_llava.report.values import Motion, Recorded, Strip

# Bytes of all JPEGs: as text in the page they take a third more. What is left below 25 MB is for actions and
# charts.
_ALL_FRAMES = 11_000_000
_MOST_EPISODES = 500
_MOST_FRAMES, _ENOUGH_FRAMES, _LEAST_FRAMES = 40, 8, 3  # of an episode
_MOST_STEPS = 240  # of an episode whose actions are kept
_SIDES = ((256, 75), (192, 72), (144, 68), (104, 62))  # longer side in pixels, JPEG quality


def share_of_frames(datasets: int, episodes: int) -> int:
    """Bytes that each of the episodes may take. Raises: UserError when they are too many for one page."""
    if datasets * episodes > _MOST_EPISODES:
        most = max(1, _MOST_EPISODES // datasets)
        raise UserError(
            f"--episodes {episodes}: of {datasets:,} datasets each, that is too much for one page; "
            f"give at most {most}"
        )
    return _ALL_FRAMES // max(1, datasets * episodes)


def strip(episode: Recorded, motion: Motion, share: int) -> Strip:
    """An episode as it is shown, with frames of at most `share` bytes together, but three in any case.

    Raises: UserError for a frame that cannot be read or decoded.
    """
    num = len(episode.steps)
    for side, quality in _SIDES:
        jpegs = _Jpegs(episode, side, quality)
        each = np.mean([len(jpegs.get(i)) for i in thin(num, _LEAST_FRAMES)])
        fits = int(share / each)
        if fits >= min(num, _ENOUGH_FRAMES):
            break
    most = max(_LEAST_FRAMES, min(fits, _MOST_FRAMES))
    while most > _LEAST_FRAMES and (took := sum(len(jpegs.get(i)) for i in thin(num, most))) > share:
        most = max(_LEAST_FRAMES, min(most - 1, int(most * share / took)))
    shown = thin(num, most)
    kept = np.union1d(thin(num, _MOST_STEPS), shown)
    return Strip(
        id=episode.id,
        instruction=episode.instruction,
        num_steps=num,
        steps=episode.steps[kept],
        actions=episode.actions[kept],
        arrows=arrows(episode.actions, motion)[kept],
        shown=np.searchsorted(kept, shown),
        frames=tuple(jpegs.get(i) for i in shown),
    )


class _Jpegs:
    """An episode's frames at one size, each made once."""

    def __init__(self, episode: Recorded, side: int, quality: int) -> None:
        self._episode, self._make = episode, partial(jpeg, side=side, quality=quality)
        self._made: dict[int, bytes] = {}

    def get(self, place: int) -> bytes:
        """The frame at one of the T places."""
        if place not in self._made:
            try:
                self._made[place] = self._make(self._episode.frames[place]())
            except ValueError as error:
                raise UserError(f"{self._episode.id}, step {self._episode.steps[place]}: {error}") from error
        return self._made[place]


def jpeg(frame: bytes, side: int, quality: int) -> bytes:
    """An encoded frame as a JPEG whose longer side is at most `side` pixels.

    Raises: ValueError for a frame that cannot be decoded.
    """
    import simplejpeg
    from PIL import Image

    pixels = decode(frame)
    size = shrunk(pixels.shape[1], pixels.shape[0], side)
    if size != (pixels.shape[1], pixels.shape[0]):
        pixels = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS, reducing_gap=2))
    encoded: bytes = simplejpeg.encode_jpeg(
        np.ascontiguousarray(pixels), quality=quality, colorspace="RGB", colorsubsampling="420"
    )
    return encoded
