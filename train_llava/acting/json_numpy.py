"""The encoding of OpenVLA's `POST /act`: JSON, an array as {"__numpy__": base64, "dtype": …, "shape": […]}.

Source: json_numpy 2.1.1 and openvla/openvla vla-scripts/deploy.py. Written from what goes over the wire.
"""

from __future__ import annotations

import base64
import json

import numpy as np
from numpy.typing import NDArray

from train_llava.acting.arrays import Packed, RequestError, plain

_ARRAY, _ENCODED = "__numpy__", "encoded"
# Brackets and braces of a body; base64 has none. Without a limit a megabyte of them becomes 50 MB of lists.
_MAX_CONTAINERS, _MAX_VALUES = 1024, 16_384


def dumps(array: NDArray[np.generic]) -> str:
    """An array as JSON text."""
    assert plain(array), array.dtype
    data = base64.b64encode(array.tobytes()).decode()
    return json.dumps({_ARRAY: data, "dtype": array.dtype.str, "shape": array.shape})


def loads(body: bytes) -> tuple[object, bool]:
    """The values of a body, each array as `Packed`; and whether they came as text inside a field `encoded`,
    as clients send them whose JSON library knows no arrays: the answer then is JSON text of JSON, too.

    Raises: RequestError for what is not JSON, or more of it than a request needs.
    """
    try:
        message = _parsed(body.decode())
        if not isinstance(message, dict) or _ENCODED not in message:
            return message, False
        if len(message) > 1 or not isinstance(message[_ENCODED], str):
            raise RequestError(_ENCODED, "is the whole request as text, and stands alone")
        return _parsed(message[_ENCODED]), True
    except RequestError:
        raise
    except (ValueError, RecursionError) as error:
        raise RequestError(
            "request", f"is not JSON that can be read ({str(error)[:80]})", "message"
        ) from error


def _parsed(text: str) -> object:
    if text.count("{") + text.count("[") > _MAX_CONTAINERS or text.count(",") > _MAX_VALUES:
        raise RequestError("request", "has more maps, lists and values than a request needs", "too_large")
    return json.loads(text, object_pairs_hook=_map, parse_constant=_refused)


def _map(pairs: list[tuple[str, object]]) -> object:
    found: dict[str, object] = dict(pairs)
    if len(found) < len(pairs):
        raise RequestError("request", "has a map with a key that is given twice", "message")
    if _ARRAY in found:
        data = found[_ARRAY]
        return Packed(data if isinstance(data, str) else None, found.get("dtype"), found.get("shape"))
    return found


def _refused(name: str) -> float:
    raise ValueError(f"{name} is no number")
