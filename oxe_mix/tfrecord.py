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
_WRONG_DATA = "the checksum of the data is wrong; the file is damaged, fetch it again"
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
    """One record: its place, the payload, and what stands around it in the file."""

    number: int
    offset: int
    header: bytes
    payload: bytes
    footer: bytes

    @property
    def framed(self) -> bytes:
        """The record as it stands in the file."""
        return b"".join((self.header, self.payload, self.footer))


@dataclass(frozen=True, slots=True)
class Damage:
    """A record that cannot be read; `rest` when no later one can be found either."""

    number: int
    offset: int
    error: TFRecordError
    rest: bool


def frame(payload: bytes) -> bytes:
    """The record as it stands in a file."""
    length = struct.pack("<Q", len(payload))
    return b"".join((length, _FOOTER.pack(_masked_crc(length)), payload, _FOOTER.pack(_masked_crc(payload))))


class RecordScanner:
    """Proves records while their bytes stream by: holds a header, never a record, however long that is.

    `num_records`, `end` (a byte offset) and `crc` (the file's crc32c) all stand at the last whole record.
    """

    def __init__(self, name: str, limit: int | None = None) -> None:
        """Scan a file that messages call `name`, up to its record number `limit` (None: all of them)."""
        self._name = name
        self._limit = limit
        self._head = b""  # of the record's header or footer, as far as it came
        self._left: int | None = None  # bytes of the payload still to come; None between records
        self._length = 0
        self._payload_crc = 0
        self._file_crc = 0
        self.num_records = 0
        self.end = 0
        self.crc = 0

    @property
    def full(self) -> bool:
        """Whether the records asked for are all there."""
        return self.num_records == self._limit

    def feed(self, chunk: bytes) -> int:
        """Scan the next bytes of the file.

        Returns: how many of them belong to the records asked for: all, unless the limit is reached in them.
        Raises: TFRecordError at the first record that fails a checksum.
        """
        at = 0
        while at < len(chunk) and not self.full:
            if self._left is None:
                at += self._take(chunk[at : at + _HEADER.size - len(self._head)])
                if len(self._head) == _HEADER.size:
                    self._start()
            elif self._left:
                piece = chunk[at : at + self._left]
                self._payload_crc = google_crc32c.extend(self._payload_crc, piece)
                self._file_crc = google_crc32c.extend(self._file_crc, piece)
                self._left -= len(piece)
                at += len(piece)
            else:
                at += self._take(chunk[at : at + _FOOTER.size - len(self._head)])
                if len(self._head) == _FOOTER.size:
                    self._finish()
        return at

    def close(self) -> None:
        """The file ends here. Raises: TFRecordError when that is inside a record."""
        if self._left is None and not self._head:
            return
        _refuse_strangers(self.num_records, self._head, self._name)
        raise TFRecordError(f"{self._where()}: the file ends inside the record; fetch it again")

    def rewind(self) -> None:
        """Forget what came behind the last whole record; the next bytes fed start there."""
        self._left, self._head, self._file_crc = None, b"", self.crc

    def _take(self, piece: bytes) -> int:
        self._head += piece
        self._file_crc = google_crc32c.extend(self._file_crc, piece)
        return len(piece)

    def _start(self) -> None:
        self._length = _payload_length(self._head, self._where(), self.num_records, self._name)
        self._left, self._payload_crc, self._head = self._length, 0, b""

    def _finish(self) -> None:
        if _masked(self._payload_crc) != _FOOTER.unpack(self._head)[0]:
            raise TFRecordError(f"{self._where()}: {_WRONG_DATA}")
        self._left, self._head = None, b""
        self.num_records += 1
        self.end += FRAME_BYTES + self._length
        self.crc = self._file_crc

    def _where(self) -> str:
        return _where(self._name, self.num_records, self.end)


def _payload_length(header: bytes, where: str, number: int, name: str) -> int:
    length, length_crc = _HEADER.unpack(header)
    if _masked_crc(header[:8]) != length_crc or length > _MAX_PAYLOAD:
        _refuse_strangers(number, header, name)
        raise TFRecordError(
            f"{where}: the checksum of the length is wrong; the file is damaged or no TFRecord"
        )
    return int(length)


