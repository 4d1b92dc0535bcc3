"""Pictures as a policy takes them, from files, folders and videos."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from oxe_mix.errors import UserError

_PICTURES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}
_VIDEOS = {".mp4", ".mkv", ".mov", ".webm", ".avi", ".gif"}


@dataclass(frozen=True, slots=True)
class Picture:
    """What a camera saw; rgb: uint8 [H, W, 3]; name: of the file, and of the frame in a video."""

    name: str
    rgb: NDArray[np.uint8]


def pictures(path: Path, stride: int = 1) -> Iterator[Picture]:
    """The pictures of a file, of a folder in the order of its names, or of a video, every `stride`-th.

    Raises: UserError when there is none, or one cannot be decoded.
    """
    if path.is_dir():
        # As people count: frame_10 comes after frame_9.
        files = sorted((f for f in path.iterdir() if f.suffix.lower() in _PICTURES), key=_by_numbers)
        if not files:
            raise UserError(f"{path}: no picture in this folder ({', '.join(sorted(_PICTURES))})")
        yield from (read_picture(file) for file in files[::stride])
    elif path.suffix.lower() in _VIDEOS:
        yield from _video(path, stride)
    else:
        yield read_picture(path)


def read_picture(file: Path) -> Picture:
    """The picture of a file. Raises: UserError when it is missing, or no picture that can be decoded."""
    from train_llava.processor import open_image

    return Picture(str(file), np.asarray(open_image(file)))


def _video(file: Path, stride: int) -> Iterator[Picture]:
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    if find_spec("av") is None:
        raise UserError(
            f"{file}: a video needs PyAV; pip install 'oxe-mix[video]', or give a folder of pictures"
        )
    import av

    try:
        with av.open(str(file)) as container:
            for i, frame in enumerate(container.decode(video=0)):
                if i % stride == 0:
                    yield Picture(
                        f"{file}#{i}", frame.to_ndarray(format="rgb24").astype(np.uint8, copy=False)
                    )
    except (av.FFmpegError, IndexError) as error:
        raise UserError(f"{file}: not a video that can be decoded ({error})") from error


def _by_numbers(file: Path) -> tuple[list[str | int], str]:
    parts = re.split(r"([0-9]+)", file.stem)  # text and numbers by turns, so that like is held to like
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], file.name
