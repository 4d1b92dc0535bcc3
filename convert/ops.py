"""The closed vocabulary of card recipes, in NumPy. Every op takes and returns [T, d] over the steps of one
episode.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from oxe_mix.cards import OpName, Slice

Columns = NDArray[np.floating]


def apply_op(x: Columns, op: OpName | Slice) -> Columns:
    """Apply one op of a card to [T, d]; the result is float32 [T, d']."""
    if isinstance(op, Slice):
        return x[:, slice(*op.slice)]
    return _OPS[op](x)


def clip01(x: Columns) -> Columns:
    """Limit to [0, 1]; a -1…1 command becomes 0 for every value at or below 0."""
    return np.clip(x, 0, 1)


def invert(x: Columns) -> Columns:
    """1 - x, without any clip."""
    return np.float32(1) - x


def binarize(x: Columns) -> Columns:
    """A continuous absolute gripper to open 1 or closed 0: an in-between step takes the value of the step
    after it.

    Above 0.95 is open and below 0.05 closed, both strict. A trailing run of in-between values keeps the raw
    last value. Source: the rule of OpenVLA's binarize_gripper_actions, as its recipes define it.
    """
    out = np.empty_like(x)
    carry = x[-1:].copy()
    for t in range(len(x) - 1, -1, -1):
        if x[t, 0] > 0.95:
            carry = np.ones((1, 1), x.dtype)
        elif x[t, 0] < 0.05:
            carry = np.zeros((1, 1), x.dtype)
        out[t] = carry[0]
    return out


def rel2abs(x: Columns) -> Columns:
    """A relative gripper (positive closes, negative opens) to absolute: 1 open, 0 closed.

    Beyond ±0.1, strictly, is a command; a step without one keeps the state. Before the first command the
    state is its opposite; with no command at all the gripper is open throughout.
    """
    commands = np.where(x[:, 0] > 0.1, 0, np.where(x[:, 0] < -0.1, 1, -1))
    given = np.flatnonzero(commands >= 0)
    if len(given) == 0:
        return np.ones_like(x, np.float32)
    # The index of the last command at or before each step; -1 before the first.
    last = np.searchsorted(given, np.arange(len(x)), side="right") - 1
    state = np.where(last < 0, 1 - commands[given[0]], commands[given[np.maximum(last, 0)]])
    return state[:, None].astype(np.float32)


def wxyz_to_xyzw(x: Columns) -> Columns:
    """Quaternions w x y z, [T, 4], in the order x y z w that `quat_to_euler` reads."""
    return x[:, [1, 2, 3, 0]]


def quat_to_euler(x: Columns) -> Columns:
    """Unit quaternions x y z w, [T, 4], to roll pitch yaw, [T, 3], radians, with R = Rz(yaw) Ry(pitch)
    Rx(roll).

    Inputs are not renormalised. In gimbal lock (| |r20| - 1 | < 1e-6) yaw is 0.
    Source: tensorflow/graphics tensorflow_graphics/geometry/transformation/euler.py, for its conventions.
    """
    qx, qy, qz, qw = (x[:, i].astype(np.float64) for i in range(4))
    r00 = 1 - 2 * (qy * qy + qz * qz)
    r01 = 2 * (qx * qy - qz * qw)
    r02 = 2 * (qx * qz + qy * qw)
    r10 = 2 * (qx * qy + qz * qw)
    r20 = 2 * (qx * qz - qy * qw)
    r21 = 2 * (qy * qz + qx * qw)
    r22 = 1 - 2 * (qx * qx + qy * qy)
    sign = np.sign(r20)
    locked = np.abs(np.abs(r20) - 1) < 1e-6
    roll = np.where(locked, np.arctan2(-sign * r01, -sign * r02), np.arctan2(r21, r22))
    pitch = np.where(locked, -sign * np.pi / 2, -np.arcsin(np.clip(r20, -1, 1)))
    yaw = np.where(locked, 0.0, np.arctan2(r10, r00))
    return np.stack([roll, pitch, yaw], axis=1).astype(np.float32)


def next_state_delta(x: Columns) -> Columns:
    """x[t + 1] - x[t], plain: angles are not unwrapped. The last step has no value: it is NaN until it is
    dropped.
    """
    return np.concatenate([x[1:] - x[:-1], np.full_like(x[:1], np.nan)])


def previous_delta(x: Columns) -> Columns:
    """x[t] - x[t - 1], plain: angles are not unwrapped. The first step has no value: it is NaN until it is
    dropped.
    """
    return np.concatenate([np.full_like(x[:1], np.nan), x[1:] - x[:-1]])


def wrap_angle(x: Columns) -> Columns:
    """Radians to the same angle in [-pi, pi), to within float32; what has no value yet stays NaN."""
    return (np.mod(x.astype(np.float64) + np.pi, 2 * np.pi) - np.pi).astype(np.float32)


def int32_codepoints(codes: NDArray[np.integer]) -> str:
    """One step's text from Unicode code points, cut at the first 0."""
    ends = np.flatnonzero(codes == 0)
    return "".join(map(chr, codes[: ends[0]] if len(ends) else codes))


def _same(x: Columns) -> Columns:
    return x


_OPS: dict[OpName, Callable[[Columns], Columns]] = {
    "cast_float": _same,  # reading a key already gives float32, true being 1.0
    "clip01": clip01,
    "invert": invert,
    "binarize": binarize,
    "rel2abs": rel2abs,
    "wxyz_to_xyzw": wxyz_to_xyzw,
    "quat_to_euler": quat_to_euler,
    "next_state_delta": next_state_delta,
    "previous_delta": previous_delta,
    "wrap_angle": wrap_angle,
    "inflate_zlib_f32": _same,  # reading a key unpacks it: `Episode.array` knows the feature's encoding
}
