"""The encoding of openpi's policy servers and clients: msgpack, arrays as maps with these bytes as keys.

Source: openpi-client 0.1.2, msgpack_numpy.py. There an array is unpacked as whatever type it claims to be;
here `arrays` says which are taken. Written from its description; arrays that one packs, the other unpacks.
"""

from __future__ import annotations

import msgpack
import numpy as np

from train_llava.acting.arrays import DTYPES, Packed, RequestError, plain

_ARRAY, _NUMBER, _DATA, _DTYPE, _SHAPE = b"__ndarray__", b"__npgeneric__", b"data", b"dtype", b"shape"
# A list is a state, seldom wider than 30. Without limits a megabyte of nested headers asks for gigabytes.
_MAX_LENGTH, _MAX_CONTAINERS = 1024, 256


def pack(value: object) -> bytes:
    """Plain values and arrays as one message."""
    packed = msgpack.packb(value, default=_packed)
    assert isinstance(packed, bytes)
    return packed


def unpack(message: bytes) -> object:
    """The message's values, each array as `Packed`: to be unpacked by `arrays.fields_of`, which knows the
    field.

    Raises: RequestError for what is not msgpack, or more of it than a request needs.
    """
    counted = _Containers()
    try:
        return msgpack.unpackb(
            message,
            object_pairs_hook=counted.mapping,
            list_hook=counted.sequence,
            max_array_len=_MAX_LENGTH,
            max_map_len=_MAX_LENGTH,
            max_ext_len=0,
        )
    except RequestError:
        raise
    # msgpack's own errors are ValueErrors, but for StackError on some versions and what bad text raises.
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as error:
        raise RequestError(
            "request", f"is not msgpack that can be read ({_reason(error)})", "message"
        ) from error


class _Containers:
    """Counts maps and lists while they are made, and turns arrays' maps into `Packed`."""

    def __init__(self) -> None:
        self._left = _MAX_CONTAINERS

    def sequence(self, values: list[object]) -> list[object]:
        """A list as it is."""
        self._count()
        return values

    def mapping(self, pairs: list[tuple[object, object]]) -> object:
        """A map, or what it stands for. Raises: RequestError for a key that is given twice."""
        self._count()
        found: dict[object, object] = dict(pairs)
        if len(found) < len(pairs):
            raise RequestError("request", "has a map with a key that is given twice", "message")
        if _ARRAY in found:
            return Packed(found.get(_DATA), found.get(_DTYPE), found.get(_SHAPE))
        if _NUMBER in found:
            value = found.get(_DATA)
            if found.get(_DTYPE) not in DTYPES or type(value) not in (int, float):
                raise RequestError("request", "has a NumPy scalar that is no plain number", "message")
            return value
        return found

    def _count(self) -> None:
        self._left -= 1
        if self._left < 0:
            raise RequestError("request", f"has more than {_MAX_CONTAINERS} maps and lists", "too_large")


def _packed(value: object) -> object:
    """What msgpack cannot pack itself."""
    if isinstance(value, np.ndarray):
        assert plain(value), value.dtype
        return {_ARRAY: True, _DATA: value.tobytes(), _DTYPE: value.dtype.str, _SHAPE: value.shape}
    raise TypeError(f"{type(value).__name__} has no place in a message")


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0][:80] if str(error) else type(error).__name__
