"""What a user may ask of a conversion, checked before anything is read."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar, get_args

from pydantic import ValidationError

from convert.action_codec import Binning
from convert.frames import Layout
from convert.prompt import Asking
from convert.steps import ChunkEnd, StepRules
from oxe_mix.errors import UserError
from oxe_mix.images import FrameChange

OnBadRecord = Literal["stop", "skip"]
StatisticsOf = Literal["all", "train"]
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Rules:
    """What flows to the workers with each shard: how a record becomes samples."""

    asking: Asking
    binning: Binning
    steps: StepRules
    layout: Layout
    images: FrameChange
    statistics: StatisticsOf
    max_bad: int | None  # broken records that are skipped; None: the first one ends the run


@dataclass(frozen=True, slots=True)
class ConvertOptions:
    """The options of the command, as they were typed."""

    to: str = "llava"
    mix: Path | None = None
    data: tuple[Path, ...] = (Path("data"),)
    out: Path = Path("llava")
    only: tuple[str, ...] = ()
    val_fraction: float = 0.0
    statistics: str = "all"
    cards: Path | None = None
    layout: str = "files"
    array: bool = False  # --json
    images: str = "keep"
    resize: int | None = None
    cameras: str = "primary"
    state: bool = False
    allow_missing: bool = False
    prompt: str | None = None
    binning: str = "uniform256"
    chunk: int = 1
    chunk_end: str | None = None
    stride: int = 1
    steps_per_episode: int | None = None
    drop_idle: bool = False
    on_bad_record: str = "stop"
    max_bad: int = 10
    rules: Rules = field(init=False)

    def __post_init__(self) -> None:
        """Raises: UserError for a value that makes no sense, naming its option."""
        if self.to != "llava":
            raise UserError(f"--to {self.to}: unknown format; known: llava")
        if not 0 <= self.val_fraction < 1:
            raise UserError(f"--val-fraction {self.val_fraction:g} is not in [0, 1)")
        object.__setattr__(self, "rules", self._rules())

    def _rules(self) -> Rules:
        return Rules(
            asking=self._asking(),
            binning=_one_of("--binning", self.binning, get_args(Binning)),
            steps=StepRules(
                chunk=self.chunk,
                chunk_end=_one_of("--chunk-end", self.chunk_end, (None, *get_args(ChunkEnd))),
                stride=self.stride,
                per_episode=self.steps_per_episode,
                drop_idle=self.drop_idle,
            ),
            layout=_one_of("--layout", self.layout, get_args(Layout)),
            images=FrameChange(jpeg_quality=_jpeg_quality(self.images), max_side=self.resize, flip=False),
            statistics=_one_of("--statistics", self.statistics, get_args(StatisticsOf)),
            max_bad=self._max_bad(),
        )

    def _max_bad(self) -> int | None:
        skips = _one_of("--on-bad-record", self.on_bad_record, get_args(OnBadRecord)) == "skip"
        return self.max_bad if skips else None

    def _asking(self) -> Asking:
        cameras = tuple(role.strip() for role in self.cameras.split(","))
        asked = {"cameras": cameras, "state": self.state}
        if self.prompt is not None:
            asked["template"] = self.prompt
        try:
            return Asking.model_validate(asked)
        except ValidationError as error:
            first = error.errors()[0]
            option = "--prompt" if first["loc"][0] == "template" else "--cameras"
            raise UserError(f"{option}: {first['msg'].removeprefix('Value error, ')}") from error


def _one_of(option: str, value: object, known: tuple[_T, ...]) -> _T:
    for one in known:
        if one == value:
            return one
    words = ", ".join(str(one) for one in known if one is not None)
    raise UserError(f"{option} {value}: unknown; known: {words}")


def _jpeg_quality(images: str) -> int | None:
    """Of `keep` or `jpeg:Q`."""
    kind, _, quality = images.partition(":")
    if images == "keep":
        return None
    if kind != "jpeg" or not quality.isdecimal() or not 1 <= int(quality) <= 100:
        raise UserError(f"--images {images}: write keep, or jpeg:Q with Q from 1 to 100")
    return int(quality)
