"""Encoded frames: proved whole without decoding them, and decoded and encoded once where their bytes must
change. Both stages use this.

Codecs, of what was measured the fastest that refuse damaged data: simplejpeg for JPEG, spng to decode PNG,
Pillow for Lanczos and the rest; the figures are in benchmarks/results/.
"""

from __future__ import annotations

import io
import math
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from PIL.ImageFile import ImageFile

_JPEG_START, _JPEG_END = b"\xff\xd8", b"\xff\xd9"
_PNG_START, _PNG_END = b"\x89PNG\r\n\x1a\n", b"\0\0\0\0IEND\xaeB`\x82"
_PNG_HEADER = struct.Struct(">I4sIIBBBBBI")
# Start of frame, whatever the compression; 0xC4, 0xC8 and 0xCC mean other things.
_FRAME_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_SCAN_MARKER = 0xDA
# By the colour type of a PNG: its channels (a palette stands for colours), and the bits that one may have.
_PNG_KINDS = {
    0: (1, (1, 2, 4, 8, 16)),
    2: (3, (8, 16)),
    3: (3, (1, 2, 4, 8)),
    4: (2, (8, 16)),
    6: (4, (8, 16)),
}
# A resized or flipped JPEG is encoded once more: at this quality with full chroma nobody sees it.
_AGAIN_QUALITY = 95
# A header may ask for terabytes; no camera of a robot has so many pixels.
_MOST_PIXELS = 100_000_000
# What Pillow was seen to raise of damaged pictures, beside its DecompressionBombError.
_OF_PILLOW = (
    *(OSError, SyntaxError, ValueError, NotImplementedError, EOFError, TypeError),
    *(ArithmeticError, LookupError, struct.error, zlib.error),
)


@dataclass(frozen=True, slots=True)
class FrameInfo:
    """What a frame's header says."""

    suffix: str  # .jpg or .png
    width: int
    height: int
    channels: int


@dataclass(frozen=True, slots=True)
class FrameChange:
    """What is to be done to frames."""

    jpeg_quality: int | None = None  # PNG becomes JPEG of this quality
    max_side: int | None = None  # of the longer side, in pixels; aspect kept, never enlarged
    flip: bool = False  # red and blue change places


def frame_info(frame: bytes) -> FrameInfo:
    """Prove that bytes are one whole JPEG or PNG by its header and its end, without decoding.

    Raises: ValueError for bytes that are neither, and for a frame that is cut off or whose header is broken.
    """
    if frame.startswith(_JPEG_START):
        return _jpeg_info(frame)
    if frame.startswith(_PNG_START):
        return _png_info(frame)
    raise ValueError(
        f"the frame of {len(frame):,} bytes is neither JPEG nor PNG: it starts with {frame[:8]!r}"
    )


def check_frame(frame: bytes, shape: tuple[int | None, ...]) -> str:
    """Prove a frame whole and of the declared size.

    Args:
        frame: its bytes.
        shape: [H, W, C] as features.json declares it; None where any size will do. Channels are not compared:
            grey frames of colour features are common, and every decoder spreads them.

    Returns: its suffix, .jpg or .png.
    Raises: ValueError as `frame_info`, and for another size.
    """
    info = frame_info(frame)
    for what, has, declared in zip(("high", "wide"), (info.height, info.width), shape[:2], strict=False):
        if declared is not None and has != declared:
            raise ValueError(f"the frame is {has} pixels {what}, features.json says {declared}")
    return info.suffix


def shrunk(width: int, height: int, max_side: int) -> tuple[int, int]:
    """Width and height with the longer side at most `max_side`, aspect kept; never enlarged."""
    scale = min(1.0, max_side / max(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))


def reencode(frame: bytes, change: FrameChange) -> bytes:
    """A frame after a change; the very same object when nothing changes.

    A JPEG that is neither resized nor flipped keeps its bytes whatever the quality asked for.

    Raises: ValueError for a frame that cannot be decoded.
    """
    if change == FrameChange():
        return frame
    info = frame_info(frame)
    size = shrunk(info.width, info.height, change.max_side) if change.max_side else (info.width, info.height)
    is_jpeg, resized = info.suffix == ".jpg", size != (info.width, info.height)
    if not (resized or change.flip or (change.jpeg_quality and not is_jpeg)):
        return frame
    pixels = decode(frame)
    if change.flip:
        pixels = np.ascontiguousarray(pixels[:, :, ::-1])
    if resized:
        from PIL import Image

        pixels = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS))
    if is_jpeg or change.jpeg_quality:
        return _jpeg(pixels, change.jpeg_quality or _AGAIN_QUALITY)
    return _png(pixels)


