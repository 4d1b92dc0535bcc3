"""Episodes of any shipped feature tree whose values stand where recipes go wrong: grippers that rest exactly
on a threshold, runs between two of them, angles at half a turn, gimbal lock, idle steps, missing texts.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from typing import Any

import numpy as np

from oxe_mix.cards import Card, KeyTerm, Slice
from oxe_mix.rlds import Key
from oxe_mix.synth.features import Node, blank, feature_tree, serialize
from tests.plain_recipes import Recording, f32

GRIPPER = (0.05, 0.95, 0.1, -0.1, 0.0, 1.0, -1.0, 0.5, 0.3, 0.7, 0.11, -0.11, 0.0499, 0.9501)
TEXTS = ("Pick up the CUP.", "", "  push\tthe  block.. ", "look at <image> now", "Öffne die Tür", " . ")
NOISY_VALUES = 1024  # of larger tensors (depth, clouds of points) no recipe reads anything
UNKNOWN_SIDE = 8


def leaves(node: Node, above: Key = ()) -> Iterator[tuple[Key, Node]]:
    """What stands below a node of a feature tree, by key."""
    for name, child in node["features"].items():
        if child["kind"] == "dict":
            yield from leaves(child, (*above, name))
        else:
            yield (*above, name), child


def awkward_recording(card: Card, seed: int, num_steps: int) -> Recording:
    """Numbers (already float32) and texts of every feature of a step that is neither image nor large."""
    recording: Recording = {}
    quaternions = _quaternion_columns(card)
    for key, node in leaves(feature_tree(card.tree or card.name)["features"]["steps"]["feature"]):
        rng = random.Random(f"{card.name} {key} {seed}")
        if key == card.language.key:
            texts = [TEXTS[(seed + t) % len(TEXTS)] for t in range(num_steps)]
            is_text = node["kind"] == "text" or node["dtype"] == "string"
            recording[key] = list(texts) if is_text else [_codes(text, node) for text in texts]
        elif node["kind"] in ("scalar", "tensor") and node["dtype"] != "string":
            width = math.prod(_shape(node))
            if width <= NOISY_VALUES:
                columns = [_column(node, a, width, rng, num_steps) for a in range(width)]
                for start in quaternions.get(key, ()):
                    turns = [_quaternion(rng, t) for t in range(num_steps)]
                    columns[start : start + 4] = [[turn[i] for turn in turns] for i in range(4)]
                recording[key] = [[column[t] for column in columns] for t in range(num_steps)]
                if key[0].startswith("action") and node["dtype"].startswith("float") and not quaternions:
                    _rest(recording[key])
    return recording


def payload(card: Card, recording: Recording, num_steps: int) -> bytes:
    """The recording as the record that TFDS makes of it; frames are no pictures, nobody decodes them here."""
    name = card.tree or card.name
    top = feature_tree(name)["features"]
    example = {key: blank(node) for key, node in top.items() if key != "steps"}
    shape_of = dict(leaves(top["steps"]["feature"]))
    steps = []
    for t in range(num_steps):
        step: Node = {}
        for key, node in shape_of.items():
            inner = step
            for part in key[:-1]:
                inner = inner.setdefault(part, {})
            inner[key[-1]] = _value(node, recording[key][t]) if key in recording else _other(node, t)
        steps.append(step)
    return serialize(name, {**example, "steps": steps})


def _shape(node: Node) -> tuple[int, ...]:
    return tuple(UNKNOWN_SIDE if side is None else side for side in node.get("shape", ()))


def _value(node: Node, value: Any) -> Any:
    return value if isinstance(value, str) else np.array(value, node["dtype"]).reshape(_shape(node))


def _other(node: Node, t: int) -> Any:
    if node["kind"] == "image":
        return b"frame %d" % t
    if node["kind"] == "text" or node["dtype"] == "string":
        return np.full(_shape(node), "text", object) if _shape(node) else "text"
    return np.zeros(_shape(node), node["dtype"])


def _codes(text: str, node: Node) -> list[int]:
    codes = [ord(letter) for letter in text]
    # What comes after the first zero is no part of the text.
    return [*codes, 0, 65, *[0] * (_shape(node)[0] - len(codes) - 2)]


def _column(node: Node, a: int, width: int, rng: random.Random, num_steps: int) -> list[float]:
    if not node["dtype"].startswith("float"):
        return [rng.randrange(2) for _ in range(num_steps)]
    if a >= width - 2 or a == 6:
        return _plateaus(rng, num_steps)
    if a in (4, 5):
        return [f32(rng.choice((-1, 1)) * (math.pi - rng.uniform(0, 0.05))) for _ in range(num_steps)]
    if _constant(a, width):
        return [0.25] * num_steps
    return [f32(rng.uniform(-0.3, 0.3)) for _ in range(num_steps)]


def _constant(a: int, width: int) -> bool:
    """A movement that a robot never makes; in the flat actions, so that the others rest altogether."""
    return a == 1 and width == 7


def _plateaus(rng: random.Random, num_steps: int) -> list[float]:
    values: list[float] = []
    while len(values) < num_steps:
        for value in rng.sample(GRIPPER, len(GRIPPER)):
            values += [f32(value)] * rng.randint(1, 3)
    return values[:num_steps]


def _rest(rows: list[list[float]]) -> None:
    """Some steps at rest, some that rest by droid's filter, and some that by its narrowest column do not."""
    for t, row in enumerate(rows):
        if t % 7 in (3, 5, 6):
            still = {3: 0.0, 5: 5.7e-6, 6: 5.8e-6}[t % 7]
            rows[t] = [x if _constant(a, len(row)) else f32(still) for a, x in enumerate(row)]


def _quaternion(rng: random.Random, t: int) -> list[float]:
    """x y z w of unit length; every fourth is a quarter turn about y, either way."""
    if t % 4 == 1:
        half = math.sqrt(0.5)
        return [0.0, f32(half if t % 8 == 1 else -half), 0.0, f32(half)]
    raw = [rng.uniform(-1, 1) for _ in range(4)]
    length = math.sqrt(sum(x * x for x in raw))
    return [f32(x / length) for x in raw]


def _quaternion_columns(card: Card) -> dict[Key, list[int]]:
    """Where quaternions begin, by key."""
    found: dict[Key, list[int]] = {}
    for term in (*card.action.recipe, *card.state.parts):
        if isinstance(term, KeyTerm) and "quat_to_euler" in term.ops:
            starts = [op.slice[0] for op in term.ops if isinstance(op, Slice)]
            found.setdefault(term.key, []).append(starts[0] if starts else 0)
    return found
