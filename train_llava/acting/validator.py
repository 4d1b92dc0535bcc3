"""The last look at actions before a robot gets them: finite, inside their limits, and never made up."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from convert.action_codec import ActionCodec
from oxe_mix.errors import UserError, did_you_mean
from train_llava.acting.limits import Floats, Held, Limits, Norm, Rule, held, read_limits

# Where q01 and q99 are one value at the end of the range, the codec's 1e-8 puts bins that far outside. A
# 10 nm beyond a limit is no harm; a warning for every answer of such a dataset would be. The relative part is
# for the rounding of large units.
_TOLERANCE, _RELATIVE_TOLERANCE = 1e-8, 1e-9


class RejectedError(UserError):
    """Actions that must not be sent; `rule` is the one that they break."""

    def __init__(self, rule: Rule, problem: str) -> None:
        super().__init__(problem)
        self.rule = rule


@dataclass(frozen=True, slots=True)
class Clamped:
    """One value that was changed: `given` broke `limit`, in robot units.

    limit: of range and jump the bound itself; of a norm the greatest length of the three together.
    """

    step: int
    dimension: int
    given: float
    limit: float
    rule: Rule

    def as_record(self) -> dict[str, Any]:
        """For JSON and for the wire."""
        return asdict(self)

    def __str__(self) -> str:
        what = "is part of a vector longer than" if self.rule.endswith("norm") else "is beyond"
        place = f"step {self.step}, dimension {self.dimension}"
        return f"{place}: {self.given!r} {what} {self.limit!r} ({self.rule})"


@dataclass(frozen=True, slots=True)
class Checked:
    """What may be sent: float64 [H, A], robot units, and each value that is not as it was given."""

    actions: Floats
    clamped: list[Clamped]


@dataclass(frozen=True, slots=True)
class _Box:
    """What range and jump leave to one action, [A] each, and where it is the jump that decides."""

    low: Floats
    high: Floats
    jump_low: NDArray[np.bool_]
    jump_high: NDArray[np.bool_]

    def below(self, action: Floats) -> NDArray[np.bool_]:
        """Where an action is too low, [A]."""
        return np.asarray(action < self.low - _slack(self.low))

    def above(self, action: Floats) -> NDArray[np.bool_]:
        """Where it is too high, [A]."""
        return np.asarray(action > self.high + _slack(self.high))


OnViolation = Literal["clamp", "reject"]


def validator_of(codec: ActionCodec, limits: Path | None, action: OnViolation) -> ActionValidator:
    """By a file of limits, or by what was recorded. Raises: UserError for a file that will not do."""
    return ActionValidator(codec, Limits() if limits is None else read_limits(limits), action=action)


class ActionValidator:
    """Checks chunks against limits. `counts`, by rule: values clamped, or chunks refused."""

    def __init__(self, codec: ActionCodec, limits: Limits, *, action: OnViolation) -> None:
        """`action`: on a value beyond its limit, send the nearest that is allowed, or nothing.

        Raises: UserError for limits of an unknown dataset, of another width, or that leave no action.
        """
        for name in limits.datasets:
            if name not in codec.datasets:
                raise UserError(f"limits: datasets.{name}: unknown{did_you_mean(name, list(codec.datasets))}")
        self.counts: dict[Rule, int] = dict.fromkeys(get_args(Rule), 0)
        self._held = {name: held(name, stats, limits.of(name)) for name, stats in codec.datasets.items()}
        self._rejects = action == "reject"

    def check(self, unnorm_key: str, actions: Floats, previous: Floats | None) -> Checked:
        """The chunk as it may be sent.

        What is inside its limits stays bit for bit. What is not becomes the nearest action that all limits
        allow at once, so their order does not matter and a second check changes nothing. A jump is measured
        from what was sent before: the chunk's action before, as it was clamped, or `previous`. Inside
        includes 1e-8 robot units, and a billionth of the limit, beyond it.

        Args:
            actions: float64 [H, A], robot units.
            previous: [A], the last action that was sent; None: none was.

        Raises: RejectedError for a value that is not finite; where no action is allowed, since all that the
            jump from the last one can reach lies outside the range or is too long; in reject mode for any
            value beyond its limit. KeyError for an unknown unnorm_key and ValueError for other widths: what a
            policy answers has neither.
        """
        own = self._held[unnorm_key]
        width = (len(own.low),)
        if (
            actions.ndim != 2
            or actions.shape[1:] != width
            or (previous is not None and previous.shape != width)
        ):
            given = None if previous is None else previous.shape
            raise ValueError(f"actions of shape {actions.shape} after {given}; actions are {width[0]} wide")
        try:
            checked = self._checked(actions, previous, own)
        except RejectedError as error:
            self.counts[error.rule] += 1
            raise RejectedError(error.rule, f"{unnorm_key}: {error}; nothing is sent") from error
        for one in checked.clamped:
            self.counts[one.rule] += 1
        return checked

    def _checked(self, actions: Floats, previous: Floats | None, own: Held) -> Checked:
        if previous is not None:
            _refuse_non_finite("the action before", previous)
        for step, action in enumerate(actions):
            _refuse_non_finite(f"step {step}", action)
        sent = actions.copy()
        clamped: list[Clamped] = []
        for step, action in enumerate(actions):
            box = _reach(step, previous, own)
            sent[step] = previous = _nearest(step, action, box, own.norms)
            clamped += _changes(step, action, previous, box, own.norms)
            if self._rejects and clamped:
                raise RejectedError(clamped[0].rule, str(clamped[0]))
        return Checked(sent, clamped)


def _slack(limit: Any) -> Any:
    """How far beyond a limit is still inside."""
    return _TOLERANCE + _RELATIVE_TOLERANCE * np.abs(limit)


def _refuse_non_finite(where: str, action: Floats) -> None:
    for a in np.flatnonzero(~np.isfinite(action)):
        raise RejectedError("not_finite", f"{where}, dimension {a}: {action[a]} (not_finite)")


def _reach(step: int, previous: Floats | None, own: Held) -> _Box:
    """What a step may be after the one before. Raises: RejectedError where that is nothing."""
    if previous is None:
        never = np.zeros(len(own.low), np.bool_)
        return _Box(own.low, own.high, never, never)
    down, up = previous - own.max_jump, previous + own.max_jump
    box = _Box(np.maximum(own.low, down), np.minimum(own.high, up), down > own.low, up < own.high)
    for a in np.flatnonzero(box.above(box.low)):
        raise RejectedError(
            "contradiction",
            f"step {step}, dimension {a}: within {own.max_jump[a]!s} of {previous[a]!s}, the action before, "
            f"nothing is in the range {own.low[a]!s} to {own.high[a]!s} (contradiction)",
        )
    return box


def _nearest(step: int, action: Floats, box: _Box, norms: tuple[Norm, ...]) -> Floats:
    """The allowed action at the least distance, [A]. Raises: RejectedError where all are too long."""
    near = np.where(box.below(action), box.low, np.where(box.above(action), box.high, action))
    for norm in norms:
        longest = norm.limit + _slack(norm.limit)
        if math.hypot(*near[norm.own]) <= longest:
            continue
        low, high = box.low[norm.own], box.high[norm.own]
        shortest = math.hypot(*np.clip(0.0, low, high))
        if shortest > longest:
            raise RejectedError(
                "contradiction",
                f"step {step}, dimensions {norm.own.start} to {norm.own.stop - 1}: range and jump leave "
                f"nothing shorter than {shortest}, but {norm.rule} is {norm.limit} (contradiction)",
            )
        near[norm.own] = _shortened(action[norm.own], low, high, norm.limit)
    return near


def _shortened(vector: Floats, low: Floats, high: Floats, limit: float) -> Floats:
    """The nearest point of a box that is no longer than `limit`: clip(s x vector) for the greatest such s.

    Source: the Karush-Kuhn-Tucker conditions of the projection give this form, s = 1 / (1 + multiplier); its
        length never falls with s, so halving finds it.
    """
    good, bad = 0.0, 1.0
    while good < (middle := (good + bad) / 2) < bad:
        fits = math.hypot(*np.clip(middle * vector, low, high)) <= limit
        good, bad = (middle, bad) if fits else (good, middle)
    return np.clip(good * vector, low, high)


def _changes(step: int, given: Floats, sent: Floats, box: _Box, norms: tuple[Norm, ...]) -> list[Clamped]:
    """Each value that changed, by the limit that it broke: its own before a common one."""
    below, above = box.below(given), box.above(given)
    changes: list[Clamped] = []
    for a in map(int, np.flatnonzero(given != sent)):
        if below[a] or above[a]:
            bound, by_jump = (box.low, box.jump_low) if below[a] else (box.high, box.jump_high)
            rule: Rule = "jump" if by_jump[a] else "range"
            limit = float(bound[a])
        else:
            norm = next(norm for norm in norms if norm.own.start <= a < norm.own.stop)
            rule, limit = norm.rule, norm.limit
        changes.append(Clamped(step, a, float(given[a]), limit, rule))
    return changes
