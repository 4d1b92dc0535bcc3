"""Encoded frames: told apart and proved whole by their first and last bytes, without decoding."""

from __future__ import annotations

_JPEG_START, _JPEG_END = b"\xff\xd8\xff", b"\xff\xd9"
_PNG_START, _PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"


def frame_suffix(frame: bytes) -> str:
    """`.jpg` or `.png`.

    Raises: ValueError for bytes that are neither, and for a frame that is cut off.
    """
    # Some encoders pad a JPEG with zeros after its end marker.
    if frame.startswith(_JPEG_START) and frame.rstrip(b"\0").endswith(_JPEG_END):
        return ".jpg"
    if frame.startswith(_PNG_START) and frame.endswith(_PNG_END):
        return ".png"
    if frame.startswith((_JPEG_START, _PNG_START)):
        raise ValueError(f"the frame of {len(frame):,} bytes is cut off: its end marker is missing")
    raise ValueError(
        f"the frame of {len(frame):,} bytes is neither JPEG nor PNG: it starts with {frame[:8]!r}"
    )