def read_records(stream: BinaryIO, name: str) -> Iterator[Record]:
    """Read records to the end of `stream`; `name` is what messages call the file.

    Raises: TFRecordError at the first record that is cut off or fails a checksum.
    """
    for record in scan_records(stream, name):
        if isinstance(record, Damage):
            raise record.error
        yield record


def scan_records(stream: BinaryIO, name: str) -> Iterator[Record | Damage]:
    """Read records to the end of `stream`, going on behind one whose data is damaged: its length is proved by
    a checksum of its own.
    """
    number, offset = 0, 0
    while header := stream.read(_HEADER.size):
        try:
            if len(header) < _HEADER.size:
                _refuse_strangers(number, header, name)
                where = _where(name, number, offset)
                raise TFRecordError(f"{where}: the file ends inside the record's header; fetch it again")
            length = _payload_length(header, _where(name, number, offset), number, name)
            payload, footer = stream.read(length), stream.read(_FOOTER.size)
            if len(footer) < _FOOTER.size:
                raise TFRecordError(
                    f"{_where(name, number, offset)}: {length:,} bytes announced, the file ends after "
                    f"{len(payload) + len(footer):,}; fetch it again"
                )
        except TFRecordError as error:
            yield Damage(number, offset, error, rest=True)
            return
        if _masked_crc(payload) == _FOOTER.unpack(footer)[0]:
            yield Record(number, offset, header, payload, footer)
        else:
            wrong = TFRecordError(f"{_where(name, number, offset)}: {_WRONG_DATA}")
            yield Damage(number, offset, wrong, rest=False)
        number, offset = number + 1, offset + FRAME_BYTES + length


@dataclass(frozen=True, slots=True)
class RecordPlace:
    """Where a record lies; equal records have equal lengths and checksums."""

    number: int
    offset: int
    num_bytes: int  # of the payload
    payload_crc: int  # masked, as it stands in the file; proved only by who reads the record


def find_records(stream: BinaryIO, name: str) -> Iterator[RecordPlace]:
    """Where the records of a file lie: their payloads are passed over, not read.

    Raises: TFRecordError for a length whose checksum is wrong, and when the file ends inside a record.
    """
    number, offset = 0, 0
    while header := stream.read(_HEADER.size):
        if len(header) < _HEADER.size:
            _refuse_strangers(number, header, name)
            raise TFRecordError(f"{_where(name, number, offset)}: the file ends inside the record's header")
        length = _payload_length(header, _where(name, number, offset), number, name)
        stream.seek(length, 1)
        footer = stream.read(_FOOTER.size)
        if len(footer) < _FOOTER.size:
            raise TFRecordError(f"{_where(name, number, offset)}: the file ends inside the record")
        yield RecordPlace(number, offset, length, _FOOTER.unpack(footer)[0])
        number, offset = number + 1, offset + FRAME_BYTES + length


def read_payload(stream: BinaryIO, place: RecordPlace, name: str) -> bytes:
    """The payload of a record that `find_records` found. Raises: TFRecordError when its checksum is wrong."""
    stream.seek(place.offset + _HEADER.size)
    payload = stream.read(place.num_bytes)
    if _masked_crc(payload) != place.payload_crc:
        raise TFRecordError(f"{_where(name, place.number, place.offset)}: {_WRONG_DATA}")
    return payload


def _where(name: str, number: int, offset: int) -> str:
    return f"{name}: record {number} at byte {offset}"


def _refuse_strangers(number: int, start: bytes, name: str) -> None:
    """Say what a file is that is no TFRecord from its first byte on."""
    for magic, what in _STRANGERS:
        if number == 0 and start.startswith(magic[: len(start)]):
            raise TFRecordError(f"{name}: this is {what}")


def _masked_crc(data: bytes) -> int:
    return _masked(google_crc32c.value(data))


def _masked(crc: int) -> int:
    return (((crc >> 15) | (crc << 17)) + _MASK_DELTA) & 0xFFFFFFFF
