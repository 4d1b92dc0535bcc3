"""What the pages of `oxe-mix report` are computed with: arrows, histograms, bars, and frames that fit."""

from __future__ import annotations

import re
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from convert.action_codec import encode
from convert.statistics import action_stats
from oxe_mix.errors import UserError
from oxe_mix.synth.frames import black
from tests.converting import picture
from train_llava.report.figures import action_dimensions, arrows, distances, length_histogram, reach, thin
from train_llava.report.pictures import share_of_frames, strip
from train_llava.report.shapes import HEIGHT, bars
from train_llava.report.values import Recorded


def test_poses_have_arrows_of_their_change_and_joints_none() -> None:
    actions = np.array([[0.1, 0.2, 0.3, 1], [0.4, 0.2, 0.1, 0]])
    assert arrows(actions, "delta").tolist() == actions[:, :3].tolist()
    np.testing.assert_allclose(arrows(actions, "change"), np.array([[0, 0, 0], [0.3, 0, -0.2]]))
    assert arrows(actions, "none").shape == (2, 0)
    still = Recorded("a", "", np.arange(2), np.zeros((2, 4)))
    assert reach([still], "delta") == reach([still], "none") == reach([], "delta") == (0.0, 0.0)


def test_a_dimension_is_drawn_around_its_quantiles_and_what_lies_outside_is_counted() -> None:
    actions = np.random.default_rng(0).standard_cauchy((4_000, 2)).astype(np.float32)
    actions[:, 1] = actions[:, 1] > 0
    stats = action_stats(actions, (True, False), 1)
    x, gripper = action_dimensions(
        actions.astype(np.float64), encode(actions, stats), stats, ("x", "gripper"), "uniform256"
    )
    low, high = np.quantile(actions[:, 0].astype(np.float64), [0.01, 0.99])
    assert (x.q01, x.q99) == pytest.approx((low, high))
    assert (x.low, x.high) == pytest.approx((actions[:, 0].min(), actions[:, 0].max()))
    shown = x.histogram
    assert (shown.low, shown.high) == pytest.approx((low - 0.35 * (high - low), high + 0.35 * (high - low)))
    outside = [int((actions[:, 0] < shown.low).sum()), int((actions[:, 0] > shown.high).sum())]
    assert [shown.below, shown.above] == outside
    assert min(outside) > 0
    assert shown.total == x.bins.sum() == 4_000
    assert x.clipped == pytest.approx(0.02, abs=1e-3)
    assert (gripper.used, gripper.possible, gripper.clipped) == (2, 128, 0)
    assert (gripper.histogram.low, gripper.histogram.high) == (0, 1)


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=50))
def test_each_episode_is_in_one_bar_of_the_lengths(lengths: list[int]) -> None:
    histogram = length_histogram(lengths)
    assert histogram is not None
    assert histogram.total == len(lengths)
    step = (histogram.high - histogram.low) / len(histogram.counts)
    assert step == round(step)
    first = sum(histogram.low <= length < histogram.low + step for length in lengths)
    assert histogram.counts[0] == first


@given(st.integers(1, 2000), st.integers(2, 50))
def test_thinning_keeps_both_ends(num: int, most: int) -> None:
    kept = thin(num, most)
    assert kept[0] == 0
    assert kept[-1] == num - 1
    assert len(kept) == min(num, most)


def test_bins_are_counted_by_their_distance() -> None:
    target, said = np.array([10, 10, 10, 10, 10]), np.array([10, 11, 5, 31, 200])
    assert distances(target, said, (0, 1, 5, 20)).tolist() == [1, 1, 1, 0, 2]


def test_the_largest_bar_is_as_high_as_the_chart_and_a_rare_one_is_seen() -> None:
    heights = [float(height) for height in re.findall(r"v-([\d.]+)", bars([1, 0, 100_000]))]
    assert heights == [2, HEIGHT]


def test_frames_of_a_long_episode_are_thinned_until_they_fit() -> None:
    frames = [picture(256, 256, seed=i) for i in range(10)]
    # What stands at the ends and in the middle tells nothing of the size of the others.
    readers = [partial(frames.__getitem__, i % 10) for i in range(500)]
    for i in (0, 250, 499):
        readers[i] = partial(black, 256, 256, "jpeg")
    episode = Recorded("a", "", np.arange(500), np.zeros((500, 7)), tuple(readers))
    for share in (200_000, 50_000, 12_000):
        own = strip(episode, "delta", share)
        assert sum(map(len, own.frames)) <= share
        assert 3 <= len(own.frames) <= 40
        assert (own.shown[0], own.shown[-1]) == (0, len(own.steps) - 1)
        assert own.steps[own.shown].tolist() == thin(500, len(own.frames)).tolist()
        assert len(own.steps) <= 240 + 40
        assert own.sheet[0] == 0
        assert own.sheet[-1] == len(own.frames) - 1


def test_more_episodes_than_a_page_holds_are_refused() -> None:
    assert share_of_frames(26, 3) * 26 * 3 <= 11_000_000
    with pytest.raises(UserError, match="give at most 19"):
        share_of_frames(26, 20)
