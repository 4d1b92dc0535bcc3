"""Episodes of any dataset: random values for every leaf of its feature tree, in the true types and shapes.

They cannot be learnt; they are there so that whoever reads the dataset meets all of its layout.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from oxe_mix.cards import Card
from oxe_mix.rlds import Key
from oxe_mix.synth.features import Node, feature_tree
from oxe_mix.synth.frames import COLORS, coloured
from oxe_mix.synth.world import sample_scene

SUCCESS_SHARE = 0.8
_STEPS = (2, 4)  # fewest and most of an episode
_SPREAD = 0.1  # standard deviation of the numbers
# Point clouds and depth maps are all zeros: noise of that size costs time and says nothing.
_NOISY_VALUES = 1024
_UNKNOWN_LENGTH = 8  # where the tree leaves an axis open
_FLAGS = {"is_first", "is_last", "is_terminal"}


@dataclass(frozen=True, slots=True)
class _Place:
    """Where in an episode a value is drawn for."""

    rng: np.random.Generator
    number: int
    language: Key
    instruction: str
    step: int = 0
    last: bool = False
    inside: bool = False  # below a step


def random_episode(card: Card, rng: np.random.Generator, number: int) -> Node:
    """One episode as TFDS takes it, frames encoded.

    Args:
        card: whose tree is filled; its language key gets an instruction, the same at every step.
        rng: everything random comes from it.
        number: of the episode in its dataset; texts other than the instruction quote it.
    """
    place = _Place(rng, number, card.language.key, sample_scene(rng).instruction)
    episode: Node = _value(feature_tree(card.tree or card.name), (), place)
    return episode


def _value(node: Node, key: Key, place: _Place) -> Any:
    """A value for a node; `key` counts from the top of the episode, or of the step."""
    match node["kind"]:
        case "dict":
            return {name: _value(child, (*key, name), place) for name, child in node["features"].items()}
        case "dataset":
            num_steps = int(place.rng.integers(_STEPS[0], _STEPS[1], endpoint=True))
            steps = [replace(place, step=t, last=t == num_steps - 1, inside=True) for t in range(num_steps)]
            return [_value(node["feature"], key if place.inside else (), step) for step in steps]
        case "image":
            return coloured(node, int(place.rng.integers(len(COLORS))), place.step)
        case _:
            return _text_or_numbers(node, key, place)


def _text_or_numbers(node: Node, key: Key, place: _Place) -> Any:
    shape = tuple(_UNKNOWN_LENGTH if side is None else side for side in node.get("shape", ()))
    is_instruction = place.inside and key == place.language
    if node["kind"] == "text" or node["dtype"] == "string":
        text = place.instruction if is_instruction else f"{key[-1]} {place.number}"
        return np.full(shape, text, object) if shape else text
    if is_instruction:
        return _code_points(place.instruction, shape, node["dtype"])
    if place.inside and key[-1] in _FLAGS:
        return place.step == 0 if key[-1] == "is_first" else place.last
    if node["dtype"] == "bool" and key[-1] == "success":
        return bool(place.rng.random() < SUCCESS_SHARE)
    return _numbers(place.rng, shape, np.dtype(node["dtype"]))


def _code_points(text: str, shape: tuple[int, ...], dtype: str) -> Any:
    codes = np.zeros(shape, dtype)
    codes[: len(text)] = [ord(letter) for letter in text]
    return codes


def _numbers(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
    if math.prod(shape) > _NOISY_VALUES:
        return np.zeros(shape, dtype)
    if dtype.kind == "f":
        return np.asarray(rng.normal(0, _SPREAD, shape)).astype(dtype)
    return np.asarray(rng.integers(0, 2 if dtype.kind == "b" else 4, shape)).astype(dtype)
