"""A second implementation of recipes and codec, in plain loops, that reads the facts themselves and shares
nothing with the first. Only for comparison.

Numbers are rounded to float32 where the recipes round, so both should agree to the last digit.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Key = tuple[str, ...]
Rows = list[list[float]]  # [T][columns]
Recording = dict[Key, list[Any]]  # of each feature one entry a step: numbers, or a text
Facts = dict[str, Any]

EPSILON = 1e-8
NUM_BINS = 256
IDLE = 1e-5  # the facts' zero_action filter


@dataclass(frozen=True, slots=True)
class PlainEpisode:
    """What an episode comes to; `kept` are the source steps of `actions`, of which the idle ones fall out."""

    actions: Rows
    states: Rows  # of every source step
    kept: list[int]
    idle: list[bool]
    texts: list[str]


def f32(x: float) -> float:
    """The nearest float32."""
    return float(struct.unpack("<f", struct.pack("<f", x))[0])


def plain_episode(facts: Facts, recording: Recording, num_steps: int) -> PlainEpisode:
    """One episode as the facts' recipe has it."""
    action = facts["action"]
    first = 1 if "drop_first_step" in action.get("trajectory_before", []) else 0
    last = num_steps - 1 if "drop_last_step" in action.get("trajectory_after", []) else num_steps
    kept = list(range(first, last))
    rows = _join([_term(term, recording, list(range(first, num_steps))) for term in action["recipe"]])
    actions = rows[: len(kept)]
    states = _join([_term(term, recording, list(range(num_steps))) for term in facts["state"]["parts"]])
    texts = recording[tuple(facts["language"]["key"])]
    decode = _from_codes if facts["language"]["decode"] == "int32_codepoints" else str
    cleaned = [_cleaned(decode(texts[t])) for t in kept]
    return PlainEpisode(actions, states, kept, [_idle(facts, row) for row in actions], cleaned)


def _join(blocks: list[Rows]) -> Rows:
    joined = []
    for t in range(len(blocks[0])):
        row: list[float] = []
        for block in blocks:
            row += block[t]
        joined.append(row)
    return joined


def _term(term: dict[str, Any], recording: Recording, steps: list[int]) -> Rows:
    if "fill" in term:
        return [[float(term["fill"])] * int(term["dims"]) for _ in steps]
    rows = [[f32(float(x)) for x in recording[tuple(term["key"])][t]] for t in steps]
    for op in term.get("ops", []):
        rows = _op(op, rows)
    return rows


def _op(op: Any, rows: Rows) -> Rows:
    if isinstance(op, dict):
        start, end = op["slice"]
        return [row[start:end] for row in rows]
    return _OPS[op](rows)


def _same(rows: Rows) -> Rows:
    return rows


def _clip01(rows: Rows) -> Rows:
    return [[min(1.0, max(0.0, x)) for x in row] for row in rows]


def _invert(rows: Rows) -> Rows:
    return [[f32(1.0 - x) for x in row] for row in rows]


def _moved(rows: Rows) -> Rows:
    """From each step to the next; nobody knows what the last one did."""
    out: Rows = []
    for t in range(len(rows)):
        if t + 1 < len(rows):
            out.append([f32(rows[t + 1][a] - rows[t][a]) for a in range(len(rows[t]))])
        else:
            out.append([math.nan] * len(rows[t]))
    return out


def _binarize(rows: Rows) -> Rows:
    out: Rows = []
    carry = rows[-1][0] if rows else 0.0
    for row in reversed(rows):
        if row[0] > f32(0.95):
            carry = 1.0
        elif row[0] < f32(0.05):
            carry = 0.0
        out.append([carry])
    return out[::-1]


def _rel2abs(rows: Rows) -> Rows:
    commands = [-1 if row[0] > f32(0.1) else 1 if row[0] < f32(-0.1) else 0 for row in rows]
    state = 1
    for command in commands:
        if command != 0:
            state = -command
            break
    out = []
    for command in commands:
        state = command if command != 0 else state
        out.append([1.0 if state == 1 else 0.0])
    return out


