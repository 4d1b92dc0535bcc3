"""What the pages of `oxe-mix report` are computed with: arrows, histograms, bars, and frames that fit."""

from __future__ import annotations

import io
import re
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from convert.action_codec import ActionStats, encode
from convert.statistics import action_stats
from oxe_mix.errors import UserError
from oxe_mix.synth.frames import black
from tests.converting import picture
from tests.report_pages import bars_of, levels_of, points_of
from train_llava.report.figures import (
    action_dimensions,
    arrows,
    distances,
    length_histogram,
    reach,
    telling,
    thin,
)
from train_llava.report.pictures import Room, jpeg, room_of, strip
from train_llava.report.predictions import movements
from train_llava.report.run_charts import charts, not_finite
from train_llava.report.shapes import HEIGHT, across, bars, line, steps
from train_llava.report.values import Histogram, Motion, Recorded, Strip


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


def _one_of(frames: tuple[bytes, ...], i: int) -> tuple[bytes, ...]:
    return (frames[i % len(frames)],)


def test_cameras_stand_side_by_side_as_high_as_the_lowest() -> None:
    white = Image.new("RGB", (64, 32), "white")
    out = io.BytesIO()
    white.save(out, "PNG")
    shown = np.asarray(Image.open(io.BytesIO(jpeg([black(128, 128, "jpeg"), out.getvalue()], 100, 90))))
    assert shown.shape == (32, 32 + 64, 3)
    assert shown[:, :30].max() < 20
    assert shown[:, 34:].min() > 235


def test_frames_of_a_long_episode_are_thinned_until_they_fit() -> None:
    frames = tuple(picture(256, 256, seed=i) for i in range(10))
    # What stands at the ends and in the middle tells nothing of the size of the others.
    readers = [partial(_one_of, frames, i) for i in range(500)]
    for i in (0, 250, 499):
        readers[i] = partial(_one_of, (black(256, 256, "jpeg"),), i)
    episode = Recorded("a", "", np.arange(500), np.zeros((500, 7)), tuple(readers))
    for share in (200_000, 50_000, 12_000):
        own = strip(episode, "delta", Room(share, 400))
        assert share * 0.6 <= sum(map(len, own.frames)) <= share
        assert (own.shown[0], own.shown[-1]) == (0, len(own.steps) - 1)
        assert own.steps[own.shown].tolist() == thin(500, len(own.frames)).tolist()
        assert 400 <= len(own.steps) <= 400 + len(own.frames)
        assert own.sheet[0] == 0
        assert own.sheet[-1] == len(own.frames) - 1


def test_more_episodes_than_a_page_holds_are_refused() -> None:
    assert room_of(26, 3).num_bytes * 26 * 3 <= 11_000_000
    assert room_of(1, 3).num_steps >= 20_000
    with pytest.raises(UserError, match="give at most 19"):
        room_of(26, 20)


def test_a_curve_rises_with_its_values_and_has_a_gap_where_there_is_none() -> None:
    xs, ys = np.array([0.0, 5, 6, 10]), np.array([0.0, 1, np.nan, 2])
    path = line(xs, ys, (0, 10, 0, 2))
    assert points_of(path) == [(0, 100), (200, 50), (400, 0)]
    assert re.findall("[MLh]", path) == ["M", "L", "M", "h"]  # a point alone is seen, too


def test_a_timeline_is_high_where_its_value_is() -> None:
    assert levels_of(steps(np.array([0.0, 1, 0.5]))) == [0, 1, 0.5]
    assert steps(np.array([0.0, 1])) == "M0 98V98H200V2H400"
    assert len(levels_of(steps(np.linspace(0, 1, 9000)))) == 9000


def test_of_a_long_curve_the_extremes_and_the_gaps_are_drawn() -> None:
    loss = np.random.default_rng(0).normal(1, 0.1, 3000)
    loss[2001], loss[77] = 50, -3
    loss[1001] = np.nan
    kept = telling([loss, np.full(3000, np.nan)], 500)
    assert {0, 77, 1001, 2001, 2999} <= set(kept.tolist())
    assert len(kept) < 3 * 500 + 500
    drawn = line(kept.astype(np.float64), loss[kept], (0, 2999, 0, 50))
    assert drawn.count("M") == 2
    assert min(y for _, y in points_of(drawn)) == 0
    assert telling([loss[:500]], 500).tolist() == list(range(500))


def test_a_value_stands_where_its_histogram_has_it() -> None:
    histogram = Histogram(np.array([1, 2]), -1.0, 3.0)
    assert [float(across(value, histogram)) for value in (-2, -1, 0, 3, 9)] == [0, 0, 100, 400, 400]


