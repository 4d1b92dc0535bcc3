"""From a decoded request to actions that may be sent, whichever way it came."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from train_llava.acting.arrays import RequestError, fields_of
from train_llava.acting.gate import Gate
from train_llava.acting.incoming import Caps, incoming
from train_llava.acting.obs_keys import ObsKeys
from train_llava.acting.observation import ObservationError
from train_llava.acting.tally import Phase, Tally, Way
from train_llava.acting.turns import Turns
from train_llava.acting.validator import RejectedError

if TYPE_CHECKING:
    from train_llava.acting.policy import Policy
    from train_llava.acting.validator import ActionValidator, Clamped


@dataclass(frozen=True, slots=True)
class Terms:
    """Whom a server answers, and what. max_batch: questions that the model may answer together."""

    gate: Gate
    keys: ObsKeys
    caps: Caps
    max_batch: int = 1


@dataclass(frozen=True, slots=True)
class Reply:
    """Actions that may be sent: float64 [H, A], robot units; what was clamped; milliseconds by phase."""

    unnorm_key: str
    actions: NDArray[np.float64]
    clamped: list[Clamped]
    timing_ms: Mapping[Phase, float]

    def as_message(self) -> dict[str, Any]:
        """What goes over the websocket."""
        return {
            "actions": self.actions.astype(np.float32),
            "server_timing": {phase: round(ms, 3) for phase, ms in self.timing_ms.items()},
            "clamped": [one.as_record() for one in self.clamped],
        }


class Service:
    """A policy with its validator, on terms; made inside a running event loop."""

    def __init__(self, policy: Policy, validator: ActionValidator, terms: Terms) -> None:
        self.terms, self.tally = terms, Tally()
        self.chunk = policy.codec.chunk
        self.turns = Turns(policy, terms.max_batch, self.tally)
        self._validator = validator

    async def act(self, message: object, way: Way, last: Mapping[str, Reply], since: float) -> Reply:
        """Answer a request.

        Args:
            message: decoded, its arrays still `Packed`. last: what the same client was sent last, by
                unnorm_key; a limit of jumps holds from there. since: perf_counter when the request had come.

        Raises: RequestError, naming the field, or `actions` for those that must not be sent.
        """
        asked = incoming(fields_of(message), self.terms.keys, self.terms.caps)
        try:
            answer, waited_ms = await self.turns.ask(asked.observation)
        except ObservationError as error:
            raise asked.refused(error) from error
        before = last.get(answer.unnorm_key)
        previous = None if before is None else before.actions[-1]
        try:
            checked = self._validator.check(answer.unnorm_key, answer.actions, previous)
        except RejectedError as error:
            raise RequestError("actions", str(error), "rejected") from error
        self.tally.clamped.update(one.rule for one in checked.clamped)
        spent = answer.latency
        timing_ms: dict[Phase, float] = {
            "queue": max(0.0, waited_ms),
            "preprocess": spent.preprocess,
            "prefill": spent.prefill,
            "decode": spent.decode,
            "total": (time.perf_counter() - since) * 1000,
        }
        self.tally.answer(way, timing_ms)
        return Reply(answer.unnorm_key, checked.actions, checked.clamped, timing_ms)
