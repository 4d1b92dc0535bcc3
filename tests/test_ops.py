"""Every op of the card vocabulary, at every edge that its definition states."""

from __future__ import annotations

import zlib
from typing import get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from convert import ops
from convert.ops import apply_op, int32_codepoints
from oxe_mix.cards import OpName, Slice
from oxe_mix.synth.features import features as _features

# Grippers often rest exactly on a threshold, or just beside one.
GRIPPERS = st.one_of(
    st.sampled_from([float(np.float32(x)) for x in (0, 0.05, 0.95, 1, 0.5)]), st.floats(-0.5, 1.5, width=32)
)


def columns(values: st.SearchStrategy[float]) -> st.SearchStrategy[NDArray[np.float32]]:
    """[T, 1], one step at least."""
    return arrays(np.float32, st.tuples(st.integers(1, 20), st.just(1)), elements=values)


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


def test_w_x_y_z_is_put_into_the_order_that_the_angles_are_read_in() -> None:
    q = _quaternion(np.array([1.0, 0.0, 0.0]), 0.5)
    stored = np.array([[q[3], q[0], q[1], q[2]]], np.float32)
    assert apply_op(stored, "wxyz_to_xyzw")[0].tolist() == q.astype(np.float32).tolist()
    assert apply_op(apply_op(stored, "wxyz_to_xyzw"), "quat_to_euler")[0] == pytest.approx([0.5, 0, 0])


@given(st.lists(st.floats(-1, 1), min_size=4, max_size=4).filter(lambda q: np.linalg.norm(q) > 0.1))
def test_a_quaternion_and_its_negative_are_one_rotation(raw: list[float]) -> None:
    q = (np.array(raw) / np.linalg.norm(raw)).astype(np.float32)
    one, other = (_rotation(*apply_op(sign * q[None], "quat_to_euler")[0]) for sign in (1, -1))
    assert np.abs(one - other).max() < 5e-3


@pytest.mark.parametrize(
    ("angle", "wrapped"),
    [
        (0.0, 0.0),
        (3.0, 3.0),
        (-3.0, -3.0),
        (np.pi + 0.25, -np.pi + 0.25),
        (-np.pi - 0.25, np.pi - 0.25),
        (7.0, 7.0 - 2 * np.pi),
        (-20.0, -20.0 + 6 * np.pi),
    ],
)
def test_an_angle_is_wrapped_into_half_a_turn_either_way(angle: float, wrapped: float) -> None:
    assert apply_op(_column(angle), "wrap_angle")[0, 0] == pytest.approx(wrapped, abs=1e-6)


@given(columns(st.floats(-50, 50, width=32)))
def test_a_wrapped_angle_is_the_same_angle_and_stays_as_it_is(x: NDArray[np.float32]) -> None:
    wrapped = apply_op(x, "wrap_angle")
    assert (np.abs(wrapped) <= np.float32(np.pi)).all()
    assert np.abs(np.exp(1j * wrapped) - np.exp(1j * x)).max() < 1e-5
    again = apply_op(wrapped, "wrap_angle")
    assert np.abs(np.exp(1j * again) - np.exp(1j * wrapped)).max() < 1e-6


def test_what_has_no_value_yet_has_none_when_it_is_wrapped() -> None:
    assert np.isnan(apply_op(_column(np.nan), "wrap_angle")).all()


def test_next_state_delta_has_no_value_for_the_last_step() -> None:
    out = apply_op(_column(1, 4, 2), "next_state_delta")[:, 0]
    assert out[:2].tolist() == [3, -2]
    assert np.isnan(out[2])


def test_previous_delta_has_no_value_for_the_first_step() -> None:
    out = apply_op(_column(1, 4, 2), "previous_delta")[:, 0]
    assert np.isnan(out[0])
    assert out[1:].tolist() == [3, -2]


