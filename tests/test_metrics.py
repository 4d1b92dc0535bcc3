"""The figures of an evaluation, each worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from convert.action_codec import ActionStats, Bins, bins_to_normalized, decode, encode, unnormalize
from train_llava.metrics import POLICIES, Scored, by_dataset, rows, score, summary

BIN = 2 / 256  # a bin's width in the codec's range


def stats(low: tuple[float, ...], high: tuple[float, ...], mean: tuple[float, ...]) -> ActionStats:
    """Movements but for a gripper at the end, scaled by low and high."""
    zero = (0.0,) * len(low)
    mask = (True,) * (len(low) - 1) + (False,)
    return ActionStats(
        q01=low,
        q99=high,
        mean=mean,
        std=zero,
        min=low,
        max=high,
        mask=mask,
        num_transitions=9,
        num_trajectories=1,
    )


# x moves from -1 to 1 and y from 0 to 10, z is always 0.25; the gripper opens and closes. The means of x and
# y are the centres of their bins 128.
ARM = stats((-1.0, 0.0, 0.25, 0.0), (1.0, 10.0, 0.25, 1.0), (1 / 256, 5 + 5 / 256, 0.25, 0.75))
OPEN, CLOSED = 255, 128


def scored(target: Bins, predicted: Bins, own: ActionStats = ARM, name: str = "arm") -> Scored:
    """Samples [N, H, A] that are each the first of an episode; with shuffled frames all is right."""
    recorded = decode(target.reshape(-1, target.shape[-1]), own).reshape(target.shape)
    first = np.ones(len(target), np.bool_)
    return Scored(name, own, own, recorded, target, predicted, target, np.zeros_like(target[:, 0]), first)


def steps(*actions: tuple[int, int, int, int]) -> Bins:
    """Samples of one step each."""
    return np.array(actions)[:, None]


TARGET = steps((100, 100, 128, OPEN), (100, 101, 128, CLOSED), (200, 100, 128, OPEN), (28, 128, 128, OPEN))
PREDICTED = steps((100, 102, 7, OPEN), (101, 101, 7, OPEN), (200, 100, 7, CLOSED), (38, 128, 7, OPEN))


def test_every_figure_of_one_dataset() -> None:
    own = score("uniform256", [scored(TARGET, PREDICTED)])["datasets"]["arm"]
    assert own["samples"] == 4
    assert own["moving"] == [0, 1, 3]  # z never moves: its 7 instead of 128 does not count
    # Off by, over x, y and the gripper: (0, 2, 0), (1, 0, 127), (0, 0, 127), (10, 0, 0).
    assert own["accuracy"]["model"] == {"exact": 7 / 12, "within_1": 8 / 12, "within_5": 9 / 12}
    assert own["l1"]["model"] == pytest.approx((2 + 1 + 127 + 127 + 10) * BIN / 12)
    # A bin is 2 / 256 of x's two units, 10 / 256 of y's, and in the gripper what it is in the codec's range.
    units = [11 * 2 / 256 / 4, 2 * 10 / 256 / 4, 0, 2 * 127 * BIN / 4]
    assert own["l1_robot_units"]["model"] == pytest.approx(units)
    # Closed: recorded 1, answered 1, never both. Open: recorded 3, answered 3, both 2.
    assert own["gripper_f1"]["model"] == {"closed": 0.0, "open": 2 * 2 / 6}
    assert own["gripper_f1"]["shuffled_images"] == {"closed": 1.0, "open": 1.0}
    assert own["accuracy"]["shuffled_images"] == {"exact": 1.0, "within_1": 1.0, "within_5": 1.0}
    assert own["l1"]["shuffled_images"] == 0
    # The mean's gripper of 0.75 is open: closed recorded 1, answered 0; open recorded 3, answered 4, both 3.
    assert own["gripper_f1"]["mean_action"] == {"closed": 0.0, "open": 6 / 7}
    assert "l1_by_step" not in own


def test_the_mean_action_is_the_datas() -> None:
    report = score("uniform256", [scored(TARGET, PREDICTED)])
    # Bin 128 for x and y.
    x, y = [28, 28, 72, 100], [28, 27, 28, 0]
    gripper = [255 / 256 - 0.75, 0.75 - 1 / 256, 255 / 256 - 0.75, 255 / 256 - 0.75]
    assert report["l1"]["mean_action"] == pytest.approx(((228 + 83) * BIN + sum(gripper)) / 12)
    units = report["datasets"]["arm"]["l1_robot_units"]["mean_action"]
    assert units == pytest.approx([sum(x) * BIN / 4, 5 * sum(y) * BIN / 4, 0, sum(gripper) / 4])
    # The gripper's 0.75 is bin 224: only y of the last sample is right.
    accuracy = {"exact": 1 / 12, "within_1": 1 / 12, "within_5": 1 / 12}
    assert report["accuracy"]["mean_action"] == accuracy


def test_repeating_the_last_action_starts_with_the_mean() -> None:
    # What stands as the last action of an episode's first sample is not looked at.
    last, first = np.array([TARGET[0, 0], [100, 100, 128, OPEN]]), np.array([True, False])
    samples = replace(scored(TARGET[:2], PREDICTED[:2]), last=last, first=first)
    own = score("uniform256", [samples])["datasets"]["arm"]
    # The mean is off by 28, 28 and 31 bins; the repeated one by (0, 1, 127).
    assert own["accuracy"]["repeat_last"] == {"exact": 1 / 6, "within_1": 2 / 6, "within_5": 2 / 6}
    mean = 56 * BIN + 255 / 256 - 0.75
    assert own["l1"]["repeat_last"] == pytest.approx((mean + 128 * BIN) / 6)
    # Both say open: closed is recorded once and never said, open recorded once and said twice.
    assert own["gripper_f1"]["repeat_last"] == {"closed": 0.0, "open": 2 / 3}


def test_all_steps_of_a_chunk_count_and_the_distance_is_said() -> None:
    target = np.array([[(100, 100, 128, OPEN)] * 3, [(10, 20, 128, OPEN)] * 3])
    predicted = target.copy()
    predicted[0, 1, 0] += 3
    predicted[1, 2, 1] -= 9
    last = np.array([[100, 100, 128, OPEN], [10, 20, 128, CLOSED]])
    samples = replace(scored(target, predicted), last=last, first=np.zeros(2, np.bool_))
    report = score("uniform256", [samples])
    assert report["l1_by_step"]["model"] == pytest.approx([0, 3 * BIN / 6, 9 * BIN / 6])
    assert report["l1"]["model"] == pytest.approx(12 * BIN / 18)
    assert report["accuracy"]["model"] == pytest.approx(
        {"exact": 16 / 18, "within_1": 16 / 18, "within_5": 17 / 18}
    )
    # The action before the chunk stands for each of its steps.
    assert report["l1_by_step"]["repeat_last"] == pytest.approx([127 * BIN / 6] * 3)
    assert report["datasets"]["arm"]["l1_by_step"] == report["l1_by_step"]
    assert report["datasets"]["arm"]["gripper_f1"]["repeat_last"] == {"closed": 0.0, "open": 2 * 3 / (6 + 3)}


def test_over_datasets_each_sample_weighs_the_same_and_each_gripper() -> None:
    # Of the second one only the gripper moves, and it has one sample.
    still = stats((0.0, 0.0, 0.0, 0.0), (0.0, 0.0, 0.0, 1.0), (0.0, 0.0, 0.0, 0.5))
    one = scored(steps((128, 128, 128, CLOSED)), steps((0, 0, 0, CLOSED + 20)), still, "still")
    report = score("uniform256", [scored(TARGET, PREDICTED), one])
    arm = report["datasets"]["arm"]["l1"]["model"]
    assert report["samples"] == 5
    assert report["l1"]["model"] == pytest.approx((4 * arm + 20 * BIN) / 5)
    assert report["accuracy"]["model"]["exact"] == pytest.approx(7 / 13)
    assert report["datasets"]["still"]["gripper_f1"]["model"] == {"closed": 1.0, "open": None}
    assert report["gripper_f1"]["model"] == pytest.approx((0 + 4 / 6 + 1) / 3)


def test_what_never_moves_counts_nowhere() -> None:
    fixed = stats((0.0, 0.0, 0.0, 1.0), (0.0, 0.0, 0.0, 1.0), (0.0, 0.0, 0.0, 1.0))
    target = steps((128, 128, 128, OPEN))
    alone = score("uniform256", [scored(target, steps((0, 0, 0, CLOSED)), fixed, "fixed")])
    assert alone["l1"] == dict.fromkeys(POLICIES)
    assert alone["accuracy"]["model"] == {"exact": None, "within_1": None, "within_5": None}
    assert alone["datasets"]["fixed"]["gripper_f1"]["model"] == {"closed": 0.0, "open": 0.0}
    assert alone["gripper_f1"]["model"] is None
    assert summary(alone).splitlines()[2].split() == ["model", *["-"] * 6]
    assert by_dataset(alone).splitlines()[2].split()[:6] == ["fixed", "1", "-", "-", "-", "0.00"]
    # Beside one that moves it changes no figure.
    both = score("uniform256", [scored(TARGET, PREDICTED), scored(target, target, fixed, "fixed")])
    one = score("uniform256", [scored(TARGET, PREDICTED)])
    assert {key: both[key] for key in ("l1", "accuracy", "gripper_f1")} == {
        key: one[key] for key in ("l1", "accuracy", "gripper_f1")
    }


def test_without_a_gripper_there_is_no_f1() -> None:
    flying = ARM.model_copy(update={"mask": (True,) * 4})
    report = score("uniform256", [scored(TARGET, PREDICTED, flying)])
    assert report["datasets"]["arm"]["gripper_f1"] == dict.fromkeys(POLICIES)
    assert report["gripper_f1"] == dict.fromkeys(POLICIES)


def test_a_model_with_statistics_of_its_own_is_measured_in_robot_units() -> None:
    """Its x spans -2 to 2, so a bin is twice as wide; its y is always 3: it can say no other."""
    acts = stats((-2.0, 3.0, 0.25, 0.0), (2.0, 3.0, 0.25, 1.0), (1.0, 3.0, 0.25, 0.0))
    recorded = np.array([[[0.51, 4.0, 0.25, 1.0]]])
    target = encode(recorded[0], acts)[None]
    assert target[0, 0].tolist() == [160, 128, 128, 255]
    predicted = target + np.array([4, 9, 0, 0])
    none = np.zeros((1, 4), np.int64)
    one = Scored("arm", acts, ARM, recorded, target, predicted, target, none, np.ones(1, np.bool_))
    report = score("uniform256", [one])
    own = report["datasets"]["arm"]
    assert own["moving"] == [0, 3]
    assert own["accuracy"]["model"] == {"exact": 0.5, "within_1": 0.5, "within_5": 1.0}
    assert own["l1"]["model"] == pytest.approx(4 * BIN / 2)
    # Bin 164 is 164.5 / 256 of the way from -2 to 2; y is always said as 3, and the gripper as 255 / 256.
    assert own["l1_robot_units"]["model"] == pytest.approx([-2 + 4 * 164.5 / 256 - 0.51, 1, 0, 1 / 256])
    # The mean is the data's, 1 / 256, and not that of what the model was trained on.
    assert own["l1_robot_units"]["mean_action"] == pytest.approx([0.51 - 1 / 256, 1, 0, 0.25])


def test_openvlas_last_bin_is_right_when_it_is_said() -> None:
    """Its bin 255 decodes as 254 does; told and said, it is the same token."""
    target = steps((255, 100, 128, OPEN))
    report = score("openvla255", [scored(target, target)])
    assert report["accuracy"]["model"]["exact"] == 1.0


def test_the_tables_say_what_the_report_says() -> None:
    report = score("uniform256", [scored(TARGET, PREDICTED)])
    l1, mean = report["l1"]["model"], report["l1"]["mean_action"]
    expected = ("model", f"{l1:.3f}", f"{l1 / mean:.2f}", "58.3%", "66.7%", "75.0%", "0.33")
    assert rows(report)[0] == expected
    assert summary(report).splitlines()[0].startswith("4 held-out samples  ")
    assert summary(report, "training sample").startswith("4 training samples  ")
    assert "loss" not in summary(report)
    told = summary(report | {"loss": {"model": 1.23456, "shuffled_images": 5.0}}).splitlines()
    assert [line.split()[-1] for line in told] == ["loss", told[1].split()[-1], "1.235", "5.000", "-", "-"]
    assert by_dataset(report).splitlines()[2].split() == [
        *("arm", "4", f"{l1:.3f}", f"{l1 / mean:.2f}", "75.0%", "0.00", "0.67"),
        *("0.0215", "0.0195", "0.0000", "0.4961"),
    ]


bins = arrays(np.int64, (5, 2, 4), elements=st.integers(128, 255))


@settings(max_examples=50)
@given(bins, bins)
def test_figures_stay_in_their_range_and_agree(target: Bins, predicted: Bins) -> None:
    report = score("uniform256", [scored(target, predicted)])
    for name in POLICIES:
        hits = report["accuracy"][name]
        assert 0 <= hits["exact"] <= hits["within_1"] <= hits["within_5"] <= 1
        assert report["l1"][name] == pytest.approx(np.mean(report["l1_by_step"][name]))
        assert (report["l1"][name] == 0) == (hits["exact"] == 1) or name == "mean_action"
    # A single dataset is the whole.
    assert {key: report["datasets"]["arm"][key] for key in ("l1", "l1_by_step", "accuracy")} == {
        key: report[key] for key in ("l1", "l1_by_step", "accuracy")
    }
    # Robot units are the codec's range, stretched: x by 1, y by 5.
    off = np.abs(bins_to_normalized(predicted) - bins_to_normalized(target)).mean(axis=(0, 1))
    units = report["datasets"]["arm"]["l1_robot_units"]["model"]
    assert units == pytest.approx([off[0], 5 * off[1], 0, off[3]], abs=1e-6)
    # Who answers with what was recorded makes no mistake, and the order of the samples changes nothing.
    right = score("uniform256", [scored(target, target)])
    assert right["l1"]["model"] == 0
    assert right["gripper_f1"]["model"] in (None, 1.0)
    turned = score("uniform256", [scored(target[::-1], predicted[::-1])])
    assert turned["l1"]["model"] == pytest.approx(report["l1"]["model"])
    assert turned["gripper_f1"] == report["gripper_f1"]


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=30))
def test_f1_is_the_harmonic_mean_of_precision_and_recall(pairs: list[tuple[bool, bool]]) -> None:
    target, predicted = (
        steps(*((128, 128, 128, OPEN if pair[i] else CLOSED) for pair in pairs)) for i in (0, 1)
    )
    f1 = score("uniform256", [scored(target, predicted)])["datasets"]["arm"]["gripper_f1"]["model"]
    for state, name in ((True, "open"), (False, "closed")):
        both = pairs.count((state, state))
        recorded, answered = (sum(pair[i] == state for pair in pairs) for i in (0, 1))
        if not recorded + answered:
            assert f1[name] is None
        elif not both:
            assert f1[name] == 0
        else:
            precision, recall = both / answered, both / recorded
            assert f1[name] == pytest.approx(2 * precision * recall / (precision + recall))


def test_nothing_is_lost_between_bins_and_units() -> None:
    """The helper records what the tokens say."""
    samples = scored(TARGET, PREDICTED)
    assert np.array_equal(samples.recorded[:, 0], unnormalize(bins_to_normalized(TARGET[:, 0]), ARM))
