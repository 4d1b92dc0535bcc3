"""What a policy server counts, as Prometheus reads it and as a person does."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np

from oxe_mix.text import count
from train_llava.acting.arrays import Kind

Phase = Literal["queue", "preprocess", "prefill", "decode", "total"]
PHASES: tuple[Phase, ...] = get_args(Phase)
Way = Literal["websocket", "http"]

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0)
_BATCHES = (1, 2, 4, 8, 16, 32, 64)
_KEPT = 10_000  # answers whose times are known one by one, for the median


@dataclass(slots=True)
class Histogram:
    """Counts below bounds, the sum and the number of all, as Prometheus has them."""

    bounds: Sequence[float]
    counts: list[int] = field(init=False)
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)

    def add(self, value: float) -> None:
        """Count a value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def lines(self, name: str, label: str = "") -> Iterator[str]:
        """Its lines, each count with those below it."""
        below = 0
        for bound, own in zip((*map(str, self.bounds), "+Inf"), self.counts, strict=True):
            below += own
            yield f'{name}_bucket{{{label + "," if label else ""}le="{bound}"}} {below}'
        braced = f"{{{label}}}" if label else ""
        yield f"{name}_sum{braced} {self.total:.6f}"
        yield f"{name}_count{braced} {below}"


class Tally:
    """Counts of one server since its start."""

    def __init__(self) -> None:
        self.answered: Counter[Way] = Counter()
        self.errors: Counter[Kind] = Counter()
        self.clamped: Counter[str] = Counter()
        self.connections = 0  # open now
        self.in_flight = 0  # requests whose answer is still to come
        self.batches = Histogram(_BATCHES)
        self._phases = {phase: Histogram(_SECONDS) for phase in PHASES}
        self._totals: deque[float] = deque(maxlen=_KEPT)

    def answer(self, way: Way, timing_ms: Mapping[Phase, float]) -> None:
        """An answer was made; milliseconds of each phase."""
        self.answered[way] += 1
        for phase, histogram in self._phases.items():
            histogram.add(timing_ms[phase] / 1000)
        self._totals.append(timing_ms["total"])

    def exposition(self) -> str:
        """Prometheus' text format, version 0.0.4."""
        return "\n".join(self._lines()) + "\n"

    def summary(self) -> str:
        """One line for a person, at the end."""
        refused = sum(self.errors.values())
        reasons = ", ".join(f"{number:,} {kind}" for kind, number in sorted(self.errors.items()))
        parts = [
            f"{count(sum(self.answered.values()), 'request')} answered",
            f"{refused:,} refused" + (f" ({reasons})" if refused else ""),
            f"{count(sum(self.clamped.values()), 'value')} clamped",
        ]
        if self._totals:
            p50, p95 = np.percentile(self._totals, (50, 95))
            parts.append(f"p50 {p50:.1f} ms, p95 {p95:.1f} ms in the server")
        return ", ".join(parts)

    def _lines(self) -> Iterator[str]:
        yield from _head("requests_total", "counter", "Requests that were answered.")
        for way in get_args(Way):
            yield f'oxe_mix_requests_total{{way="{way}"}} {self.answered[way]}'
        yield from _head("errors_total", "counter", "Requests and connections that were refused.")
        for kind in get_args(Kind):
            yield f'oxe_mix_errors_total{{kind="{kind}"}} {self.errors[kind]}'
        yield from _head("clamped_values_total", "counter", "Values of actions that a limit changed.")
        for rule, number in sorted(self.clamped.items()):
            yield f'oxe_mix_clamped_values_total{{rule="{rule}"}} {number}'
        yield from _head("connections", "gauge", "Websockets that are open.")
        yield f"oxe_mix_connections {self.connections}"
        yield from _head("in_flight", "gauge", "Requests that wait for the model's answer.")
        yield f"oxe_mix_in_flight {self.in_flight}"
        yield from _head("phase_seconds", "histogram", "Time that answers took, by phase.")
        for phase, histogram in self._phases.items():
            yield from histogram.lines("oxe_mix_phase_seconds", f'phase="{phase}"')
        yield from _head("batch_size", "histogram", "Questions that the model answered together.")
        yield from self.batches.lines("oxe_mix_batch_size")


def _head(name: str, kind: str, text: str) -> Iterator[str]:
    yield f"# HELP oxe_mix_{name} {text}"
    yield f"# TYPE oxe_mix_{name} {kind}"