@given(columns(st.floats(-100, 100, width=32)))
def test_both_deltas_are_the_same_movements_told_a_step_apart(x: NDArray[np.float32]) -> None:
    following, previous = apply_op(x, "next_state_delta"), apply_op(x, "previous_delta")
    assert following[:-1].tolist() == previous[1:].tolist()
    assert x[0, 0] + following[:-1, 0].astype(np.float64).sum() == pytest.approx(x[-1, 0], abs=1e-3)


@given(columns(GRIPPERS))
def test_a_binarized_gripper_is_open_or_closed_but_for_the_runs_end(x: NDArray[np.float32]) -> None:
    out = apply_op(x, "binarize")[:, 0]
    decided = np.flatnonzero((x[:, 0] > 0.95) | (x[:, 0] < 0.05))
    end = decided[-1] + 1 if len(decided) else 0
    assert set(out[:end]) <= {0.0, 1.0}
    assert (out[end:] == x[-1]).all()
    assert (out[decided] == (x[decided, 0] > 0.5)).all()
    # A step in between never differs from the one after it.
    between = np.setdiff1d(np.arange(len(x) - 1), decided)
    assert (out[between] == out[between + 1]).all()
    assert (apply_op(apply_op(x, "binarize"), "binarize")[:end, 0] == out[:end]).all()


@given(columns(st.floats(-1, 1, width=32)))
def test_an_absolute_gripper_changes_only_at_a_command_and_obeys_it(x: NDArray[np.float32]) -> None:
    out = apply_op(x, "rel2abs")[:, 0]
    close, open_ = x[:, 0] > 0.1, x[:, 0] < -0.1
    assert set(out) <= {0.0, 1.0}
    assert (out[close] == 0).all()
    assert (out[open_] == 1).all()
    changes = np.flatnonzero(np.diff(out)) + 1
    assert (close | open_)[changes].all()
    given_ = np.flatnonzero(close | open_)
    # The first command is one: before it the gripper stood the other way.
    assert (out[: given_[0]] != out[given_[0]]).all() if len(given_) else (out == 1).all()


@given(columns(st.floats(-2, 2, width=32)))
def test_clip_and_invert_stay_within_a_grippers_range_and_turn_it_round(x: NDArray[np.float32]) -> None:
    clipped = apply_op(x, "clip01")
    assert ((clipped >= 0) & (clipped <= 1)).all()
    assert (apply_op(clipped, "clip01") == clipped).all()
    inside = (x >= 0) & (x <= 1)
    assert (clipped[inside] == x[inside]).all()
    inverted = apply_op(clipped, "invert")
    assert ((inverted >= 0) & (inverted <= 1)).all()
    assert np.abs(apply_op(inverted, "invert") - clipped).max() < 1e-7
    assert (np.diff(inverted[np.argsort(clipped[:, 0]), 0]) <= 0).all()


@pytest.mark.parametrize("op", sorted(set(get_args(OpName)) - {"quat_to_euler", "wxyz_to_xyzw"}))
@given(columns(st.floats(-2, 2, width=32)))
def test_every_op_of_one_column_keeps_its_steps_and_does_not_touch_what_it_is_given(
    op: OpName, x: NDArray[np.float32]
) -> None:
    before = x.copy()
    out = apply_op(x, op)
    assert out.shape == x.shape
    assert out.dtype == np.float32
    assert (x == before).all()


def test_code_points_are_cut_at_the_first_zero() -> None:
    codes = np.zeros(8, np.int32)
    codes[:3] = [0x70, 0xFC, 0x1F916]
    codes[5] = 0x78
    assert int32_codepoints(codes) == "pü🤖"
    assert int32_codepoints(np.array([104, 105], np.int32)) == "hi"


def test_packed_tensors_and_bools_are_read_as_floats() -> None:
    from oxe_mix.rlds import Episode, Feature, FeatureTree
    from oxe_mix.synth.features import blank as _blank
    from oxe_mix.synth.features import feature_tree as _tree

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