def _angles(rows: Rows) -> Rows:
    return [_euler(*row) for row in rows]


def _euler(x: float, y: float, z: float, w: float) -> list[float]:
    r20 = 2 * (x * z - y * w)
    if abs(abs(r20) - 1) < 1e-6:
        sign = math.copysign(1.0, r20)
        r01, r02 = 2 * (x * y - z * w), 2 * (x * z + y * w)
        return [f32(math.atan2(-sign * r01, -sign * r02)), f32(-sign * math.pi / 2), 0.0]
    r00, r10 = 1 - 2 * (y * y + z * z), 2 * (x * y + z * w)
    r21, r22 = 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)
    return [f32(math.atan2(r21, r22)), f32(-math.asin(r20)), f32(math.atan2(r10, r00))]


_OPS: dict[str, Callable[[Rows], Rows]] = {
    "cast_float": _same,
    "inflate_zlib_f32": _same,
    "clip01": _clip01,
    "invert": _invert,
    "binarize": _binarize,
    "rel2abs": _rel2abs,
    "quat_to_euler": _angles,
    "next_state_delta": _moved,
}


def _idle(facts: Facts, row: list[float]) -> bool:
    for rule in facts.get("filters", []):
        if rule["name"] == "zero_action":
            for x, q01, q99 in zip(row[:6], rule["q01"], rule["q99"], strict=True):
                scale = q99 - q01 + EPSILON
                if abs((2 * (x - q01) / scale - 1) - (2 * (0 - q01) / scale - 1)) > IDLE:
                    return False
            return True
    return False


def _from_codes(codes: list[float]) -> str:
    text = ""
    for code in codes:
        if code == 0:
            break
        text += chr(int(code))
    return text


def _cleaned(text: str) -> str:
    """One line in lower case without a full stop at the end; nothing when it holds an image's marker."""
    words, word = [], ""
    for letter in text + " ":
        if letter.isspace():
            words += [word] if word else []
            word = ""
        else:
            word += letter.lower()
    line = " ".join(words)
    while line and line[-1] in ". ":
        line = line[:-1]
    return "" if "<image>" in line else line


def quantile(values: list[float], q: float) -> float:
    """With linear interpolation between the two nearest."""
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


@dataclass(frozen=True, slots=True)
class PlainStats:
    """Of one dataset, by column."""

    q01: list[float]
    q99: list[float]
    constant: list[bool]
    mask: list[bool]


def plain_stats(facts: Facts, actions: Rows) -> PlainStats:
    """Over all steps. Joint-space datasets have no mask in the facts: all but their gripper is scaled."""
    width = facts["action"]["dims"]
    columns = [[row[a] for row in actions] for a in range(width)]
    return PlainStats(
        q01=[quantile(column, 0.01) for column in columns],
        q99=[quantile(column, 0.99) for column in columns],
        constant=[min(column) == max(column) for column in columns],
        mask=facts["normalise_mask"] or [True] * (width - 1) + [False],
    )


def plain_normalized(row: list[float], stats: PlainStats) -> list[float]:
    """Movements to [-1, 1], a constant one to 0; a gripper stays, within [0, 1]."""
    out = []
    for a, x in enumerate(row):
        low, high = stats.q01[a], stats.q99[a]
        if not stats.mask[a]:
            out.append(min(1.0, max(0.0, x)))
        elif stats.constant[a]:
            out.append(0.0)
        else:
            out.append(min(1.0, max(-1.0, 2 * (x - low) / (high - low + EPSILON) - 1)))
    return out


def plain_bin(x: float) -> int:
    """Of 256 equal ones over [-1, 1]; 1 itself is in the last."""
    for i in range(NUM_BINS):
        if x < -1 + 2 * (i + 1) / NUM_BINS:
            return i
    return NUM_BINS - 1
