"""Does the gripper's action say what the gripper then does? And does it stay in [0, 1]?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from convert.doctor_mends import LEAVE_OUT, LOOK, OWN_CARD
from convert.doctor_summary import DatasetSummary, EpisodeSummary, Outcome, some
from oxe_mix.cards import Card, FillTerm, Slice
from oxe_mix.text import count
from oxe_mix.verdicts import Level

# Datasets whose recorded gripper state is known to grow when the gripper opens (1) or closes (-1), where the
# card's keys do not say it. bridge: +0.85 at 2 steps of delay in the 25 real episodes of Octo's test data.
_STATE_SIGNS = {"bridge_orig": 1, "bridge": 1}
_SLACK = 0.01  # beyond [0, 1] that is rounding
_FAR = 0.5  # above 1 that is another unit
_NARROW = 0.2
_OUT_OF_MIX = "take NAME out of the mix"
_LONGEST_LAG = 8  # steps by which a gripper follows its command, at most
_LEAST_EPISODES, _LEAST_FREE = 3, 30  # that it takes, and steps beyond one an episode
# A correlation that says something, and how many of its standard errors it must be away from none: random
# numbers reach three at the best of nine delays.
_CLEAR, _NO_ACCIDENT = 0.5, 5.0
# Of single episodes: how long they must be, how clear their own correlation, and how many of them as clear.
_LONG, _VERY_CLEAR, _MOST, _FEWEST = 8, 0.7, 0.8, 2


def gripper_column(card: Card) -> int | None:
    """Where the gripper stands among the columns of the card's state; None where it has none."""
    if not card.state.parts or card.state.encoding == "NONE" or isinstance(card.state.parts[-1], FillTerm):
        return None
    # The two fingers of one gripper, one of them counted backwards: the first is the one that opens upwards.
    fingers = [op for op in card.state.parts[-1].ops if isinstance(op, Slice) and op.slice == (-2, None)]
    return -2 if fingers else -1


def state_sign(card: Card) -> int | None:
    """+1: the recorded gripper state grows when the gripper opens; -1: when it closes; None: not known."""
    if card.name in _STATE_SIGNS:
        return _STATE_SIGNS[card.name]
    state, action = card.state.parts[-1], card.action.recipe[-1]
    if isinstance(state, FillTerm) or isinstance(action, FillTerm):
        return None
    if "clos" in state.key[-1]:
        return -1
    same_name = state.key[-1] == action.key[-1] and "gripper" in state.key[-1]
    same_column = state.key == action.key and state.ops[:1] == action.ops[:1]
    if same_name or same_column:
        # One quantity, told and measured: the recipe says of the command whether it had to be turned round.
        return -1 if "invert" in action.ops else 1
    return None


def gripper_range(data: DatasetSummary) -> Outcome:
    """The gripper is 0 closed to 1 open; the codec cuts off what lies beyond."""
    if data.stats is None or all(data.stats.mask):
        return Outcome("ok", "no gripper among the actions")
    stats, (column, *_) = data.stats, np.flatnonzero(~np.array(data.stats.mask)).tolist()
    low, high = stats.min[column], stats.max[column]
    text = f"{low:.3g} to {high:.3g}"
    if low < -_SLACK or high > 1 + _SLACK:
        outside = [
            episode.step(int(t))
            for episode in data.episodes
            for t in np.flatnonzero(np.abs(episode.actions[:, column] - 0.5) > 0.5 + _SLACK)[:1]
        ]
        mend = (
            f"convert cuts it off at 0 and 1; edit the gripper's ops (clip01, invert, binarize) in {OWN_CARD}"
        )
        # Cut off, a command of -1 to 1 still closes and opens; millimetres or percents are open throughout.
        level: Level = "error" if stats.q99[column] > 1 + _FAR else "warning"
        return Outcome(level, f"{text}, not in [0, 1]", some(outside), mend)
    if low != high and high - low < _NARROW:
        mend = f"a width in metres? no op scales it: pack your own recordings with 0 to 1, or {_OUT_OF_MIX}"
        return Outcome("warning", f"moves from {text} only", mend=mend)
    return Outcome("ok", f"{text}{', never moves' if low == high else ''}")


