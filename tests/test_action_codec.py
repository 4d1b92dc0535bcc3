"""Actions to tokens and back."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from convert import action_codec as codec
from convert.action_codec import NUM_BINS, ActionCodec, ActionStats
from convert.statistics import DatasetStats, action_stats, openvla_layout
from oxe_mix.errors import UserError

MASK = (True,) * 6 + (False,)
floats = st.floats(-10, 10, width=32)
recordings = arrays(np.float32, st.tuples(st.integers(2, 30), st.just(7)), elements=floats)


def _stats(actions: NDArray[np.float32]) -> ActionStats:
    return action_stats(actions, MASK, 1)


@given(recordings)
def test_decoded_actions_are_within_half_a_bin_of_the_clipped_ones(actions: NDArray[np.float32]) -> None:
    actions[:, 6] = np.abs(actions[:, 6]) / 10
    stats = _stats(actions)
    decoded = codec.decode(codec.encode(actions, stats), stats)
    low, high = np.array(stats.q01), np.array(stats.q99)
    low[6], high[6] = 0.0, 1.0
    half_a_bin = (high - low) / NUM_BINS / 2
    half_a_bin[6] = 1 / NUM_BINS
    error = np.abs(decoded - np.clip(actions, low, high))
    assert (error <= half_a_bin + 1e-7 * (1 + np.abs(high) + np.abs(low))).all()


@given(arrays(np.float64, (5, 3), elements=st.floats(-1.5, 1.5)))
def test_bins_are_equal_and_their_centres_come_back(normalized: NDArray[np.float64]) -> None:
    bins = codec.normalized_to_bins(normalized)
    assert ((bins >= 0) & (bins < NUM_BINS)).all()
    decoded = codec.bins_to_normalized(bins)
    assert (np.abs(decoded - np.clip(normalized, -1, 1)) <= 1 / NUM_BINS + 1e-9).all()
    assert (codec.normalized_to_bins(decoded) == bins).all()


@given(arrays(np.float64, (9, 1), elements=st.floats(-1.5, 1.5)))
def test_a_larger_value_is_never_in_a_lower_bin(normalized: NDArray[np.float64]) -> None:
    bins = codec.normalized_to_bins(np.sort(normalized, axis=0))
    assert (np.diff(bins, axis=0) >= 0).all()


@given(recordings, arrays(np.int64, (5, 7), elements=st.integers(0, NUM_BINS - 1)))
def test_every_bin_decodes_to_an_action_that_encodes_to_it(
    actions: NDArray[np.float32], bins: NDArray[np.int64]
) -> None:
    # A movement that all but stands still has bins narrower than a float can tell apart.
    spread = np.linspace(-1, 1, len(actions), dtype=np.float32)[:, None]
    stats = _stats(actions + spread * (1 + np.abs(actions).max()))
    bins[:, 6] = NUM_BINS // 2 + bins[:, 6] // 2
    assert (codec.encode(codec.decode(bins, stats), stats) == bins).all()


@given(recordings)
def test_normalizing_is_undone_inside_the_quantiles(actions: NDArray[np.float32]) -> None:
    stats = _stats(actions)
    low, high = np.array(stats.q01), np.array(stats.q99)
    inside = np.clip(actions.astype(np.float64), low, high)
    inside[:, 6] = np.clip(actions[:, 6], 0, 1)
    there = codec.normalize(inside, stats)
    assert (np.abs(there) <= 1).all()
    back = codec.unnormalize(there, stats)
    assert np.abs(back - inside).max() <= 1e-7


def test_the_ends_of_the_range_belong_to_the_end_bins() -> None:
    ends = np.array([[-2.0, -1.0, -1 + 2 / 256, 0.0, 1 - 1e-9, 1.0, 2.0]])
    assert codec.normalized_to_bins(ends).tolist() == [[0, 0, 1, 128, 255, 255, 255]]


def test_a_constant_movement_is_zero_and_decodes_to_its_constant() -> None:
    actions = np.zeros((4, 7), np.float32)
    actions[:, 2] = 0.3
    actions[:, 0] = [0, 1, 2, 3]
    stats = _stats(actions)
    assert codec.normalize(actions, stats)[:, 2].tolist() == [0.0] * 4
    assert codec.decode(codec.encode(actions, stats), stats)[:, 2] == pytest.approx(0.3)
    assert stats.moving.tolist() == [True] + [False] * 6


@pytest.mark.parametrize(("value", "is_open"), [(1.0, True), (0.0, False)])
def test_a_constant_gripper_keeps_its_value(value: float, is_open: bool) -> None:
    actions = np.zeros((4, 7), np.float32)
    actions[:, 6] = value
    stats = _stats(actions)
    decoded = codec.decode(codec.encode(actions, stats), stats)[:, 6]
    assert ((decoded > 0.5) == is_open).all()
    # The centre of its bin, without a threshold.
    assert decoded[0] == pytest.approx(0.99609375 if is_open else 0.00390625)


def test_clipped_counts_movements_outside_the_quantiles_and_grippers_outside_zero_to_one() -> None:
    rng = np.random.default_rng(0)
    actions = rng.normal(size=(1000, 7)).astype(np.float32)
    lost = codec.clipped(actions, _stats(actions)).mean(axis=0)
    assert (lost[:6] == 0.02).all()
    assert lost[6] > 0.5


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_an_action_that_is_not_finite_is_named_and_refused(bad: float) -> None:
    actions = np.zeros((4, 7))
    actions[2, 5] = bad
    with pytest.raises(ValueError, match="step 2, dimension 5"):
        codec.encode(actions, _stats(np.ones((2, 7), np.float32)))


def test_a_wrong_width_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected \[T, 7\]"):
        codec.encode(np.zeros((4, 8)), _stats(np.ones((2, 7), np.float32)))


@given(arrays(np.int64, st.tuples(st.integers(1, 4), st.just(7)), elements=st.integers(0, 255)))
def test_answers_round_trip(bins: NDArray[np.int64]) -> None:
    assert (codec.text_to_bins(codec.bins_to_text(bins), 7) == bins).all()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<ACTION_256>" * 7,
        "<ACTION_99999999999999999999>" * 7,
        "<ACTION_1>" * 6,
        "<ACTION_01>" * 7,
        "<ACTION_1> and" + "<ACTION_1>" * 6,
        "<ACTION_-1>" * 7,
        "left",
    ],
)
def test_anything_but_whole_actions_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"action tokens|the tokens"):
        codec.text_to_bins(text, 7)


def test_a_bin_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="bin 256"):
        codec.bins_to_normalized(np.array([[256]]))


def test_a_gripper_below_its_range_is_never_decoded() -> None:
    stats = _stats(np.eye(7, dtype=np.float32))
    assert stats.possible_bins("uniform256").sum(axis=1).tolist() == [256] * 6 + [128]
    with pytest.raises(ValueError, match="step 0, dimension 6: bin 0 is below a gripper's range"):
        codec.decode(np.array([[128] * 6 + [0]]), stats)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q99": [1.0] * 6}, "differ in length"),
        ({"q01": [float("nan")] * 7}, "finite number"),
        (None, "at least 1 item"),
    ],
)
def test_a_codec_that_could_not_act_is_refused_when_read(
    tmp_path: Path, change: dict[str, list[float]] | None, message: str
) -> None:
    stats = _stats(np.eye(7, dtype=np.float32)).model_dump(mode="json")
    datasets = {} if change is None else {"viola": stats | change}
    (tmp_path / codec.CODEC_FILE).write_text(json.dumps({"action_dim": 7, "datasets": datasets}))
    with pytest.raises(UserError, match=message):
        codec.read_codec(tmp_path)


def test_the_unnorm_key_is_chosen_for_the_user_only_when_there_is_no_choice(tmp_path: Path) -> None:
    stats = _stats(np.eye(7, dtype=np.float32))
    one = ActionCodec(action_dim=7, datasets={"viola": stats})
    assert one.stats(None)[0] == "viola"
    two = ActionCodec(action_dim=7, datasets={"viola": stats, "kuka": stats})
    with pytest.raises(UserError, match="one of: kuka, viola"):
        two.stats(None)
    with pytest.raises(UserError, match="did you mean viola"):
        two.stats("voila")
    codec.write_codec(tmp_path, two)
    assert codec.read_codec(tmp_path) == two


def test_statistics_are_numpys_over_every_step_in_openvlas_layout() -> None:
    actions = np.random.default_rng(1).normal(size=(997, 7)).astype(np.float32)
    own = openvla_layout({"viola": DatasetStats(actions=action_stats(actions, MASK, 31))})["viola"]
    assert own["num_transitions"] == 997
    assert own["num_trajectories"] == 31
    assert own["action"]["mask"] == list(MASK)
    for key, expected in {
        "q01": np.quantile(actions.astype(np.float64), 0.01, axis=0),
        "q99": np.quantile(actions.astype(np.float64), 0.99, axis=0),
        "mean": actions.astype(np.float64).mean(axis=0),
        "std": actions.astype(np.float64).std(axis=0),
        "min": actions.min(axis=0),
        "max": actions.max(axis=0),
    }.items():
        # Summed column by column, the last digit may be another.
        assert own["action"][key] == pytest.approx(expected.tolist(), rel=1e-12), key
