"""Frames: proved whole without decoding, and changed once where that is asked for."""

from __future__ import annotations

import io
import struct
import zlib
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from oxe_mix.images import FrameChange, FrameInfo, check_frame, decode, frame_info, reencode, shrunk
from tests.converting import picture

JPEG, PNG = picture(64, 48), picture(64, 48, "PNG")


def _saved(mode: str, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    Image.open(io.BytesIO(PNG)).convert(mode).save(out, kind, **options)
    return out.getvalue()


def _png_header(*fields: int) -> bytes:
    """PNG with another IHDR: width, height, bits, colour type, compression, filter, interlace."""
    header = b"IHDR" + struct.pack(">IIBBBBB", *fields)
    return PNG[:12] + header + struct.pack(">I", zlib.crc32(header)) + PNG[33:]


# A start of frame of 64x48 with three channels, and a JPEG with a thumbnail that has its own end marker.
SOF = b"\xff\xc0\x00\x11\x08\x00\x30\x00\x40\x03" + bytes(9)
WITH_THUMBNAIL = _saved("RGB", "JPEG", exif=b"Exif\0\0" + picture(16, 16))


@pytest.mark.parametrize(
    ("frame", "info"),
    [
        (JPEG, FrameInfo(".jpg", 64, 48, 3)),
        (PNG, FrameInfo(".png", 64, 48, 3)),
        (JPEG + b"\0\0\0", FrameInfo(".jpg", 64, 48, 3)),
        (_saved("RGB", "JPEG", progressive=True), FrameInfo(".jpg", 64, 48, 3)),
        (_saved("RGB", "JPEG", restart_marker_blocks=2), FrameInfo(".jpg", 64, 48, 3)),
        (WITH_THUMBNAIL, FrameInfo(".jpg", 64, 48, 3)),
        (_saved("L", "JPEG"), FrameInfo(".jpg", 64, 48, 1)),
        (_saved("CMYK", "JPEG"), FrameInfo(".jpg", 64, 48, 4)),
        (_saved("P", "PNG"), FrameInfo(".png", 64, 48, 3)),
        (_saved("RGBA", "PNG"), FrameInfo(".png", 64, 48, 4)),
        (JPEG[:2] + b"\xff\xff" + JPEG[2:], FrameInfo(".jpg", 64, 48, 3)),
    ],
)
def test_the_header_says_kind_and_size(frame: bytes, info: FrameInfo) -> None:
    assert frame_info(frame) == info


@given(st.integers(0, len(JPEG) - 1))
def test_a_jpeg_cut_anywhere_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match=r"cut off|neither|broken"):
        frame_info(JPEG[:length])


