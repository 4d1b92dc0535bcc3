"""One camera's folder of an episode: its frames in order of their numbers, each proved whole."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from pathlib import Path

from oxe_mix.errors import UserError
from oxe_mix.images import opened
from oxe_mix.text import count

_SUFFIXES = (".jpg", ".jpeg", ".png")
# Channels and bits of the pixels that both a record and TFDS can hold, by Pillow's name for them.
_PIXELS = {"L": (1, "uint8"), "RGB": (3, "uint8"), "RGBA": (4, "uint8"), "I;16": (1, "uint16")}
_ENDS = {"jpeg": b"\xff\xd9", "png": b"IEND\xaeB`\x82"}


@dataclass(frozen=True, slots=True)
class FrameFormat:
    """What all frames of a camera have in common; sizes in pixels, encoding `jpeg` or `png`."""

    width: int
    height: int
    channels: int
    dtype: str
    encoding: str

    def __str__(self) -> str:
        """As people say it: 64x64 JPEG."""
        kind = {1: " grey", 3: "", 4: " with alpha"}[self.channels]
        depth = " 16-bit" if self.dtype == "uint16" else ""
        return f"{self.width}x{self.height} {self.encoding.upper()}{depth}{kind}"


def frame_files(folder: Path, num_steps: int) -> list[Path]:
    """The frames of one camera, one for each step: 2.jpg stands before 10.jpg.

    Raises: UserError for a folder that is not there, for other files in it, and for another count than
        `num_steps`, with the number that is missing where the names tell.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected the frames of this camera")
    files = sorted((f for f in folder.iterdir() if not f.name.startswith(".")), key=in_order)
    for file in files:
        if file.suffix.lower() not in _SUFFIXES:
            raise UserError(f"{file}: no frame; only {', '.join(_SUFFIXES)} may be here")
    for file, after in itertools.pairwise(files):
        if _numbers(file.stem) == _numbers(after.stem):
            raise UserError(f"{after}: the same number as {file.name}; keep one of them")
    if len(files) != num_steps:
        said = f"{count(len(files), 'frame')} for {count(num_steps, 'row')} of steps.csv"
        raise UserError(f"{folder}: {said}{_gap(files)}")
    return files


def in_order(path: Path) -> tuple[list[tuple[int, str]], str]:
    """A sort key of a file's name that takes digits as numbers: 2 before 10; no two names have the same."""
    return _numbers(path.name), path.name


def _numbers(name: str) -> list[tuple[int, str]]:
    parts = re.split(r"([0-9]+)", name)
    # Letters come before numbers, numbers by value; so parts of both kinds compare.
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts if part]


def _gap(files: list[Path]) -> str:
    """Where the first number is missing in names that count on by one."""
    last = [[int(digits) for digits in re.findall(r"[0-9]+", file.stem)][-1:] for file in files]
    numbers = [found[0] for found in last if found]
    for i, (before, after) in enumerate(itertools.pairwise(numbers)):
        if len(numbers) == len(files) and after - before > 1:
            return f"; after {files[i].name} comes {files[i + 1].name}"
    return ""


def read_frame(file: Path) -> tuple[bytes, FrameFormat]:
    """The bytes of a frame and its format. It is decoded once, to prove that a trainer can.

    Raises: UserError for what is no whole JPEG or PNG of 8 bits, or 16 bits grey.
    """
    data = read_bytes(file)
    try:
        with opened(data, ("JPEG", "PNG")) as image:
            image.load()
            encoding, mode, (width, height) = str(image.format).lower(), image.mode, image.size
    except ValueError as error:
        raise UserError(f"{file}: no whole JPEG or PNG ({error})") from error
    if not data.rstrip(b"\0").endswith(_ENDS[encoding]):
        raise UserError(f"{file}: other bytes follow the end of the {encoding.upper()}; save it again")
    if mode not in _PIXELS:
        raise UserError(f"{file}: pixels of kind {mode}; save it as RGB, or as grey of 8 or 16 bits")
    return data, FrameFormat(width, height, *_PIXELS[mode], encoding)


def read_bytes(file: Path) -> bytes:
    """A file of the user's. Raises: UserError for one that cannot be read."""
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error
