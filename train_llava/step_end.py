"""What is done at the end of a step: evaluate, save where it is time to, and end where that is asked."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from oxe_mix.files import write_json
from train_llava import ranks
from train_llava.checkpoints import Checkpoints
from train_llava.config import ERROR_FILE, STOPPED_FILE
from train_llava.metrics_log import Metrics
from train_llava.trainer import MixTrainer

Report = dict[str, Any]


class Stopping:
    """SIGTERM: save at the end of the step, and end; a machine that is taken away says so before."""

    def __init__(self, run: Path) -> None:
        self._run = run
        self.asked = False
        self.stopped = False
        signal.signal(signal.SIGTERM, self._ask)

    def _ask(self, *_: object) -> None:
        # Another rank met an error: what this one waits for will not come.
        if (self._run / ERROR_FILE).exists():
            os._exit(1)
        self.asked = True

    def stop(self, step: int) -> None:
        """The checkpoint is written."""
        self.stopped = True
        if ranks.rank() == 0:
            write_json(self._run / STOPPED_FILE, {"step": step})


class StepEnd(TrainerCallback):
    """After each step, on every rank; the Trainer has decided by itself before."""

    def __init__(
        self, trainer: MixTrainer, metrics: Metrics, stopping: Stopping, held_out: Callable[[], Report | None]
    ) -> None:
        """`held_out`: scores the model as it is; every rank calls."""
        self._trainer, self._metrics, self._stopping = trainer, metrics, stopping
        self._held_out = held_out
        self._config = trainer.work.config
        self._checkpoints: Checkpoints = trainer.checkpoints

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Evaluate, and save when it is the best so far or when the run is to end."""
        every, step = self._config.evaluation.every, state.global_step
        if every is not None and step % every == 0:
            self._evaluate(step, control)
        if ranks.any_rank(self._stopping.asked):
            self._stopping.asked = control.should_save = control.should_training_stop = True
        # A line of the log never spans a checkpoint: a run that goes on from there writes the same lines.
        control.should_log = control.should_log or control.should_save

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """A checkpoint is whole."""
        if self._stopping.asked:
            self._stopping.stop(state.global_step)

    def _evaluate(self, step: int, control: TrainerControl) -> None:
        report = self._held_out()
        if report is None:
            return
        self._metrics.evaluated(step, report)
        if report["l1"]["model"] is None:  # no dimension of the held-out actions moves
            return
        l1, best = report["l1"]["model"], self._checkpoints.best()
        ranks.tell(f"step {step:,}  held-out L1 {l1:.4f}, mean action {report['l1']['mean_action']:.4f}")
        if best is None or l1 < best[1]:
            self._trainer.best = l1
            control.should_save = True