@given(st.integers(0, len(PNG) - 1))
def test_a_png_cut_anywhere_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match=r"cut off|neither|broken"):
        frame_info(PNG[:length])


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (b"", "neither JPEG nor PNG"),
        (b"GIF89a", "neither JPEG nor PNG"),
        (b"\xff\xd8\xff\xd9", "JPEG with a broken header"),
        (b"\xff\xd8\xff\xe0\x00\x04ab\xff\xd9", "JPEG with a broken header"),
        (JPEG[:30] + JPEG[-2:], "JPEG with a broken header"),
        (PNG[:17] + b"\x7f" + PNG[18:], "PNG with a broken header"),
        (PNG[:8] + PNG[-12:], "PNG with a broken header"),
        (_png_header(64, 48, 3, 2, 0, 0, 0), "PNG with a broken header"),
        (_png_header(64, 48, 8, 5, 0, 0, 0), "PNG with a broken header"),
        (_png_header(64, 48, 8, 2, 1, 0, 0), "PNG with a broken header"),
        (_png_header(64, 48, 8, 2, 0, 0, 2), "PNG with a broken header"),
        (_png_header(64, 0, 8, 2, 0, 0, 0), "PNG with a broken header"),
        (b"\xff\xd8" + SOF[:4] + b"\xff\xd9", "JPEG with a broken header"),
        (b"\xff\xd8" + SOF[:-1] + b"\xff\xd9", "JPEG with a broken header"),
        (b"\xff\xd8" + SOF + b"\xff\xc4\xff\xff\xff\xd9", "JPEG with a broken header"),
        (b"\xff\xd8" + SOF + b"\xff\xda\xff\xff\xff\xd9", "JPEG with a broken header"),
        (b"\xff\xd8\xff\xc0\x00\x04\x08\x00\xff\xda\x00\x02\xff\xd9", "JPEG with a broken header"),
        (JPEG.replace(b"\x00\x30\x00\x40\x03", b"\x00\x30\x00\x40\x02"), "JPEG with a broken header"),
        (b"\xff\xd8" + SOF + b"\xff\xd9", "JPEG with a broken header"),
        (b"\xff\xd8\xff\xda\x00\x02" + SOF + b"\xff\xd9", "JPEG with a broken header"),
        (JPEG.replace(b"\x00\x30\x00\x40", b"\x00\x00\x00\x40"), "JPEG with a broken header"),
        (JPEG + b"more", "cut off"),
        (PNG + b"\0", "cut off"),
        (JPEG[:-300] + bytes(300), "cut off"),
        (WITH_THUMBNAIL[: WITH_THUMBNAIL.index(b"\xff\xd9") + 2], "JPEG with a broken header"),
    ],
)
def test_what_is_no_whole_frame_is_refused(frame: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        frame_info(frame)


@given(st.data())
def test_bytes_that_changed_are_a_frame_or_a_value_error(data: st.DataObject) -> None:
    """Headers are walked by lengths that stand in them: none of these may lead outside."""
    frame = bytearray(data.draw(st.sampled_from([JPEG, PNG, WITH_THUMBNAIL])))
    for _ in range(data.draw(st.integers(1, 3))):
        # The headers take the first 700 bytes; the ends are left, so that more than these is looked at.
        frame[data.draw(st.integers(2, 700))] = data.draw(st.integers(0, 255))
    for look in (frame_info, decode):
        with suppress(ValueError):
            look(bytes(frame))


@given(st.binary(max_size=40))
def test_bytes_between_the_marks_of_a_jpeg_are_a_frame_or_a_value_error(middle: bytes) -> None:
    for begin in (b"\xff\xd8", b"\xff\xd8\xff\xc0", b"\xff\xd8" + SOF):
        with pytest.raises(ValueError, match="broken header"):
            frame_info(begin + middle.replace(b"\xda", b"") + b"\xff\xd9")


def test_the_declared_size_must_be_the_frames() -> None:
    assert check_frame(JPEG, (48, 64, 3)) == ".jpg"
    assert check_frame(PNG, (None, None, 3)) == ".png"
    assert check_frame(PNG, ()) == ".png"
    with pytest.raises(ValueError, match=r"the frame is 64 pixels wide, features\.json says 60"):
        check_frame(JPEG, (48, 60, 3))
    with pytest.raises(ValueError, match="48 pixels high"):
        check_frame(PNG, (50, None, 3))


@pytest.mark.parametrize("frame", [JPEG, PNG])
@pytest.mark.parametrize(
    "change", [FrameChange(), FrameChange(max_side=64), FrameChange(max_side=1000), FrameChange(None, None)]
)
def test_a_frame_that_need_not_change_is_the_same_object(frame: bytes, change: FrameChange) -> None:
    assert reencode(frame, change) is frame


def test_a_jpeg_is_not_encoded_again_for_its_quality_alone() -> None:
    assert reencode(JPEG, FrameChange(jpeg_quality=50)) is JPEG


def test_png_becomes_jpeg_of_the_quality_asked_for() -> None:
    small, large = (reencode(PNG, FrameChange(jpeg_quality=quality)) for quality in (30, 98))
    assert frame_info(small) == frame_info(large) == FrameInfo(".jpg", 64, 48, 3)
    assert len(small) < len(large) < len(PNG)
    off = np.abs(decode(large).astype(int) - decode(PNG))
    assert off.mean() < 2


@pytest.mark.parametrize(("frame", "suffix"), [(JPEG, ".jpg"), (PNG, ".png")])
def test_a_resize_is_lanczos_and_keeps_the_kind(frame: bytes, suffix: str) -> None:
    smaller = reencode(frame, FrameChange(max_side=32))
    assert frame_info(smaller) == FrameInfo(suffix, 32, 24, 3)
    expected = Image.fromarray(decode(frame)).resize((32, 24), Image.Resampling.LANCZOS)
    off = np.abs(decode(smaller).astype(int) - np.asarray(expected, int))
    assert off.max() <= (0 if suffix == ".png" else 12)


def test_a_resized_jpeg_has_full_chroma_and_the_quality_asked_for_or_95() -> None:
    def tables(quality: int | None) -> Any:
        smaller: Any = Image.open(io.BytesIO(reencode(JPEG, FrameChange(quality, max_side=32))))
        assert [layer[1:3] for layer in smaller.layer] == [(1, 1)] * 3  # 4:4:4
        return smaller.quantization

    def expected(quality: int) -> Any:
        plain: Any = Image.open(io.BytesIO(_saved("RGB", "JPEG", quality=quality)))
        return plain.quantization

    assert tables(None) == tables(95) == expected(95)
    assert tables(60) == expected(60) != expected(95)


def test_a_flipped_jpeg_is_a_jpeg_with_red_and_blue_swapped() -> None:
    flipped = reencode(JPEG, FrameChange(flip=True))
    assert frame_info(flipped) == FrameInfo(".jpg", 64, 48, 3)
    pixels = decode(JPEG).astype(int)
    assert np.abs(decode(flipped) - pixels[:, :, ::-1]).mean() < 3
    assert np.abs(decode(flipped) - pixels).mean() > 30


def test_a_flip_swaps_red_and_blue_and_nothing_else() -> None:
    flipped = reencode(PNG, FrameChange(flip=True))
    assert (decode(flipped) == decode(PNG)[:, :, ::-1]).all()


@pytest.mark.parametrize("mode", ["L", "P", "RGBA"])
def test_other_colours_become_rgb(mode: str) -> None:
    frame = _saved(mode, "PNG")
    assert decode(frame).shape == (48, 64, 3)
    assert frame_info(reencode(frame, FrameChange(jpeg_quality=90))).channels == 3


@pytest.mark.parametrize(
    ("mode", "kind", "near"), [("CMYK", "JPEG", 3), ("RGBA", "PNG", 0), ("RGB", "JPEG", 3)]
)
def test_colours_stay_what_they_are(mode: str, kind: str, near: float) -> None:
    assert np.abs(decode(_saved(mode, kind, quality=98)).astype(int) - decode(PNG)).mean() <= near


def test_grey_is_spread_over_the_colours() -> None:
    grey = np.asarray(Image.open(io.BytesIO(_saved("L", "PNG"))))
    for kind in ("PNG", "JPEG"):
        pixels = decode(_saved("L", kind, quality=98)).astype(int)
        assert np.abs(pixels - grey[:, :, None]).mean() < 1


def test_depth_of_16_bits_is_refused_and_not_made_white() -> None:
    out = io.BytesIO()
    Image.fromarray(np.full((48, 64), 40_000, np.uint16)).save(out, "PNG")
    assert frame_info(out.getvalue()) == FrameInfo(".png", 64, 48, 1)
    with pytest.raises(ValueError, match="16 bits a pixel"):
        reencode(out.getvalue(), FrameChange(jpeg_quality=95))


@pytest.mark.parametrize("colour", [0, 2, 6])
def test_a_header_that_asks_for_gigabytes_is_refused(colour: int) -> None:
    with pytest.raises(ValueError, match="cannot be decoded"):
        decode(_png_header(60_000, 60_000, 8, colour, 0, 0, 0))


@pytest.mark.parametrize("options", [{}, {"transparency": (9, 9, 9)}, {"compress_level": 0}])
def test_a_png_is_decoded_to_the_very_pixels(options: dict[str, Any]) -> None:
    frame = _saved("RGB", "PNG", **options)
    pixels = decode(frame)
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels, np.asarray(Image.open(io.BytesIO(frame)).convert("RGB")))


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_pixels_by_the_gigabyte_are_not_decoded(kind: str) -> None:
    stream = io.BytesIO()
    Image.new("RGB", (12_000, 9_000)).save(stream, kind)
    with pytest.raises(ValueError, match=r"asks for 9,000 x 12,000 pixels|asks for 12,000 x 9,000 pixels"):
        decode(stream.getvalue())


