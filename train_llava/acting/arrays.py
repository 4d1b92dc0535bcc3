"""Arrays and fields as they come over a network: nothing that they say of themselves is believed unproved."""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from oxe_mix.errors import UserError

# Plain numbers, least byte first, as every machine of today has them. Objects would be pickles; structured
# and void types have no use here.
DTYPES = ("|u1", "|i1", "<u2", "<i2", "<u4", "<i4", "<u8", "<i8", "<f2", "<f4", "<f8")
_MAX_DIMENSIONS, _MAX_DEPTH, _MAX_FIELDS = 4, 4, 64

# What is wrong with a request: bytes that cannot be decoded, a field, more than a limit, actions that must
# not be sent, our own mistake; or with who asks: the token, the page, too many at once, more than one request
# at a time.
Kind = Literal["message", "field", "too_large", "rejected", "internal", "token", "origin", "full", "order"]


class RequestError(UserError):
    """A request that is not answered; `kind` is what it is counted as."""

    def __init__(self, field: str, problem: str, kind: Kind = "field") -> None:
        super().__init__(f"{field}: {problem}")
        self.kind: Kind = kind


@dataclass(frozen=True, slots=True)
class Packed:
    """An array as it was sent; any of the three may be anything. `data`: bytes, or text in base64."""

    data: object
    dtype: object
    shape: object


def fields_of(message: object) -> dict[str, object]:
    """The fields of a decoded message by their paths, `a/b` for b inside a; arrays unpacked.

    Raises: RequestError that names the field, for what is no map, nested too deep, or given twice.
    """
    if not isinstance(message, dict):
        raise RequestError("request", "is no map of fields", "message")
    found: dict[str, object] = {}
    for path, value in _leaves(message, "", 1):
        if path in found:
            raise RequestError(path, "is given twice")
        if len(found) == _MAX_FIELDS:
            raise RequestError("request", f"has more than {_MAX_FIELDS} fields", "too_large")
        found[path] = unpacked(value, path) if isinstance(value, Packed) else value
    return found


def unpacked(packed: Packed, field: str) -> NDArray[np.generic]:
    """The array that was sent, read-only.

    Raises: RequestError for a type that is not in `DTYPES`, an empty shape, or bytes that do not fill it.
    """
    if not isinstance(packed.dtype, str) or packed.dtype not in DTYPES:
        raise RequestError(field, f"arrays of type {_short(packed.dtype)} are not taken; {', '.join(DTYPES)}")
    dtype, shape = np.dtype(packed.dtype), _shape(packed.shape, field)
    data = packed.data
    try:
        data = base64.b64decode(data, validate=True) if isinstance(data, str) else data
    except (binascii.Error, ValueError) as error:
        raise RequestError(field, "is not base64") from error
    if not isinstance(data, bytes):
        raise RequestError(field, "has no bytes")
    expected = math.prod(shape) * dtype.itemsize
    if len(data) != expected:
        raise RequestError(
            field, f"{packed.dtype} {list(shape)} is {expected:,} bytes, {len(data):,} were sent"
        )
    return np.frombuffer(data, dtype).reshape(shape)


def plain(array: NDArray[np.generic]) -> bool:
    """Whether an array is of a type that goes over the network."""
    return array.dtype.str in DTYPES


def _leaves(value: dict[object, object], prefix: str, depth: int) -> Iterator[tuple[str, object]]:
    for key, inner in value.items():
        if not isinstance(key, str):
            raise RequestError(
                prefix.rstrip("/") or "request", f"has the key {_short(key)}, which is no text"
            )
        if not isinstance(inner, dict):
            yield f"{prefix}{key[:80]}", inner
        elif depth == _MAX_DEPTH:
            raise RequestError(
                f"{prefix}{key[:80]}", f"maps are nested deeper than {_MAX_DEPTH}", "too_large"
            )
        else:
            yield from _leaves(inner, f"{prefix}{key[:80]}/", depth + 1)


def _shape(given: object, field: str) -> tuple[int, ...]:
    problem = f"shape {_short(given)} is none; give up to {_MAX_DIMENSIONS} whole numbers above 0"
    if not isinstance(given, Sequence) or isinstance(given, str | bytes) or len(given) > _MAX_DIMENSIONS:
        raise RequestError(field, problem)
    sizes: list[int] = []
    for size in given:
        # A bool is an int to Python; and four factors below 2³² stay below what math.prod makes slow.
        if type(size) is not int or not 0 < size < 1 << 32:
            raise RequestError(field, problem)
        sizes.append(size)
    return tuple(sizes)


def _short(value: object) -> str:
    """What a message says of a value that may be anything, of any length."""
    if isinstance(value, str | bytes):
        return repr(value[:40])
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_short, value[:6]))}]"
    return str(value)[:40] if isinstance(value, int | float | None) else type(value).__name__
