"""Actions are held to their limits, and nothing is made up."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from convert.action_codec import NUM_BINS, ActionCodec, ActionStats, Binning, decode
from oxe_mix.errors import UserError
from train_llava.acting.limits import Bounds, Floats, Limits, MaxNorm
from train_llava.acting.validator import ActionValidator, Checked, RejectedError

WIDTH = 7
MASK = (True,) * 6 + (False,)


def stats(low: list[float], high: list[float], **more: Any) -> ActionStats:
    """Quantiles at the ends of the range."""
    given: dict[str, Any] = {"q01": tuple(low), "q99": tuple(high), "min": tuple(low), "max": tuple(high)}
    given |= {"mean": tuple(low), "std": tuple(high), "mask": (True,) * (len(low) - 1) + (False,)}
    return ActionStats(**(given | more), num_transitions=1, num_trajectories=1)


# A percent of its recorded movements lie beyond the quantiles, to each side.
QUANTILES = {"q01": (-0.01,) * 6 + (0.0,), "q99": (0.01,) * 6 + (1.0,)}
ARM = stats([-0.1, -0.2, -0.3, -1, -1, -1, 0], [0.1, 0.2, 0.3, 1, 1, 1, 1], **QUANTILES)


def validator(
    limits: Limits | None = None,
    action: Literal["clamp", "reject"] = "clamp",
    own: ActionStats = ARM,
) -> ActionValidator:
    codec = ActionCodec(action_dim=len(own.mask), datasets={"arm": own, "other": own})
    return ActionValidator(codec, limits or Limits(), action=action)


def held_to(**bounds: Any) -> Limits:
    return Limits(datasets={"arm": Bounds(**bounds)})


def chunk(*rows: list[float]) -> Floats:
    """Rows of any width, filled with zeros."""
    return np.array([row + [0.0] * (WIDTH - len(row)) for row in rows])


def records(checked: Checked) -> list[dict[str, Any]]:
    return [one.as_record() for one in checked.clamped]


def test_the_recorded_range_is_the_limit_where_nothing_is_said() -> None:
    own = validator()
    checked = own.check("arm", chunk([0.1, 0.25, -0.4], [0, 0, 0, 0, 0, -1, 1.5]), None)
    assert checked.actions.tolist() == chunk([0.1, 0.2, -0.3], [0, 0, 0, 0, 0, -1, 1]).tolist()
    assert records(checked) == [
        {"step": 0, "dimension": 1, "given": 0.25, "limit": 0.2, "rule": "range"},
        {"step": 0, "dimension": 2, "given": -0.4, "limit": -0.3, "rule": "range"},
        {"step": 1, "dimension": 6, "given": 1.5, "limit": 1.0, "rule": "range"},
    ]
    assert own.counts["range"] == 3
    assert sum(own.counts.values()) == 3


def test_a_dataset_has_its_own_limits_and_the_default_for_the_rest() -> None:
    limits = Limits(
        default=Bounds(low=(-0.05, *[None] * 6), max_norm=MaxNorm(rotation=0.5)),
        datasets={"arm": Bounds(high=(0.3, None, None, None, None, None, 0.9), max_norm=None)},
    )
    own = validator(limits)
    given = chunk([-0.07, 0.1, 0, 1, 0, 0, 1])
    assert own.check("arm", given, None).actions.tolist() == chunk([-0.05, 0.1, 0, 1, 0, 0, 0.9]).tolist()
    other = own.check("other", given, None)
    assert other.actions.tolist() == chunk([-0.05, 0.1, 0, 0.5, 0, 0, 1]).tolist()
    assert records(other)[1] == {
        "step": 0, "dimension": 3, "given": 1.0, "limit": 0.5, "rule": "rotation_norm",
    }  # fmt: skip
    # Wider than what was recorded, because the user says so.
    assert own.check("arm", chunk([0.3]), None).clamped == []


def test_a_jump_is_measured_from_what_was_sent() -> None:
    own = validator(held_to(max_jump=(0.05, *[None] * 6)))
    checked = own.check("arm", chunk([0.09], [0.09], [0.05]), np.zeros(WIDTH))
    assert checked.actions[:, 0].tolist() == [0.05, 0.09, 0.05]
    assert records(checked) == [{"step": 0, "dimension": 0, "given": 0.09, "limit": 0.05, "rule": "jump"}]
    assert own.check("arm", chunk([0.09]), None).clamped == []
    # The nearer of two limits is the one that is named.
    near_the_end = own.check("arm", chunk([0.5]), chunk([0.08])[0])
    assert records(near_the_end)[0] | {"given": 0} == {
        "step": 0, "dimension": 0, "given": 0, "limit": 0.1, "rule": "range",
    }  # fmt: skip


def test_a_movement_that_is_too_long_keeps_its_direction() -> None:
    own = validator(held_to(max_norm={"translation": 0.05, "rotation": 2.0}))
    checked = own.check("arm", chunk([0.06, 0.08, 0, 1, 1, 1, 1]), None)
    assert checked.actions[0].tolist() == pytest.approx([0.03, 0.04, 0, 1, 1, 1, 1])
    assert records(checked) == [
        {"step": 0, "dimension": a, "given": value, "limit": 0.05, "rule": "translation_norm"}
        for a, value in ((0, 0.06), (1, 0.08))
    ]
    assert own.counts["translation_norm"] == 2


def test_a_shorter_movement_stays_inside_the_range_that_does_not_hold_zero() -> None:
    own = validator(held_to(low=(0.03, *[None] * 6), max_norm={"translation": 0.05}))
    checked = own.check("arm", chunk([0.031, 0.19]), None)
    # Shrunk in its direction alone it would be 0.008 along the first dimension.
    assert checked.actions[0, :2].tolist() == pytest.approx([0.03, 0.04])
    # The nearest to (10, 0.2): what the range takes off the first dimension is not what the length is for.
    wide = validator(held_to(max_norm={"translation": 0.125}))
    assert wide.check("arm", chunk([10, 0.2]), None).actions[0, :2].tolist() == pytest.approx([0.1, 0.075])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("action", ["clamp", "reject"])
def test_what_is_no_number_is_always_refused(value: float, action: Literal["clamp", "reject"]) -> None:
    own = validator(action=action)
    with pytest.raises(
        RejectedError, match=r"^arm: step 1, dimension 2: -?(nan|inf) \(not_finite\); nothing"
    ):
        own.check("arm", chunk([9], [0, 0, value]), None)
    with pytest.raises(RejectedError, match=r"^arm: the action before, dimension 0: "):
        own.check("arm", chunk([0]), chunk([value])[0])
    assert own.counts["not_finite"] == 2
    assert sum(own.counts.values()) == 2


def test_in_reject_mode_nothing_beyond_a_limit_is_sent() -> None:
    own = validator(held_to(max_jump=(0.05, *[None] * 6), max_norm={"rotation": 1.0}), "reject")
    inside = chunk([0.05], [0.1, 0.2, 0.3, 1])
    assert own.check("arm", inside, np.zeros(WIDTH)).actions.tolist() == inside.tolist()
    for actions, message in (
        (
            chunk([0.0], [0.04, 0.25]),
            r"^arm: step 1, dimension 1: 0.25 is beyond 0.2 \(range\); nothing is sent",
        ),
        (chunk([0.04], [0.1]), r"^arm: step 1, dimension 0: 0.1 is beyond 0.09 \(jump\)"),
        (
            chunk([0, 0, 0, 0.8, 0.8]),
            r"dimension 3: 0.8 is part of a vector longer than 1.0 \(rotation_norm\)",
        ),
    ):
        with pytest.raises(RejectedError, match=message):
            own.check("arm", actions, np.zeros(WIDTH))
    found = {rule: num for rule, num in own.counts.items() if num}
    assert found == {"range": 1, "jump": 1, "rotation_norm": 1}


def test_limits_that_contradict_each_other_send_nothing() -> None:
    own = validator(held_to(max_jump=(0.05, *[None] * 6), max_norm={"translation": 0.1}))
    with pytest.raises(
        RejectedError,
        match=r"^arm: step 0, dimension 0: within 0.05 of 0.2, the action before, nothing is in the range "
        r"-0.1 to 0.1 \(contradiction\); nothing is sent$",
    ) as caught:
        own.check("arm", chunk([0.1]), chunk([0.2])[0])
    assert caught.value.rule == "contradiction"
    slow = validator(held_to(max_jump=(None, 0.05, *[None] * 5), max_norm={"translation": 0.1}))
    with pytest.raises(
        RejectedError,
        match=r"dimensions 0 to 2: range and jump leave nothing shorter than 0\.15.*norm is 0\.1 ",
    ):
        slow.check("arm", chunk([0]), chunk([0, 0.2])[0])
    assert slow.counts["contradiction"] == 1


def test_another_width_is_no_action() -> None:
    for actions, previous in ((np.zeros((1, 6)), None), (np.zeros(7), None), (chunk([0]), np.zeros(1))):
        with pytest.raises(ValueError, match="actions are 7 wide"):
            validator().check("arm", actions, previous)


# Limits and actions of a scale at which every rule comes to bite.
values = st.floats(-2, 2)
row = arrays(np.float64, (WIDTH,), elements=values)
per_dimension = st.lists(st.one_of(st.none(), st.floats(0, 1)), min_size=WIDTH, max_size=WIDTH)


@st.composite
def any_limits(draw: st.DrawFn) -> Limits:
    low, high = np.sort(np.stack([draw(row), draw(row)]), axis=0)
    lengths = draw(
        st.fixed_dictionaries({}, optional={"translation": st.floats(0, 2), "rotation": st.floats(0, 2)})
    )
    return held_to(low=low, high=high, max_norm=lengths, max_jump=draw(per_dimension))


def satisfies(actions: Floats, limits: Limits, previous: Floats | None) -> bool:
    """By the definitions of the limits alone, with as much as the validator lets pass."""
    bounds, slack = limits.of("arm"), 3e-8
    assert bounds.low is not None
    assert bounds.high is not None
    before = actions[:-1] if previous is None else np.concatenate([previous[None], actions[:-1]])
    jumps = np.abs(actions[len(actions) - len(before) :] - before)
    allowed = np.array([np.inf if one is None else one for one in bounds.max_jump or [None] * WIDTH])
    lengths = [np.linalg.norm(actions[:, part], axis=1) for part in (slice(0, 3), slice(3, 6))]
    norms = bounds.max_norm or MaxNorm()
    return bool(
        (actions >= np.array(bounds.low, float) - slack).all()
        and (actions <= np.array(bounds.high, float) + slack).all()
        and (jumps <= allowed + slack).all()
        and all(
            norm is None or (length <= norm + slack).all()
            for norm, length in zip((norms.translation, norms.rotation), lengths, strict=True)
        )
    )


@settings(max_examples=150)
@given(any_limits(), arrays(np.float64, (3, WIDTH), elements=st.floats(-3, 3)), st.one_of(st.none(), row))
def test_what_is_sent_keeps_all_limits_and_a_second_check_changes_nothing(
    limits: Limits, actions: Floats, previous: Floats | None
) -> None:
    given_actions = actions.copy()
    try:
        checked = validator(limits).check("arm", actions, previous)
    except UserError:
        assume(False)  # limits that leave nothing; refused, and that is another test
    assert (actions == given_actions).all()  # the caller's own are not written to
    assert satisfies(checked.actions, limits, previous)
    changed = {(int(t), int(a)) for t, a in np.argwhere(checked.actions != actions)}
    assert [(one.step, one.dimension) for one in checked.clamped] == sorted(changed)
    assert all(one.given == actions[one.step, one.dimension] for one in checked.clamped)
    again = validator(limits, "reject").check("arm", checked.actions, previous)
    assert again.actions.tobytes() == checked.actions.tobytes()
    if satisfies(actions, limits, previous) and not checked.clamped:
        assert checked.actions.tobytes() == actions.tobytes()


@settings(max_examples=100)
@given(any_limits(), row, row, row, st.integers(0, 2**31))
def test_the_nearest_allowed_action_is_sent_and_an_allowed_one_as_it_is(
    limits: Limits, action: Floats, another: Floats, previous: Floats, seed: int
) -> None:
    try:
        own = validator(limits)
        sent, other = (own.check("arm", given[None], previous).actions[0] for given in (action, another))
    except UserError:
        assume(False)
    between = (sent + other)[None] / 2  # allowed too: of all limits' ranges none has a dent
    assert own.check("arm", between, previous).actions.tobytes() == between.tobytes()
    nudges = np.random.default_rng(seed).normal(size=(50, WIDTH)) * np.logspace(-4, 0, 50)[:, None]
    for near in (*(sent + nudges), *between, other):
        if satisfies(near[None], limits, previous):
            assert np.linalg.norm(sent - action) <= np.linalg.norm(near - action) + 1e-6


ends = st.tuples(st.floats(-1e3, 1e3), st.sampled_from([0.0, 1e-12, 1e-9, 1e-6, 1e-3, 1.0, 50.0]))


@settings(max_examples=100)
@given(st.lists(ends, min_size=6, max_size=6), st.sampled_from(["uniform256", "openvla255"]), st.booleans())
@example([(0.3, 0.0)] * 6, "openvla255", True)
@example([(-1e3, 1e-9)] * 6, "uniform256", False)
def test_whatever_a_model_can_say_is_inside_the_recorded_range(
    spans: list[tuple[float, float]], binning: Binning, is_constant: bool
) -> None:
    """Also of dimensions that never move, and of those whose quantiles are one value at the range's end."""
    low = [*(start for start, _ in spans), 0.0]
    high = [*(start + span for start, span in spans), 1.0]
    outliers = tuple(low) if is_constant else (*(start - 1 for start, _ in spans), 0.0)
    own = stats(low, high, min=outliers)
    bins = np.arange(NUM_BINS)[:, None].repeat(WIDTH, axis=1)
    first = int(np.flatnonzero(own.possible_bins(binning)[-1])[0])
    bins[:, -1] = np.maximum(bins[:, -1], first)
    said = decode(bins, own, binning)
    checked = validator(own=own).check("arm", said, None)
    assert checked.clamped == []
    assert checked.actions.tobytes() == said.tobytes()
    beyond = said[-1:].copy()
    beyond[0, 0] = high[0] + 1e-5
    assert validator(own=own).check("arm", beyond, None).actions[0, 0] == high[0]


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (Limits(datasets={"amr": Bounds()}), "limits: datasets.amr: unknown; did you mean arm?"),
        (held_to(low=(0.0,) * 3), "limits of arm: low has 3 values, but its actions are 7 wide"),
        (held_to(max_jump=(0.0,) * 8), "limits of arm: max_jump has 8 values, but its actions are 7 wide"),
        (held_to(low=(0.2, *[None] * 6)), "limits of arm: dimension 0: low 0.2 is above high 0.1"),
        (
            held_to(low=(0.04, *[None] * 6), max_norm={"translation": 0.03}),
            "limits of arm: translation_norm 0.03: no action in the range is shorter than 0.04",
        ),
    ],
)
def test_limits_that_do_not_fit_the_checkpoint_are_one_line(limits: Limits, message: str) -> None:
    with pytest.raises(UserError) as caught:
        validator(limits)
    assert str(caught.value) == message


def test_lengths_are_of_end_effectors_alone() -> None:
    joints = stats([-1.0] * 7 + [0], [1.0] * 8)
    with pytest.raises(UserError, match="max_norm is of an end effector's 7 dimensions, not of 8"):
        validator(held_to(max_norm={"translation": 1.0}), own=joints)
    assert validator(own=joints).check("arm", np.full((1, 8), 2.0), None).actions.tolist() == [[1.0] * 8]
