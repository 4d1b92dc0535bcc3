"""Where the columns of a tf.train.Example lie in its bytes, without copying them.

Protobuf's own parser copies every frame of an episode three times before the first byte is written; for data
that is mostly frames that is most of what a conversion costs.
Format: Example { features: 1 { feature: 1 { key: 1, value: 2 {
    bytes_list: 1 | float_list: 2 | int64_list: 3 }}}}, each list { value: 1, repeated }.
Source: tensorflow/core/example/example.proto and feature.proto; protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

_BYTES = 2  # the wire type of strings, byte strings, messages and packed numbers
_FIELD_1, _FIELD_2, _FIELD_3 = (number << 3 | _BYTES for number in (1, 2, 3))
_FIELD_1_VARINT, _FIELD_1_FIXED32 = 1 << 3 | 0, 1 << 3 | 5


def find_features(payload: bytes) -> dict[str, memoryview]:
    """The Feature message of every column of an Example, still encoded.

    Raises: ValueError when the bytes are no Example.
    """
    found: dict[str, memoryview] = {}
    for features in _fields(memoryview(payload), _FIELD_1):
        for entry in _fields(features, _FIELD_1):
            names, values = list(_fields(entry, _FIELD_1)), list(_fields(entry, _FIELD_2))
            if not names:
                raise ValueError("not a tf.train.Example (a feature without a name)")
            # Of what stands there twice the last one counts, as everywhere in protobuf.
            found[str(names[-1], "utf-8")] = values[-1] if values else memoryview(b"")
    return found


def byte_values(feature: memoryview) -> list[memoryview]:
    """The byte strings of a Feature; none when it holds other things.

    Raises: ValueError when the bytes are no Feature.
    """
    return [value for values in _fields(feature, _FIELD_1) for value in _fields(values, _FIELD_1)]


def float_values(feature: memoryview) -> NDArray[np.float32]:
    """The floats of a Feature, [N]; none when it holds other things. Raises: ValueError for no Feature."""
    parts = [_packed(values, 4) for values in _fields(feature, _FIELD_2)]
    return np.frombuffer(b"".join(parts), "<f4").astype(np.float32)


def integer_values(feature: memoryview) -> NDArray[np.int64]:
    """The whole numbers of a Feature, [N]; none when it holds other things. Raises: ValueError for no
    Feature.
    """
    packed = b"".join(_packed(values, None) for values in _fields(feature, _FIELD_3))
    return _varints(np.frombuffer(packed, np.uint8))


def num_values(feature: memoryview) -> int:
    """How many values a Feature holds, of whatever kind. Raises: ValueError for no Feature."""
    return len(byte_values(feature)) + len(float_values(feature)) + len(integer_values(feature))


def _packed(values: memoryview, width: int | None) -> bytes:
    """The numbers of a list one after the other, however they were written: packed into one field, or each in
    a field of its own. `width` bytes each; None: varints.
    """
    alone = _FIELD_1_FIXED32 if width else _FIELD_1_VARINT
    packed = b"".join([*_fields(values, _FIELD_1), *_fields(values, alone)])
    if width and len(packed) % width:
        raise ValueError("not a tf.train.Example (a list of floats ends inside one)")
    return packed


def _varints(raw: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Numbers of seven bits a byte, the last byte of each below 128."""
    ends = np.flatnonzero(raw < 0x80)
    if len(raw) and (not len(ends) or ends[-1] != len(raw) - 1):
        raise ValueError("not a tf.train.Example (a number without an end)")
    starts = np.concatenate([[0], ends[:-1] + 1]).astype(np.int64) if len(ends) else ends
    lengths = ends - starts + 1
    if len(lengths) and lengths.max() > 10:
        raise ValueError("not a tf.train.Example (a number without an end)")
    numbers = np.zeros(len(ends), np.uint64)
    for byte in range(int(lengths.max()) if len(lengths) else 0):
        longer = lengths > byte
        digits = raw[starts[longer] + byte].astype(np.uint64) & np.uint64(0x7F)
        numbers[longer] |= digits << np.uint64(7 * byte)
    return numbers.view(np.int64)


def _fields(message: memoryview, wanted: int) -> Iterator[memoryview]:
    """The contents of a message's fields with the tag `wanted`; all other fields are passed over."""
    at, end = 0, len(message)
    while at < end:
        tag, at = _varint(message, at)
        match tag & 7:
            case 2:
                length, at = _varint(message, at)
                after = at + length
            case 0:
                after = _varint(message, at)[1]
            case 1:
                after = at + 8
            case 5:
                after = at + 4
            case _:
                raise ValueError(f"not a tf.train.Example (wire type {tag & 7})")
        if after > end:
            raise ValueError("not a tf.train.Example (it is cut off)")
        if tag == wanted:
            yield message[at:after]
        at = after


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """A number of up to 64 bits, and where it ends."""
    value = shift = 0
    try:
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value, at
            shift += 7
            if shift > 63:
                raise ValueError("not a tf.train.Example (a number without an end)")
    except IndexError as error:
        raise ValueError("not a tf.train.Example (it is cut off)") from error