def decode(frame: bytes) -> NDArray[np.uint8]:
    """RGB pixels, uint8 [H, W, 3]; grey is spread, alpha left out, and an EXIF orientation not obeyed, as in
    TFDS.

    Raises: ValueError for a frame that cannot be decoded, and for a grey one of 16 bits, which is depth.
    """
    if frame.startswith(_JPEG_START):
        import simplejpeg

        try:
            _refuse_gigabytes(*simplejpeg.decode_jpeg_header(frame)[:2])
            pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(frame, "RGB", strict=True)
        except ValueError as error:
            raise ValueError(f"the frame cannot be decoded ({error})") from error
        return pixels
    if _is_plain_png(frame):
        import pyspng

        try:
            _refuse_gigabytes(*struct.unpack(">II", frame[16:24]))
            return np.asarray(pyspng.load(frame))
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"the frame cannot be decoded ({error})") from error
    try:
        with opened(frame) as image:
            # Pillow would cut such values off at 255, which leaves a white frame.
            if image.mode.startswith("I"):
                raise ValueError("it is grey with 16 bits a pixel, no colours of 8")
            return np.asarray(image.convert("RGB"))
    except ValueError as error:
        raise ValueError(f"the frame cannot be decoded ({error})") from error


@contextmanager
def opened(encoded: bytes, formats: tuple[str, ...] | None = None) -> Iterator[ImageFile]:
    """A picture as Pillow opens it, of some formats or of all that it knows.

    Raises: ValueError, and nothing else that Pillow has for damaged data, also for what the block does.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(encoded), formats=formats) as image:
            yield image
    except UnidentifiedImageError as error:
        raise ValueError(f"it starts with {encoded[:8]!r}") from error
    except (*_OF_PILLOW, Image.DecompressionBombError) as error:
        raise ValueError(str(error)) from error


def _refuse_gigabytes(*sides: int) -> None:
    if math.prod(sides) > _MOST_PIXELS:
        raise ValueError(f"its header asks for {sides[0]:,} x {sides[1]:,} pixels")


def _is_plain_png(frame: bytes) -> bool:
    """Eight bits of red, green and blue, as robots' cameras have them; others are Pillow's."""
    return frame.startswith(_PNG_START) and frame[24:26] == b"\x08\x02"


def _jpeg(pixels: NDArray[np.uint8], quality: int) -> bytes:
    import simplejpeg

    # Full chroma: robot frames are small, and what is to be gripped is often a few coloured pixels.
    encoded: bytes = simplejpeg.encode_jpeg(pixels, quality=quality, colorspace="RGB", colorsubsampling="444")
    return encoded


def _png(pixels: NDArray[np.uint8]) -> bytes:
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def _jpeg_info(frame: bytes) -> FrameInfo:
    # Some encoders pad a JPEG with zeros after its end marker.
    end = len(frame) if frame.endswith(_JPEG_END) else len(frame.rstrip(b"\0"))
    if not frame.endswith(_JPEG_END, 0, end):
        raise ValueError(f"the frame of {len(frame):,} bytes is cut off: its end marker is missing")
    at, stop, info = 2, end - len(_JPEG_END), None
    while at + 4 <= stop and frame[at] == 0xFF:
        marker = frame[at + 1]
        if marker == 0xFF:  # fill
            at += 1
            continue
        length = int.from_bytes(frame[at + 2 : at + 4])
        if length < 2 or at + 2 + length > stop:
            break
        if marker == _SCAN_MARKER:
            if info is not None:
                return info
            break
        if marker in _FRAME_MARKERS:
            info = _jpeg_size(frame[at + 4 : at + 2 + length])
        at += 2 + length
    raise ValueError(f"the frame of {len(frame):,} bytes is a JPEG with a broken header")


def _jpeg_size(segment: bytes) -> FrameInfo | None:
    """What a start of frame says: bits, height, width, and three bytes for each channel."""
    if len(segment) < 6 or len(segment) != 6 + 3 * segment[5]:
        return None
    height, width, channels = struct.unpack_from(">HHB", segment, 1)
    return FrameInfo(".jpg", width, height, channels) if height and width else None


def _png_info(frame: bytes) -> FrameInfo:
    if not frame.endswith(_PNG_END):
        raise ValueError(f"the frame of {len(frame):,} bytes is cut off: its end marker is missing")
    header = frame[len(_PNG_START) : len(_PNG_START) + _PNG_HEADER.size]
    if len(header) == _PNG_HEADER.size:
        length, name, width, height, bits, colour, compression, filtering, interlace, crc = (
            _PNG_HEADER.unpack(header)
        )
        whole = (length, name) == (13, b"IHDR") and zlib.crc32(header[4:21]) == crc
        channels, depths = _PNG_KINDS.get(colour, (0, ()))
        known = bits in depths and (compression, filtering) == (0, 0) and interlace <= 1
        if whole and known and width and height:
            return FrameInfo(".png", width, height, channels)
    raise ValueError(f"the frame of {len(frame):,} bytes is a PNG with a broken header")