def gripper_polarity(data: DatasetSummary) -> Outcome:
    """A gripper that is told to open opens some steps later: action and state rise together, or, where the
    state counts closing, against each other.
    """
    if data.card is None or gripper_column(data.card) is None:
        return Outcome("ok", "not looked at: the card names no state of the gripper")
    if not any(len(episode.gripper_state) for episode in data.episodes):
        return Outcome("ok", "not looked at: no state is here")
    pairs = [episode for episode in data.episodes if _moves(episode)]
    other = _fewer(pairs)
    if other:
        text = f"in {len(other)} of {len(pairs)} episodes the other way round than in the rest"
        return Outcome("warning", text, some(other), LEAVE_OUT)
    lag, r = _best_lag(pairs)
    if len(pairs) < _LEAST_EPISODES or lag is None:
        moves = f"action and state both move in {count(len(pairs), 'episode')}"
        return Outcome("ok", f"not looked at: {moves}")
    return _polarity(state_sign(data.card), pairs, lag, r)


def _polarity(sign: int | None, pairs: list[EpisodeSummary], lag: int, r: float) -> Outcome:
    """What a correlation `r` at a delay of `lag` steps says where the state has a sign, or an unknown one."""
    found = f"action and state correlate with {r:+.2f} at {count(lag, 'step')} of delay"
    if abs(r) < _CLEAR:
        return Outcome("ok", f"not clear: {found}")
    if sign is not None and sign * r < 0:
        told = "opening" if sign > 0 else "closing"
        mend = f"add invert to the gripper's ops, or take it away, in {OWN_CARD}"
        return Outcome("error", f"{found}, though the state counts {told}", some([e.id for e in pairs]), mend)
    if sign is None and r < 0:
        text = f"{found}: right if this robot's state counts closing, which the card does not say"
        mend = f"look at a grasp: {LOOK}; if it is so, add or take away invert in {OWN_CARD}"
        return Outcome("warning", text, some([e.id for e in pairs]), mend)
    return Outcome("ok", found)


def _moves(episode: EpisodeSummary) -> bool:
    if len(episode.gripper_state) < 2 or not episode.is_finite:
        return False
    told, done = episode.actions[:, -1], episode.gripper_state
    return bool(np.isfinite(done).all() and np.ptp(told) > 0 and np.ptp(done) > 0)


def _best_lag(episodes: Sequence[EpisodeSummary]) -> tuple[int | None, float]:
    """The delay at which action and state agree, or disagree, most; None with too few steps. A correlation
    that may be an accident counts as 0.
    """
    found = [(lag, *_correlation(episodes, lag)) for lag in range(_LONGEST_LAG + 1)]
    enough = [
        (lag, r if abs(r) * free**0.5 > _NO_ACCIDENT else 0.0)
        for lag, r, free in found
        if free >= _LEAST_FREE
    ]
    return max(enough, key=lambda one: abs(one[1]), default=(None, 0.0))


def _fewer(episodes: Sequence[EpisodeSummary]) -> list[str]:
    """Episodes in which state follows action the other way round than in most; none unless all are clear."""
    long = [episode for episode in episodes if len(episode.steps) >= _LONG]
    if len(long) < _LEAST_EPISODES:
        return []
    by_lag = [[_correlation([episode], lag)[0] for episode in long] for lag in range(_LONGEST_LAG + 1)]
    own = max(by_lag, key=lambda rs: sum(map(abs, rs)))
    up = [e.id for e, r in zip(long, own, strict=True) if r > _VERY_CLEAR]
    down = [e.id for e, r in zip(long, own, strict=True) if r < -_VERY_CLEAR]
    fewer = min(up, down, key=len)
    return fewer if len(fewer) >= _FEWEST and len(up) + len(down) >= _MOST * len(long) else []


def _correlation(episodes: Sequence[EpisodeSummary], lag: int) -> tuple[float, int]:
    """Of the gripper's action with its state `lag` steps later, each without its episode's mean; and how many
    numbers are free in it.
    """
    told, done, free = [np.zeros(0)], [np.zeros(0)], 0
    for episode in episodes:
        length = len(episode.steps) - lag
        if length >= 3:
            told.append(_centred(episode.actions[:length, -1]))
            done.append(_centred(episode.gripper_state[lag:]))
            free += length - 1
    a, s = np.concatenate(told), np.concatenate(done)
    scale = float(np.sqrt((a @ a) * (s @ s)))
    return (float(a @ s) / scale if scale > 0 else 0.0), free


def _centred(values: NDArray[np.float32]) -> NDArray[np.float64]:
    x = values.astype(np.float64)
    return np.asarray(x - x.mean())