def test_bars_may_stand_on_a_part_of_the_chart() -> None:
    assert bars_of(bars([1, 0, 2, 4], gap=False, span=(100, 300))) == [(100, 25), (200, 50), (250, 100)]


@pytest.mark.parametrize(("frames", "shown"), [(1, (0,)), (2, (0, 1)), (3, (0, 1, 2)), (9, (0, 4, 8))])
def test_the_middle_frame_is_in_the_middle(frames: int, shown: tuple[int, ...]) -> None:
    places, nothing = np.arange(frames), np.zeros((frames, 0))
    own = Strip("a", "", frames, places, nothing, nothing, places, (b"",) * frames)
    assert own.sheet == shown


def test_every_action_of_a_long_episode_is_kept_where_the_page_has_room() -> None:
    frame = partial(_one_of, (black(64, 64, "jpeg"),), 0)
    episode = Recorded("a", "", np.arange(900), np.zeros((900, 7)), (frame,) * 900)
    own = strip(episode, "delta", room_of(26, 3))
    assert own.steps.tolist() == list(range(900))
    assert len(own.frames) > 40


def _stats(q01: tuple[float, ...], q99: tuple[float, ...]) -> ActionStats:
    rest = {"mean": (0.0,) * 7, "std": (1.0,) * 7, "min": q01, "max": q99}
    mask = (True,) * 6 + (False,)
    return ActionStats(q01=q01, q99=q99, mask=mask, num_transitions=1, num_trajectories=1, **rest)


def test_recorded_and_predicted_movements_are_arrows_of_one_scale() -> None:
    stats = _stats((-0.3, -0.1, 0, 0, 0, 0, 0), (0.1, 0.4, 0, 0, 0, 0, 1))
    recorded, predicted = np.array([0.1, 0.2, 0, 0, 0, 0, 1]), np.array([-0.3, 0.4, 0, 0, 0, 0, 1])
    drawn, words = movements(recorded, predicted, stats, "delta")
    # 0.3 and 0.4 away from nothing: a full arrow is 0.5 long.
    np.testing.assert_allclose(drawn, [(0.2, 0.4), (-0.6, 0.8)])
    assert words == "a full arrow is 0.5"
    drawn, _ = movements(recorded, predicted * 10, stats, "delta")
    np.testing.assert_allclose(drawn[1], (-0.6, 0.8))
    without: tuple[tuple[Motion, str], ...] = (("change", "poses"), ("none", "no directions"))
    for motion, why in without:
        drawn, words = movements(recorded, predicted, stats, motion)
        assert drawn == ()
        assert why in words


def _line(step: int, **figures: float) -> dict[str, object]:
    """An evaluation whose every figure is another one."""
    hits = {"exact": figures["exact"], "within_1": 0.55, "within_5": figures["within_5"]}
    report = {"l1": {"model": figures["l1"]}, "accuracy": {"model": hits}, "loss": {"model": figures["loss"]}}
    return {"step": step, "evaluation": report}


def test_each_chart_has_its_own_figure() -> None:
    own = [{"l1": 0.4, "exact": 0.1, "within_5": 0.6, "loss": 3.0}]
    own.append({"l1": 0.3, "exact": 0.2, "within_5": 0.7, "loss": 2.0})
    found = {chart.title: chart for chart in charts([_line(5, **own[0]), _line(10, **own[1])])}
    figures = ("l1", "exact", "within_5", "loss")
    titles = ("L1 on", "Exact bins on", "Within 5 bins on", "Loss on")
    for title, figure in zip(titles, figures, strict=True):
        chart = found.pop(f"{title} held-out episodes")
        [curve] = chart.curves
        assert curve.xs.tolist() == [5, 10]
        assert curve.ys.tolist() == [line[figure] for line in own]
        assert chart.box == (0, 10, 0, max(curve.ys))
    assert not found


def test_a_loss_that_is_no_number_is_a_gap_and_is_told() -> None:
    lines = [{"step": step, "loss": loss} for step, loss in enumerate([2.0, np.nan, 1.5, np.inf, 1.0], 1)]
    [chart] = charts(lines)
    logged, smooth = chart.curves
    for curve in (logged, smooth):
        assert np.isfinite(curve.ys).tolist() == [True, False, True, False, True]
    assert smooth.ys[[0, 2, 4]].tolist() == [2, 1.5, 1]  # of so few each is its own mean
    assert chart.box == (0, 5, 0, 2)
    [words] = not_finite(lines)
    assert words == "The training loss was not finite at step 2, 4; its curve has a gap there."
    assert list(charts(lines[1:2])) == []
    assert list(not_finite(lines[:1])) == []
