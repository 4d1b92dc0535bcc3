"""TFRecord files without TensorFlow: every record is read with both of its checksums proved.

Format: length (uint64), masked crc32c of the length, payload, masked crc32c of the payload; all
    little-endian.
Source: tensorflow/core/lib/io/record_writer.h.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import google_crc32c

from oxe_mix.errors import UserError

FRAME_BYTES = 16  # what a record costs beside its payload
_HEADER = struct.Struct("<QI")
_FOOTER = struct.Struct("<I")
_MASK_DELTA = 0xA282EAD8
# A length beyond this is taken for garbage rather than allocated: the longest episodes are some 100 MB.
_MAX_PAYLOAD = 1 << 32
_STRANGERS = (
    (b"version https://git-lfs", "a git-LFS pointer, not the data; run 'git lfs pull' where it came from"),
    (b"\x1f\x8b", "gzip data; unpack it first"),
    (b"<!DOCTYPE", "an HTML page, so the address does not lead to a file"),
    (b"<!doctype", "an HTML page, so the address does not lead to a file"),
    (b"<html", "an HTML page, so the address does not lead to a file"),
)


class TFRecordError(UserError):
    """A TFRecord file is not what it should be; the message gives file, record number and byte offset."""


@dataclass(frozen=True, slots=True)
class Record:
    """One record: its bytes as framed in the file, and the payload inside them."""

    framed: bytes
    payload: bytes


def frame(payload: bytes) -> bytes:
    """The record as it stands in a file."""
    length = struct.pack("<Q", len(payload))
    return b"".join((length, _FOOTER.pack(_masked_crc(length)), payload, _FOOTER.pack(_masked_crc(payload))))


def read_records(stream: BinaryIO, name: str) -> Iterator[Record]:
    """Read records to the end of `stream`; `name` is what messages call the file.

    Raises: TFRecordError at the first record that is cut off or fails a checksum.
    """
    number, offset = 0, 0
    while header := stream.read(_HEADER.size):
        where = f"{name}: record {number} at byte {offset}"
        if len(header) < _HEADER.size:
            _refuse_strangers(number, header, name)
            raise TFRecordError(f"{where}: the file ends inside the record's header; fetch it again")
        length, length_crc = _HEADER.unpack(header)
        if _masked_crc(header[:8]) != length_crc or length > _MAX_PAYLOAD:
            _refuse_strangers(number, header, name)
            raise TFRecordError(
                f"{where}: the checksum of the length is wrong; the file is damaged or no TFRecord"
            )
        rest = stream.read(length + _FOOTER.size)
        if len(rest) < length + _FOOTER.size:
            raise TFRecordError(
                f"{where}: {length:,} bytes announced, the file ends after {len(rest):,}; fetch it again"
            )
        payload = rest[:length]
        if _masked_crc(payload) != _FOOTER.unpack(rest[length:])[0]:
            raise TFRecordError(
                f"{where}: the checksum of the data is wrong; the file is damaged, fetch it again"
            )
        yield Record(framed=header + rest, payload=payload)
        number, offset = number + 1, offset + FRAME_BYTES + length


def _refuse_strangers(number: int, start: bytes, name: str) -> None:
    """Say what a file is that is no TFRecord from its first byte on."""
    for magic, what in _STRANGERS:
        if number == 0 and start.startswith(magic[: len(start)]):
            raise TFRecordError(f"{name}: this is {what}")


def _masked_crc(data: bytes) -> int:
    crc: int = google_crc32c.value(data)
    return (((crc >> 15) | (crc << 17)) + _MASK_DELTA) & 0xFFFFFFFF
