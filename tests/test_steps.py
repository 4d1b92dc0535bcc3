"""Which steps become samples: chunks, idle steps, strides and samples, alone and through the command."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from convert import action_codec as codec
from convert.manifest import read_manifest
from convert.reader import ConversationReader
from convert.statistics import action_stats
from convert.steps import StepRules, choose, chunks, idle
from tests.converting import convert, lines_of, viola_episode, viola_folder

MASK = (True, True, False)
MOVEMENT = np.array(MASK)
ACTIONS = np.array([[1, 2, 1], [3, 4, 1], [5, 6, 0]], np.float32)


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        ("repeat", [[0, 1], [1, 2], [2, 2]]),
        ("drop", [[0, 1], [1, 2]]),
    ],
)
def test_a_chunk_holds_the_steps_ahead(end: str, expected: list[list[int]]) -> None:
    ahead = chunks(ACTIONS, MOVEMENT, 2, end)  # type: ignore[arg-type]
    assert ahead.tolist() == ACTIONS[np.array(expected)].tolist()


def test_past_the_end_of_deltas_nothing_moves_and_the_gripper_is_kept() -> None:
    ahead = chunks(ACTIONS, MOVEMENT, 3, "neutral")
    assert ahead[1].tolist() == [[3, 4, 1], [5, 6, 0], [0, 0, 0]]
    assert ahead[2].tolist() == [[5, 6, 0], [0, 0, 0], [0, 0, 0]]


@given(st.integers(1, 12), st.integers(1, 15), st.sampled_from(["repeat", "neutral", "drop"]))
def test_every_chunk_begins_with_its_own_step(num_steps: int, chunk: int, end: str) -> None:
    actions = np.arange(num_steps * 3, dtype=np.float32).reshape(num_steps, 3)
    ahead = chunks(actions, MOVEMENT, chunk, end)  # type: ignore[arg-type]
    assert ahead.shape == (max(0, num_steps - chunk + 1) if end == "drop" else num_steps, chunk, 3)
    assert (ahead[:, 0] == actions[: len(ahead)]).all()
    for h in range(chunk):
        inside = np.arange(len(ahead)) + h < num_steps
        assert (ahead[inside, h] == actions[h : h + inside.sum()]).all()


def _stats() -> codec.ActionStats:
    spread = np.linspace(-1, 1, 201, dtype=np.float32)
    return action_stats(np.stack([spread, spread, (spread > 0).astype(np.float32)], axis=1), MASK, 1)


def test_a_step_that_moves_less_than_half_a_bin_and_keeps_the_gripper_is_idle() -> None:
    # Half a bin is 0.0039 of this range.
    rows = [[0, 0, 1], [0.003, -0.003, 1], [0.02, 0, 1], [0, -0.02, 1], [0, 0, 0], [0, 0, 0]]
    actions = np.array(rows, np.float32)
    assert idle(actions, _stats(), delta=True).tolist() == [
        True,
        True,
        False,
        False,
        False,
        True,
    ]


def test_an_absolute_pose_is_idle_when_it_is_told_again() -> None:
    actions = np.array([[0.5, 0, 1], [0.5, 0, 1], [0.6, 0, 1], [0.6, 0, 0], [0.6, 0, 0]], np.float32)
    assert idle(actions, _stats(), delta=False).tolist() == [False, True, False, False, True]


@pytest.mark.parametrize("delta", [True, False])
def test_an_episode_that_waits_throughout_keeps_all_its_steps(delta: bool) -> None:
    still = np.tile(np.array([[0, 0, 1]], np.float32), (5, 1))
    kept = ~idle(still, _stats(), delta=delta)
    assert kept.any()
    assert kept.all() == delta


def test_each_step_falls_to_the_first_reason_and_all_are_counted() -> None:
    a, b = np.array([1, 1, 0, 0, 0, 0], bool), np.array([0, 1, 1, 0, 0, 0], bool)
    steps, dropped = choose([("a", a), ("b", b)], StepRules(stride=2, per_episode=1), lambda t: -t)
    assert steps == [5]
    assert dropped == Counter(a=2, b=1, stride=1, not_sampled=1)


@given(st.integers(0, 40), st.integers(1, 5), st.integers(1, 10), st.integers(1, 10))
def test_a_larger_sample_holds_a_smaller_one(num_steps: int, stride: int, small: int, more: int) -> None:
    none = [("a", np.zeros(num_steps, bool))]

    def rank(t: int) -> float:
        return (t * 7919 % 101) / 101

    few, _ = choose(none, StepRules(stride=stride, per_episode=small), rank)
    many, dropped = choose(none, StepRules(stride=stride, per_episode=small + more), rank)
    assert set(few) <= set(many)
    assert many == sorted(many)
    assert len(many) + dropped.total() == num_steps


# --- through the command ---


@pytest.fixture(scope="module")
def moving(bucket: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two episodes of 10 and 7 steps, the first with three idle ones."""
    moves = [0.5, 0, 0, 1, -1, 0, 2, 3, 4, 5]
    records = [
        viola_episode(["Push it"] * 10, moves=moves),
        viola_episode(["Pull it"] * 7, moves=[1, 2, 3, 4, 5, 6, 7]),
    ]
    return viola_folder(tmp_path_factory.mktemp("moving"), bucket, records)


