"""Where the columns of a tf.train.Example lie in its bytes, without copying them.

Protobuf's own parser copies every frame of an episode three times before the first byte is written; for data
that is mostly frames that is most of what a conversion costs.
Format: Example { features: 1 { feature: 1 { key: 1, value: 2 {
    bytes_list: 1 | float_list: 2 | int64_list: 3 }}}}, each list { value: 1, repeated }.
Source: tensorflow/core/example/example.proto and feature.proto; protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_BYTES = 2  # the wire type of strings, byte strings and messages
_FIELD_1, _FIELD_2 = 1 << 3 | _BYTES, 2 << 3 | _BYTES


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


def parse_feature(feature: memoryview) -> Any:
    """A Feature message of numbers, by protobuf's own parser. Raises: ValueError when it is none."""
    from google.protobuf.message import DecodeError
    from tensorflow_datasets.proto import tf_feature_generated_pb2

    try:
        return tf_feature_generated_pb2.Feature.FromString(bytes(feature))
    except DecodeError as error:
        raise ValueError(f"not a tf.train.Example ({error})") from error


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