def test_a_chunk_of_a_png_that_is_too_short_is_an_error_like_others() -> None:
    stream = io.BytesIO()
    Image.new("L", (8, 8)).save(stream, "PNG")
    whole, chunk = stream.getvalue(), b"gAMA\0\0"
    broken = whole[:-12] + struct.pack(">I", 2) + chunk + struct.pack(">I", zlib.crc32(chunk)) + whole[-12:]
    with suppress(ValueError):  # Pillow may read it
        assert decode(broken).shape == (8, 8, 3)


def test_damaged_data_is_refused_and_not_guessed() -> None:
    for frame in (JPEG, PNG):
        middle = len(frame) // 2
        broken = frame[:middle] + bytes(40) + frame[-20:]
        with pytest.raises(ValueError, match="cannot be decoded"):
            decode(broken)


@given(st.integers(1, 4000), st.integers(1, 4000), st.integers(1, 2000))
def test_nothing_grows_and_the_aspect_is_kept(width: int, height: int, side: int) -> None:
    w, h = shrunk(width, height, side)
    assert 1 <= w <= width
    assert 1 <= h <= height
    assert max(w, h) <= max(side, 1)
    if max(width, height) > side:
        assert max(w, h) == side
        assert abs(w / side - width / max(width, height)) <= 1 / side
