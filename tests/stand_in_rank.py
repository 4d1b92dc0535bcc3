"""A rank's program without a model, for what the launcher does with ranks: started by torchrun as the trainer
is, it takes the same options and leaves the same notes. Its config's name says how it goes. Without torch it
starts at once.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path

from oxe_mix.errors import UserError
from train_llava.agent import end_with_parent
from train_llava.config import ERROR_FILE, STOPPED_FILE
from train_llava.launch import main as launch

RANK = int(os.environ.get("RANK", "0"))


class Training:
    """Goes on until it is told to stop; then it saves, which takes until the file `go` is there."""

    def __init__(self, run: Path) -> None:
        self.run, self.signals = run, 0
        signal.signal(signal.SIGTERM, self._stop)

    def _stop(self, *_: object) -> None:
        self.signals += 1
        (self.run / f"rank-{RANK}.told").touch()

    def train(self) -> None:
        (self.run / f"rank-{RANK}.pid").write_text(f"{os.getpid()}\n")
        while not self.signals or not (self.run / "go").exists():
            time.sleep(0.02)
        (self.run / f"rank-{RANK}.signals").write_text(str(self.signals))
        if RANK == 0:
            checkpoint = self.run / "checkpoints/step-7/resume"
            checkpoint.mkdir(parents=True)
            about = {"step": 7, "config": {}, "data": "", "num_ranks": 2, "global_batch": 8, "num_steps": 9}
            (checkpoint / "run.json").write_text(json.dumps(about))
            (self.run / STOPPED_FILE).write_text('{"step": 7}')


def _run(how: str, run: Path, words: list[str]) -> None:
    end_with_parent()
    if how == "finishes":
        (run / f"rank-{RANK}.words").write_text(" ".join(words))
    elif how == "trains":
        Training(run).train()
    elif how == "refuses" and RANK == 1:
        (run / ERROR_FILE).write_text(json.dumps({"error": "x is wrong; mend it"}))
        sys.exit(1)
    elif how == "diverges" and RANK == 1:
        (run / ERROR_FILE).write_text(json.dumps({"error": "the loss is nan", "code": 1}))
        sys.exit(1)
    elif how == "crashes" and RANK == 1:
        raise AssertionError("a bug of ours")
    elif how in {"refuses", "diverges", "crashes"}:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(60)
    else:
        raise UserError(how)


if __name__ == "__main__":
    if "--into" not in sys.argv:
        launch("tests.stand_in_rank")
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", type=Path)
    parser.add_argument("--into", type=Path)
    args, rest = parser.parse_known_args()
    name = next(line for line in args.config.read_text().splitlines() if line.startswith("name: "))
    _run(name.removeprefix("name: "), args.into, rest)
