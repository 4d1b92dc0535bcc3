"""Frames of an episode, thinned and scaled until they fit into their part of the page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from oxe_mix.errors import UserError
from oxe_mix.images import decode, shrunk
from train_llava.report.figures import arrows, thin
from train_llava.report.values import Motion, Recorded, Strip

# Bytes of all JPEGs: as text in the page they take a third more. What is left below 25 MB is for actions, of
# which a step takes some 90 bytes, and charts.
_ALL_FRAMES, _ALL_STEPS = 11_000_000, 80_000
_MOST_EPISODES = 500
_ENOUGH_FRAMES, _LEAST_FRAMES = 24, 3  # of an episode
_SIDES = ((256, 75), (192, 72), (144, 68), (104, 62))  # longer side in pixels, JPEG quality


@dataclass(frozen=True, slots=True)
class Room:
    """An episode's part of the page."""

    num_bytes: int  # of its frames
    num_steps: int  # whose actions are kept


def room_of(datasets: int, episodes: int) -> Room:
    """What each of the episodes may take. Raises: UserError when they are too many for one page."""
    if datasets * episodes > _MOST_EPISODES:
        most = max(1, _MOST_EPISODES // datasets)
        raise UserError(
            f"--episodes {episodes}: of {datasets:,} datasets each, that is too much for one page; "
            f"give at most {most}"
        )
    shown = max(1, datasets * episodes)
    return Room(_ALL_FRAMES // shown, _ALL_STEPS // shown)


def strips_of(
    episodes: Sequence[Recorded], motion: Motion, room: Room, damage: dict[str, None]
) -> Iterator[Strip]:
    """Each as it is shown; of one with a frame that cannot be read or decoded, a line in `damage`."""
    for one in episodes:
        try:
            yield strip(one, motion, room)
        except UserError as error:
            damage[str(error)] = None


def strip(episode: Recorded, motion: Motion, room: Room) -> Strip:
    """An episode as it is shown: as many frames as its room holds, but three in any case.

    Raises: UserError for a frame that cannot be read or decoded.
    """
    num = len(episode.steps)
    for side, quality in _SIDES:
        jpegs = _Jpegs(episode, side, quality)
        each = np.mean([len(jpegs.get(i)) for i in thin(num, _LEAST_FRAMES)])
        fits = int(room.num_bytes / each)
        if fits >= min(num, _ENOUGH_FRAMES):
            break
    most = max(_LEAST_FRAMES, min(fits, room.num_steps))
    while most > _LEAST_FRAMES:
        took = sum(len(jpegs.get(i)) for i in thin(num, most))
        if took <= room.num_bytes:
            break
        most = max(_LEAST_FRAMES, min(most - 1, int(most * room.num_bytes / took)))
    shown = thin(num, most)
    kept = np.union1d(thin(num, room.num_steps), shown)
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


def jpeg(frames: Sequence[bytes], side: int, quality: int) -> bytes:
    """The encoded frames of a step as one JPEG, side by side and as high as the lowest; the longer side of
    each is at most `side` pixels.

    Raises: ValueError for a frame that cannot be decoded.
    """
    import simplejpeg

    pixels = [decode(frame) for frame in frames]
    sizes = [shrunk(one.shape[1], one.shape[0], side) for one in pixels]
    height = min(size[1] for size in sizes)
    row = [
        _resized(one, (max(1, round(size[0] * height / size[1])), height))
        for one, size in zip(pixels, sizes, strict=True)
    ]
    encoded: bytes = simplejpeg.encode_jpeg(
        np.ascontiguousarray(np.concatenate(row, axis=1)),
        quality=quality,
        colorspace="RGB",
        colorsubsampling="420",
    )
    return encoded


def _resized(pixels: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    from PIL import Image

    if size == (pixels.shape[1], pixels.shape[0]):
        return pixels
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS, reducing_gap=2))