def _steps(out: Path) -> dict[int, list[int]]:
    steps: dict[int, list[int]] = {0: [], 1: []}
    for line in lines_of(out):
        steps[line["episode"]].append(line["step"])
    return steps


def test_a_stride_takes_every_so_many_and_counts_the_others(moving: Path, tmp_path: Path) -> None:
    said = convert(moving, tmp_path, "--stride", "3")
    assert _steps(tmp_path) == {0: [0, 3, 6, 9], 1: [0, 3, 6]}
    assert "dropped 10 (stride 10)" in said
    steps = read_manifest(tmp_path).datasets[0].steps
    assert (steps.total, steps.written, steps.dropped) == (17, 7, {"stride": 10})
    assert len(list((tmp_path / "images").rglob("*.jpg"))) == 7


def test_idle_steps_are_dropped_before_the_stride_and_statistics_hold_them_all(
    moving: Path, tmp_path: Path
) -> None:
    convert(moving, tmp_path, "--drop-idle", "--stride", "2")
    assert _steps(tmp_path) == {0: [0, 4, 7, 9], 1: [0, 2, 4, 6]}
    assert read_manifest(tmp_path).datasets[0].steps.dropped == {"idle": 3, "stride": 6}
    assert codec.read_codec(tmp_path).datasets["viola"].num_transitions == 17


def test_a_sample_of_each_episode_is_seeded_and_nested(moving: Path, tmp_path: Path) -> None:
    for name, number in (("few", "2"), ("again", "2"), ("many", "6")):
        convert(moving, tmp_path / name, "--steps-per-episode", number)
    few, again, many = (_steps(tmp_path / name) for name in ("few", "again", "many"))
    assert few == again
    assert [len(steps) for steps in few.values()] == [2, 2]
    assert all(set(few[e]) <= set(many[e]) and many[e] == sorted(many[e]) for e in few)
    assert read_manifest(tmp_path / "few").datasets[0].steps.dropped == {"not_sampled": 13}


@pytest.mark.parametrize(("end", "last"), [(None, [0, 0]), ("repeat", [7, 7]), ("neutral", [0, 0])])
def test_chunks_look_ahead_at_the_sources_rate_whatever_is_left_out(
    end: str | None, last: list[float], moving: Path, tmp_path: Path
) -> None:
    """viola's actions are deltas, so without a word the end of an episode is filled with no movement."""
    more = ["--chunk-end", end] if end else []
    convert(moving, tmp_path, "--chunk", "3", "--stride", "3", *more)
    own = codec.read_codec(tmp_path)
    assert (own.chunk, own.tokens_per_answer) == (3, 21)
    stats = own.datasets["viola"]
    reader = ConversationReader(tmp_path, "train")
    decoded = [codec.decode(codec.text_to_bins(reader[i].answer, 7), stats)[:, 0] for i in range(len(reader))]
    half_a_bin = (stats.q99[0] - stats.q01[0]) / 512 + 1e-6
    first = np.clip([1, 2, 3], stats.q01[0], stats.q99[0])
    assert np.abs(decoded[4] - first).max() <= half_a_bin
    ahead = np.clip([7, *last], stats.q01[0], stats.q99[0])
    assert np.abs(decoded[-1] - ahead).max() <= half_a_bin


def test_a_chunk_that_reaches_past_the_end_can_be_dropped_and_is_counted(
    moving: Path, tmp_path: Path
) -> None:
    convert(moving, tmp_path, "--chunk", "8", "--chunk-end", "drop")
    assert _steps(tmp_path) == {0: [0, 1, 2], 1: []}
    dataset = read_manifest(tmp_path).datasets[0]
    assert dataset.steps.dropped == {"past_the_end": 14}
    assert dataset.episodes.dropped == {"past_the_end": 1}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--chunk-end", "hover"), "--chunk-end hover: unknown; known: repeat, neutral, drop"),
        (("--layout", "zip"), "--layout zip: unknown; known: files, tar"),
        (("--images", "webp"), "--images webp: write keep, or jpeg:Q with Q from 1 to 100"),
        (("--images", "jpeg:101"), "--images jpeg:101: write keep"),
        (("--binning", "512"), "--binning 512: unknown; known: uniform256, openvla255"),
        (("--prompt", "do it"), "--prompt: 'do it' must hold {instruction} exactly once"),
        (("--prompt", "<image> {instruction}"), "must be one line without <image>"),
        (("--cameras", "primary,primary"), "--cameras: primary, primary: a camera stands here twice"),
        (("--cameras", "left"), "--cameras: Input should be 'primary', 'secondary' or 'wrist'"),
        (("--only", "viola", "--only", "kuka"), "--only kuka: not among what is to be converted: viola"),
        (("--only", "voila"), "did you mean viola"),
        (("--val-fraction", "1"), "--val-fraction 1 is not in [0, 1)"),
        (("--on-bad-record", "mend"), "--on-bad-record mend: unknown; known: stop, skip"),
        (("--statistics", "some"), "--statistics some: unknown; known: all, train"),
        (("--to", "lerobot"), "--to lerobot: unknown format; known: llava"),
    ],
)
def test_an_option_that_makes_no_sense_is_one_line_and_writes_nothing(
    words: tuple[str, ...], message: str, moving: Path, tmp_path: Path
) -> None:
    assert f"{message}" in convert(moving, tmp_path / "out", *words, code=2)
    assert not (tmp_path / "out").exists()
