"""A run's files, proved to be what training writes before anything is drawn of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from convert.action_codec import CODEC_FILE
from oxe_mix.errors import UserError
from train_llava.card_source import CardSource, read_source
from train_llava.config import METRICS_FILE
from train_llava.result import REPORT_FILE, VERSIONS_FILE

_LEAST = {"model", "mean_action"}  # policies that every evaluation scores


class _Hits(BaseModel):
    model_config = ConfigDict(extra="forbid")
    exact: float | None
    within_1: float | None
    within_5: float | None

    @model_validator(mode="after")
    def _all_or_none(self) -> _Hits:
        if len({share is None for share in (self.exact, self.within_1, self.within_5)}) > 1:
            raise ValueError("some shares are null and some are not")
        return self


class _Gripper(BaseModel):
    closed: float | None
    open: float | None


class _Scores(BaseModel):
    samples: int
    l1: dict[str, float | None]
    accuracy: dict[str, _Hits]
    gripper_f1: dict[str, Any]

    @model_validator(mode="after")
    def _all_policies(self) -> _Scores:
        absent = _LEAST - set(self.l1) or set(self.l1) - (set(self.accuracy) & set(self.gripper_f1))
        if absent:
            raise ValueError(f"no scores of {', '.join(sorted(absent))}")
        return self


class _DatasetScores(_Scores):
    gripper_f1: dict[str, _Gripper | None]
    moving: list[int]
    l1_robot_units: dict[str, list[float]]

    @model_validator(mode="after")
    def _one_width(self) -> _DatasetScores:
        if "model" not in self.l1_robot_units or len(set(map(len, self.l1_robot_units.values()))) > 1:
            raise ValueError("l1_robot_units is not of one width, or not of the model")
        return self


class _Evaluation(_Scores):
    gripper_f1: dict[str, float | None]
    datasets: dict[str, _DatasetScores]
    loss: dict[str, float] | None = None


class _RunReport(BaseModel):
    steps: int
    global_batch: int
    train_seconds: float
    ranks: int
    zero_stage: int
    mean_loss: float
    final_loss: float
    held_out: _Evaluation | None


class _Line(BaseModel):
    step: int
    loss: float = 0.0
    shares: dict[str, float] = Field(default_factory=dict)


def read_run(run: Path) -> CardSource:
    """A run's folder. Raises: UserError, one line that names the file, for one that is not what training
    writes.
    """
    try:
        source = read_source(run)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:  # all files but the metrics say it themselves
        raise UserError(f"{run / METRICS_FILE}: a line is not valid JSON ({error})") from error
    if (run / REPORT_FILE).exists():
        _prove(TypeAdapter(_RunReport), source.report, str(run / REPORT_FILE))
    kind, evaluation = TypeAdapter(_Line), TypeAdapter(_Evaluation)
    for number, line in enumerate(source.lines, 1):
        _prove(kind, line, f"{run / METRICS_FILE}: line {number}")
        if "evaluation" in line:
            _prove(evaluation, line["evaluation"], f"{run / METRICS_FILE}: line {number}: evaluation")
    _prove(TypeAdapter(dict[str, str]), source.versions, str(run / VERSIONS_FILE))
    return source


def has_weights(run: Path) -> bool:
    """Whether a run can be asked about anything."""
    return (run / CODEC_FILE).exists() and any(run.glob("*.safetensors"))


def _prove(kind: TypeAdapter[Any], value: Any, where: str) -> None:
    try:
        kind.validate_python(value, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the whole"
        raise UserError(
            f"{where}: {place}: {first['msg'].split(' or instance')[0]}; that is not what training writes"
        ) from error
