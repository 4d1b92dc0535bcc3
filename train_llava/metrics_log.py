"""metrics.jsonl: a line every few steps and one per evaluation; the same lines, shorter, on the screen."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oxe_mix.files import atomic_write
from oxe_mix.text import duration
from train_llava import ranks
from train_llava.batch import BatchPlan
from train_llava.mixture import MixedOrder


@dataclass(slots=True)
class Window:
    """What happened since the last line, on this rank's clock."""

    began: float
    wait_s: float = 0.0
    samples: int = 0
    tokens: int = 0

    def waited(self, seconds: float) -> None:
        """For data."""
        self.wait_s += seconds

    def took(self, samples: int, tokens: int) -> None:
        """A step's, of all ranks."""
        self.samples += samples
        self.tokens += tokens

    def figures(self, now: float) -> dict[str, float]:
        """Rates, and the share of the time that was spent waiting for data."""
        seconds = max(now - self.began, 1e-9)
        return {
            "samples_per_s": round(self.samples / seconds, 2),
            "tokens_per_s": round(self.tokens / seconds, 1),
            "data_wait_share": round(self.wait_s / seconds, 4),
            "seconds": round(seconds, 3),
        }


class Metrics:
    """Written by rank 0 alone."""

    def __init__(self, file: Path, order: MixedOrder, batch: BatchPlan, num_steps: int) -> None:
        self._file = file
        self._order, self._batch, self._num_steps = order, batch, num_steps
        self._began: tuple[float, int] | None = None
        self._draws: dict[str, float] = {}
        self._counted = 0

    def begin(self, step: int) -> None:
        """Keep the lines of the steps done; a run that was killed had gone further than its checkpoint."""
        self._began = (time.monotonic(), step)
        if ranks.rank() == 0:
            kept = [line for line in read_metrics(self._file) if line["step"] <= step]
            with atomic_write(self._file) as stream:
                stream.writelines(_line(line) for line in kept)

    def trained(self, step: int, line: dict[str, Any]) -> None:
        """After a step that is logged."""
        if ranks.rank() != 0:
            return
        self._append({"step": step, **line, "shares": self._shares(step)})
        rate = max(line["learning_rate"].values())
        ranks.tell(
            f"step {step:,}/{self._num_steps:,}  loss {line['loss']:.4f}  lr {rate:.2e}  "
            f"{line['samples_per_s']:,.1f} samples/s  waited for data {line['data_wait_share']:.1%}"
            f"{self._left(step)}"
        )

    def evaluated(self, step: int, report: dict[str, Any]) -> None:
        """After an evaluation."""
        if ranks.rank() == 0:
            self._append({"step": step, "evaluation": report})

    def _append(self, line: dict[str, Any]) -> None:
        with self._file.open("ab") as stream:
            stream.write(_line(line))

    def _shares(self, step: int) -> dict[str, float]:
        """Of each source in all draws so far."""
        done = step * self._batch.samples
        fresh = self._order.realised(range(self._counted, done))
        for name, share in fresh.items():
            self._draws[name] = self._draws.get(name, 0.0) + share * (done - self._counted)
        self._counted = done
        return {name: round(draws / done, 6) for name, draws in self._draws.items()}

    def _left(self, step: int) -> str:
        if self._began is None or step <= self._began[1]:
            return ""
        start, first = self._began
        return f"  left {duration((time.monotonic() - start) / (step - first) * (self._num_steps - step))}"


def read_metrics(file: Path) -> Iterator[dict[str, Any]]:
    """The lines of a metrics.jsonl; without a last one that a kill cut off. None when there is no file."""
    if not file.exists():
        return
    with file.open("rb") as stream:
        for line in stream:
            if line.endswith(b"\n"):
                yield json.loads(line)


def mean_and_last_loss(file: Path) -> tuple[float, float]:
    """Of a run, however often it was started: over all its steps, and of its last line; NaN for none."""
    total, steps, last = 0.0, 0, math.nan
    for line in read_metrics(file):
        if "loss" in line:
            total, last = total + line["loss"] * (line["step"] - steps), line["loss"]
            steps = line["step"]
    return (total / steps if steps else math.nan), last


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value).encode() + b"\n"
