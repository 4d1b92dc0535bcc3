"""What actions are held to, from a YAML file or from what was recorded.

Limits hold in the units that the robot is sent. Of a dataset whose action is a difference (`action_kind:
delta` on its card) every limit is one of speed: `low` and `high` bound the movement of one step, `max_norm`
its length, `max_jump` how fast it changes. Of one whose action is a pose or joint angles (`absolute`) `low`
and `high` bound the workspace, `max_jump` is the speed, and `max_norm` the distance from the base, which is
seldom meant. A workspace cannot be had of differences: nothing here knows where the robot is.

    default:                    # of every dataset that does not say otherwise
      max_norm: {translation: 0.05, rotation: 0.2}
    datasets:
      bridge_orig:
        low: [null, null, -0.02, null, null, null, null]   # null: as far as was recorded
        max_jump: [0.02, 0.02, 0.02, null, null, null, null]   # null: any
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from convert.action_codec import ActionStats
from oxe_mix.errors import UserError, did_you_mean
from oxe_mix.mix import Number
from oxe_mix.yaml_files import load_yaml

Floats = NDArray[np.float64]
# contradiction: what one limit leaves, another forbids. It and not_finite are refused, never clamped.
Rule = Literal["not_finite", "contradiction", "range", "jump", "translation_norm", "rotation_norm"]
_END_EFFECTOR = 7  # three of translation, three of rotation, the gripper

_Finite = Annotated[Number, Field(allow_inf_nan=False)]
_Length = Annotated[Number, Field(ge=0, allow_inf_nan=False)]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class MaxNorm(_Strict):
    """Lengths, in robot units a step: of the first three dimensions and of the next three."""

    translation: _Length | None = None
    rotation: _Length | None = None


class Bounds(_Strict):
    """Of one dataset, [A] each in robot units; what is left out is not limited beyond what was recorded."""

    low: tuple[_Finite | None, ...] | None = None
    high: tuple[_Finite | None, ...] | None = None
    max_norm: MaxNorm | None = None
    max_jump: tuple[_Length | None, ...] | None = None  # between consecutive actions


class Limits(_Strict):
    """What actions are held to, by dataset; `default` where a dataset says nothing.

    Without any: the recorded range, [min, max] of every movement over all steps, and [0, 1] of the gripper.
    """

    default: Bounds = Bounds()
    datasets: dict[str, Bounds] = {}

    def of(self, name: str) -> Bounds:
        """A dataset's own, and the default for each key that it leaves out."""
        own = self.datasets.get(name, Bounds())
        return self.default.model_copy(
            update={key: value for key, value in own if key in own.model_fields_set}
        )


def read_limits(file: Path) -> Limits:
    """Limits from a YAML file of the user's.

    Raises: UserError, one line per problem, for a file that is missing or does not say limits.
    """
    raw = load_yaml(file)
    if not isinstance(raw, dict):
        raise UserError(f"{file}: limits are a mapping with default, datasets or both")
    try:
        return Limits.model_validate(raw)
    except ValidationError as error:
        raise UserError("\n".join(f"{file}: {_said(problem)}" for problem in error.errors())) from error


def _said(problem: Any) -> str:
    place = ".".join(map(str, problem["loc"])) or "limits"
    if problem["type"] == "extra_forbidden":
        known = [name for part in (Limits, Bounds, MaxNorm) for name in part.model_fields]
        return f"{place}: unknown key{did_you_mean(str(problem['loc'][-1]), known)}"
    return f"{place}: {problem['msg'].removeprefix('Value error, ')}"


@dataclass(frozen=True, slots=True)
class Norm:
    """A limit of length on three dimensions together."""

    rule: Rule
    own: slice
    limit: float


@dataclass(frozen=True, slots=True)
class Held:
    """One dataset's limits, [A] each; max_jump is infinite where any will do."""

    low: Floats
    high: Floats
    max_jump: Floats
    norms: tuple[Norm, ...]


def held(name: str, stats: ActionStats, bounds: Bounds) -> Held:
    """A dataset's limits as arrays.

    Raises: UserError for limits of another width than its actions, and for such as leave no action.
    """
    movement = np.array(stats.mask)
    low = _filled(name, "low", bounds.low, np.where(movement, stats.min, 0.0))
    high = _filled(name, "high", bounds.high, np.where(movement, stats.max, 1.0))
    for a in np.flatnonzero(low > high):
        raise UserError(f"limits of {name}: dimension {a}: low {low[a]:g} is above high {high[a]:g}")
    norms = _norms(bounds.max_norm or MaxNorm())
    if norms and len(low) != _END_EFFECTOR:
        raise UserError(f"limits of {name}: max_norm is of an end effector's 7 dimensions, not of {len(low)}")
    for norm in norms:
        shortest = math.hypot(*np.clip(0.0, low, high)[norm.own])
        if shortest > norm.limit:
            raise UserError(
                f"limits of {name}: {norm.rule} {norm.limit:g}: no action in the range is shorter than "
                f"{shortest:g}"
            )
    return Held(low, high, _filled(name, "max_jump", bounds.max_jump, np.full(len(low), np.inf)), norms)


def _filled(name: str, what: str, given: tuple[float | None, ...] | None, usual: Floats) -> Floats:
    """What was given, and the usual where nothing was."""
    if given is None:
        return usual
    if len(given) != len(usual):
        raise UserError(
            f"limits of {name}: {what} has {len(given)} values, but its actions are {len(usual)} wide"
        )
    return np.array([own if one is None else one for one, own in zip(given, usual, strict=True)])


def _norms(given: MaxNorm) -> tuple[Norm, ...]:
    norms: list[Norm] = []
    if given.translation is not None:
        norms.append(Norm("translation_norm", slice(0, 3), given.translation))
    if given.rotation is not None:
        norms.append(Norm("rotation_norm", slice(3, 6), given.rotation))
    return tuple(norms)
