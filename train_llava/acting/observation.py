"""What a robot tells a policy at one control step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from oxe_mix.errors import UserError


class ObservationError(UserError):
    """A part of an observation that will not do; `field` is its name in `Observation`."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field, self.problem = field, problem


@dataclass(frozen=True, slots=True)
class Observation:
    """One control step.

    images: uint8 [H, W, 3], RGB, by camera role (primary, secondary, wrist); sizes may differ.
    instruction: in words. unnorm_key: whose units the answer has; not needed where the checkpoint knows one
        dataset. state: [S], robot units, as the dataset's card orders it; only where the checkpoint wants it.
    seed: of the draw, where actions are sampled.
    """

    images: Mapping[str, NDArray[np.uint8]] = field(default_factory=dict)
    instruction: str = ""
    unnorm_key: str | None = None
    state: NDArray[np.floating] | None = None
    seed: int = 0
