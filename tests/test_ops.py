"""Every op of the card vocabulary, at every edge that its definition states."""

from __future__ import annotations

import zlib
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from convert import ops
from convert.ops import apply_op, int32_codepoints
from oxe_mix.cards import OpName, Slice
from oxe_mix.synth.bucket import _features


def _column(*values: float) -> NDArray[np.float32]:
    return np.array(values, np.float32)[:, None]


def _apply(op: OpName, *values: float) -> list[float]:
    return [round(float(x), 4) for x in apply_op(_column(*values), op)[:, 0]]


def test_every_op_of_the_vocabulary_is_implemented() -> None:
    assert set(ops._OPS) == set(get_args(OpName))


@pytest.mark.parametrize(
    ("bounds", "columns"),
    [((0, 3), [0, 1, 2]), ((-1, None), [6]), ((3, -1), [3, 4, 5]), ((0, None), [0, 1, 2, 3, 4, 5, 6])],
)
def test_slice_takes_columns_and_keeps_the_rank(bounds: tuple[int, int | None], columns: list[int]) -> None:
    x = np.arange(14, dtype=np.float32).reshape(2, 7)
    assert (apply_op(x, Slice(slice=bounds)) == x[:, columns]).all()


def test_clip01_turns_a_command_of_minus_one_to_one_into_zero_or_more() -> None:
    assert _apply("clip01", -1, -0.001, 0, 0.3, 1, 1.7) == [0, 0, 0, 0.3, 1, 1]


def test_invert_does_not_clip() -> None:
    assert _apply("invert", 0, 1, 0.25, -1, 2) == [1, 0, 0.75, 2, -1]


def test_binarize_gives_an_in_between_step_the_value_of_the_step_after_it() -> None:
    assert _apply("binarize", 0.5, 1.0, 0.5, 0.2, 0.0, 0.9, 0.97) == [1, 1, 0, 0, 0, 1, 1]


def test_binarize_keeps_the_raw_last_value_over_a_trailing_run() -> None:
    assert _apply("binarize", 0.0, 0.3, 0.6, 0.4) == [0, 0.4, 0.4, 0.4]


def test_binarize_takes_both_thresholds_for_in_between() -> None:
    # In float32 these are the nearest to 0.05 and 0.95 on the inner side.
    low, high = float(np.nextafter(np.float32(0.05), 1)), float(np.nextafter(np.float32(0.95), 0))
    assert _apply("binarize", low, high, 1.0) == [1, 1, 1]
    assert _apply("binarize", low, high, 0.0) == [0, 0, 0]


def test_rel2abs_holds_the_last_command() -> None:
    # Positive closes (0), negative opens (1).
    assert _apply("rel2abs", 1, 0, 0, -1, 0, 1) == [0, 0, 0, 1, 1, 0]


def test_rel2abs_starts_in_the_opposite_of_the_first_command() -> None:
    assert _apply("rel2abs", 0, 0, 1, 0) == [1, 1, 0, 0]
    assert _apply("rel2abs", 0, -1, 0) == [0, 1, 1]


def test_rel2abs_without_any_command_is_open_throughout() -> None:
    assert _apply("rel2abs", 0, 0.05, -0.05) == [1, 1, 1]


def test_rel2abs_takes_its_thresholds_for_no_command() -> None:
    edge = float(np.nextafter(np.float32(0.1), 0))
    assert _apply("rel2abs", edge, -edge, 0.11, edge) == [1, 1, 0, 0]


def _rotation(roll: float, pitch: float, yaw: float) -> NDArray[np.float64]:
    """Rz(yaw) Ry(pitch) Rx(roll), from its three factors."""
    cr, sr, cp, sp, cy, sy = (f(a) for a in (roll, pitch, yaw) for f in (np.cos, np.sin))
    rz = np.array([[cy, -sy, 0], [sy, cy, 0], [0, 0, 1]])
    ry = np.array([[cp, 0, sp], [0, 1, 0], [-sp, 0, cp]])
    rx = np.array([[1, 0, 0], [0, cr, -sr], [0, sr, cr]])
    return np.asarray(rz @ ry @ rx)


