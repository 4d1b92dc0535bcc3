"""Where a run goes on: folders step-N that are whole or absent, the last few and the best of them."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from oxe_mix.errors import UserError
from oxe_mix.files import read_model, write_json
from train_llava.config import CHECKPOINTS

RESUME = "resume"  # of a checkpoint: what goes on, beside the model that acts
_ABOUT, _BEST, _PARTIAL = "run.json", "best.json", ".partial-"
# What may change between a run and its going on without a difference to the losses.
_FREE = ("logging", "checkpoints", "evaluation", "data.workers")
# And what may, when the optimizer starts anew.
_FREE_WITHOUT_OPTIMIZER = (
    *_FREE,
    "train.micro_batch",
    "train.accumulate",
    "train.global_batch",
    "train.zero",
    "train.gradient_checkpointing",
    "train.compile",
    "model.attention",
)


class About(BaseModel):
    """What a checkpoint is of; written with it, compared when a run goes on."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    step: int
    config: dict[str, Any]
    data: str  # the fingerprint of samples and order
    num_ranks: int
    global_batch: int
    num_steps: int  # of the whole run


class _Best(BaseModel):
    step: int
    l1: float


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """The checkpoints of one run; the last `keep` are kept, and the best beside them."""

    run: Path
    keep: int

    @property
    def folder(self) -> Path:
        """Where they lie."""
        return self.run / CHECKPOINTS

    def latest(self) -> Path | None:
        """The last whole one, None before the first."""
        found = self._steps()
        return self._at(found[-1]) if found else None

    def best(self) -> tuple[int, float] | None:
        """Step and held-out L1 of the best one evaluated."""
        if not (self.folder / _BEST).exists():
            return None
        best = read_model(_Best, self.folder / _BEST, "the note of the best checkpoint")
        return best.step, best.l1

    def clean(self) -> None:
        """Remove what a killed run left half-written."""
        for partial in self.folder.glob(f"{_PARTIAL}*"):
            shutil.rmtree(partial)

    def partial(self, step: int) -> Path:
        """Where the ranks write a checkpoint before it is whole."""
        return self.folder / f"{_PARTIAL}{step}"

    def publish(self, step: int, best: float | None) -> None:
        """Give what lies in `partial` its name, and remove those that are no longer kept.

        Args:
            best: its held-out L1 when it is the best so far.
        """
        partial, final = self.partial(step), self._at(step)
        for file in sorted(partial.rglob("*")):
            _flush(file)
        shutil.rmtree(final, ignore_errors=True)  # only --weights-only comes to a step twice
        partial.rename(final)
        _flush(self.folder)
        if best is not None:
            write_json(self.folder / _BEST, _Best(step=step, l1=best).model_dump())
        noted = self.best()
        for old in self._steps()[: -self.keep]:
            if noted is None or old != noted[0]:
                shutil.rmtree(self._at(old))

    def _at(self, step: int) -> Path:
        return self.folder / f"step-{step}"

    def _steps(self) -> list[int]:
        names = [re.fullmatch(r"step-(\d+)", path.name) for path in self.folder.glob("step-*")]
        return sorted(int(match[1]) for match in names if match)


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    handle = os.open(path, os.O_RDONLY)
    try:
        yield handle
    finally:
        os.close(handle)


def _flush(path: Path) -> None:
    """To the disk, so that a name never stands for bytes that a power failure took."""
    with _opened(path) as handle:
        os.fsync(handle)


def write_about(checkpoint: Path, about: About) -> None:
    """Note in a checkpoint what it is of."""
    write_json(checkpoint / RESUME / _ABOUT, about.model_dump())


def read_about(checkpoint: Path) -> About:
    """What a checkpoint is of. Raises: UserError when its note is missing or broken."""
    return read_model(About, checkpoint / RESUME / _ABOUT, "a checkpoint that a run can go on from")


def check_same_run(checkpoint: Path, now: About, *, weights_only: bool) -> About:
    """Prove that a run can go on from a checkpoint as if it had never stopped; returns what that is of.

    Raises: UserError that names what differs. With `weights_only` the optimizer starts anew, so the number of
        ranks may differ and how they share a step's samples.
    """
    then = read_about(checkpoint)
    if then.data != now.data:
        raise UserError(f"{checkpoint}: was trained on other data; name another folder with RUN=")
    if then.num_ranks != now.num_ranks and not weights_only:
        raise UserError(
            f"{checkpoint}: written by {then.num_ranks} ranks, and now there are {now.num_ranks}: the "
            f"optimizer's state cannot be split anew; start {then.num_ranks} ranks, or go on with the "
            "weights alone and a fresh optimizer: WEIGHTS_ONLY=1"
        )
    if then.global_batch != now.global_batch:
        raise UserError(
            f"{checkpoint}: a step took {then.global_batch} samples, and now takes {now.global_batch}; set "
            "train.micro_batch and train.accumulate so that it comes out"
        )
    free = _FREE_WITHOUT_OPTIMIZER if weights_only else _FREE
    for name, old, new in _differences(then.config, now.config):
        if not name.startswith(free):
            raise UserError(
                f"{checkpoint}: {name} was {old}, and is {new}; set it back, or name another folder with RUN="
            )
    return then


def _differences(
    old: dict[str, Any], new: dict[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    for key in sorted({*old, *new}):
        ours, theirs = old.get(key), new.get(key)
        if isinstance(ours, dict) and isinstance(theirs, dict):
            yield from _differences(ours, theirs, f"{prefix}{key}.")
        elif ours != theirs:
            yield f"{prefix}{key}", ours, theirs
