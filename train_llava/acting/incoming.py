"""From the fields of a request to an observation."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from convert.prompt import CAMERA_ROLES
from oxe_mix.errors import did_you_mean
from train_llava.acting.arrays import RequestError
from train_llava.acting.obs_keys import Meaning, ObsKeys
from train_llava.acting.observation import Observation, ObservationError

_MAX_SEED = 2**63 - 1
_MAX_STATE = 1024
# What `Observation` calls them, where a field of the request means one of them.
_MEANT: dict[str, Meaning] = {"instruction": "prompt", "unnorm_key": "unnorm_key", "state": "state"}


@dataclass(frozen=True, slots=True)
class Caps:
    """The most that is taken. message_bytes: of a request; image_pixels: of an image; text_length: characters
    of an instruction; connections: robots at a time.
    """

    message_bytes: int = 16 * 2**20
    image_pixels: int = 4 * 2**20
    text_length: int = 1000
    connections: int = 64


@dataclass(frozen=True, slots=True)
class Incoming:
    """An observation, and the fields of the request that said it, by what they mean."""

    observation: Observation
    said_by: Mapping[Meaning, str]

    def refused(self, error: ObservationError) -> RequestError:
        """The policy's complaint about the observation, in the request's own words."""
        if error.field == "images":
            cameras = [key for meaning, key in self.said_by.items() if meaning in CAMERA_ROLES]
            return RequestError(", ".join(cameras) or "image", error.problem)
        meaning = _MEANT.get(error.field)
        return RequestError(self.said_by.get(meaning, meaning) if meaning else error.field, error.problem)


def incoming(fields: Mapping[str, object], keys: ObsKeys, caps: Caps) -> Incoming:
    """The observation that a request's fields say.

    Raises: RequestError that names the field, for one that is unknown, of another type, or too large.
    """
    said_by = _said_by(fields, keys)
    given = {meaning: fields[key] for meaning, key in said_by.items()}
    images: dict[str, NDArray[np.uint8]] = {}
    for role in CAMERA_ROLES:
        if role in given:
            images[role] = _image(given[role], said_by[role], caps)
    # What was asked for and not given, the policy misses by itself.
    prompt, key = given.get("prompt", ""), given.get("unnorm_key")
    return Incoming(
        Observation(
            images=images,
            instruction=_text(prompt, said_by.get("prompt", "prompt"), caps),
            unnorm_key=None if key is None else _text(key, said_by["unnorm_key"], caps),
            state=_state(given["state"], said_by["state"]) if given.get("state") is not None else None,
            # Without one, a draw of its own for each answer.
            seed=secrets.randbits(63) if given.get("seed") is None else _seed(given["seed"], said_by["seed"]),
        ),
        said_by,
    )


def _said_by(fields: Mapping[str, object], keys: ObsKeys) -> dict[Meaning, str]:
    found: dict[Meaning, str] = {}
    for field in fields:
        if field not in keys:
            raise RequestError(field, f"unknown field{did_you_mean(field, list(keys))}")
        meaning = keys[field]
        if meaning in found:
            raise RequestError(field, f"says what {found[meaning]} says already: {meaning}")
        if meaning != "ignore":
            found[meaning] = field
    return found


def _image(value: object, field: str, caps: Caps) -> NDArray[np.uint8]:
    if not isinstance(value, np.ndarray) or value.dtype != np.uint8 or value.ndim != 3 or value.shape[2] != 3:
        given = (
            f"{value.dtype} {list(value.shape)}" if isinstance(value, np.ndarray) else type(value).__name__
        )
        raise RequestError(field, f"is {given}; give uint8 [H, W, 3], RGB")
    pixels = value.shape[0] * value.shape[1]
    if pixels > caps.image_pixels:
        raise RequestError(field, f"has {pixels:,} pixels; at most {caps.image_pixels:,}", "too_large")
    return value


def _text(value: object, field: str, caps: Caps) -> str:
    if not isinstance(value, str):
        raise RequestError(field, f"is {type(value).__name__}; give text")
    if len(value) > caps.text_length:
        raise RequestError(field, f"has {len(value):,} characters; at most {caps.text_length:,}", "too_large")
    return value


def _state(value: object, field: str) -> NDArray[np.float64]:
    if isinstance(value, list) and all(type(number) in (int, float) for number in value):
        value = np.array([_as_float(number) for number in value])
    if not isinstance(value, np.ndarray) or value.ndim != 1:
        given = (
            f"{value.dtype} {list(value.shape)}" if isinstance(value, np.ndarray) else type(value).__name__
        )
        raise RequestError(field, f"is {given}; give numbers [S]")
    if len(value) > _MAX_STATE:
        raise RequestError(field, f"has {len(value):,} numbers; at most {_MAX_STATE:,}", "too_large")
    return value.astype(np.float64)


def _as_float(number: int | float) -> float:
    try:
        return float(number)
    except OverflowError:  # JSON has integers of any length
        return float("inf")


def _seed(value: object, field: str) -> int:
    if isinstance(value, np.ndarray) and value.ndim == 0 and value.dtype.kind in "iu":
        value = value.item()
    if type(value) is not int or not 0 <= value <= _MAX_SEED:
        raise RequestError(field, "give a whole number from 0 to 2**63 - 1")
    return value