def _quaternion(axis: NDArray[np.float64], angle: float) -> NDArray[np.float64]:
    return np.array([*(axis * np.sin(angle / 2)), np.cos(angle / 2)])


def _of_quaternion(q: NDArray[np.float64]) -> NDArray[np.float64]:
    """The rotation of a unit quaternion by Rodrigues' formula, another way than the op takes."""
    v, w = q[:3], q[3]
    cross = np.array([[0, -v[2], v[1]], [v[2], 0, -v[0]], [-v[1], v[0], 0]])
    return np.asarray(np.eye(3) + 2 * w * cross + 2 * cross @ cross)


@given(st.lists(st.floats(-1, 1), min_size=4, max_size=4).filter(lambda q: np.linalg.norm(q) > 0.1))
def test_euler_angles_are_the_quaternions_rotation(raw: list[float]) -> None:
    q = np.array(raw) / np.linalg.norm(raw)
    roll, pitch, yaw = apply_op(q[None].astype(np.float32), "quat_to_euler")[0]
    assert abs(pitch) <= np.pi / 2 + 1e-6
    assert np.abs(_rotation(roll, pitch, yaw) - _of_quaternion(q)).max() < 5e-3


@pytest.mark.parametrize("sign", [1, -1])
def test_in_gimbal_lock_yaw_is_zero_and_the_rotation_is_kept(sign: int) -> None:
    q = _quaternion(np.array([0.0, 1.0, 0.0]), sign * np.pi / 2)
    roll, pitch, yaw = apply_op(q[None], "quat_to_euler")[0]
    assert yaw == 0
    assert pitch == pytest.approx(sign * np.pi / 2)
    assert np.abs(_rotation(roll, pitch, yaw) - _of_quaternion(q)).max() < 1e-5


def test_no_rotation_in_x_y_z_w_order_is_three_zeros() -> None:
    assert (apply_op(np.array([[0, 0, 0, 1]], np.float32), "quat_to_euler") == 0).all()


def test_next_state_delta_has_no_value_for_the_last_step() -> None:
    out = apply_op(_column(1, 4, 2), "next_state_delta")[:, 0]
    assert out[:2].tolist() == [3, -2]
    assert np.isnan(out[2])


def test_code_points_are_cut_at_the_first_zero() -> None:
    codes = np.zeros(8, np.int32)
    codes[:3] = [0x70, 0xFC, 0x1F916]
    codes[5] = 0x78
    assert int32_codepoints(codes) == "pü🤖"
    assert int32_codepoints(np.array([104, 105], np.int32)) == "hi"


def test_packed_tensors_and_bools_are_read_as_floats() -> None:
    from oxe_mix.rlds import Episode, Feature, FeatureTree
    from oxe_mix.synth.bucket import _blank, _tree

    tree = _tree("kuka")["features"]
    step = _blank(tree["steps"]["feature"])
    packed, flag = ("observation", "clip_function_input/base_pose_tool_reached"), ("is_first",)
    step["observation"]["image"] = np.zeros((512, 640, 3), np.uint8).tobytes()
    step["observation"][packed[1]] = np.arange(7, dtype=np.float32)
    payload = _features("kuka").serialize_example(
        {"success": True, "steps": [{**step, "is_first": True}, step]}
    )
    leaves = {
        packed: Feature("tensor", (7,), "float32", "zlib"),
        flag: Feature("tensor", (), "bool", "none"),
    }
    episode = Episode(payload, FeatureTree({}, leaves))
    assert zlib.decompress(episode.values(packed)[0]) == np.arange(7, dtype="<f4").tobytes()
    assert episode.array(packed).tolist() == [list(range(7))] * 2
    assert episode.array(flag).astype(np.float32).tolist() == [1.0, 0.0]
