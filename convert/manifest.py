"""manifest.json, written last: what a converted folder holds and how it came to be. No manifest, no
result.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, model_validator

from convert.action_codec import CODEC_FILE, ActionCodec, read_codec
from convert.frames import Layout
from convert.prompt import CameraRole
from oxe_mix.cards import Recipe
from oxe_mix.errors import UserError
from oxe_mix.files import read_model, write_json
from oxe_mix.lock import holds_rlds
from oxe_mix.tfrecord import Damage, Record

MANIFEST_FILE = "manifest.json"


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Tally(_Model):
    """Episodes or steps: in = written + held_out + dropped. Raises ValueError when they do not add up."""

    total: int
    written: int
    held_out: int
    dropped: dict[str, int]

    @model_validator(mode="after")
    def _adds_up(self) -> Tally:
        out = self.written + self.held_out + sum(self.dropped.values())
        if out != self.total:
            raise ValueError(f"{self.total} in, {out} accounted for")
        return self


class ConvertedFile(_Model):
    """One file of conversations; the path is below the converted folder."""

    path: str
    samples: int
    sha256: str


class ConvertedFrames(_Model):
    """The frames of one shard: a folder or a tar below the converted folder."""

    path: str
    images: int
    bytes: int
    crc32c: int  # of all its frames, in the order of the samples


class BadRecord(_Model):
    """A record that was skipped, and what was wrong with it, which names shard, number and offset."""

    record: int
    num_steps: int = 0  # 0 when it cannot be read
    error: str

    @classmethod
    def of(cls, record: Record | Damage, num_steps: int, error: str) -> BadRecord:
        """A record that was found."""
        return cls(record=record.number, num_steps=num_steps, error=error)


class Instructions(_Model):
    """What the written and held-out episodes of a dataset are told to do."""

    distinct: int
    unlabelled_samples: int  # told their episode's first instruction for want of their own
    most_repeated: dict[str, int]  # the twelve with the most episodes, most first


class ConvertedDataset(_Model):
    """One dataset of a converted folder."""

    name: str
    version: str
    folder: str  # its RLDS, below the data folder
    splits: tuple[str, ...]
    recipe: Recipe
    cameras: tuple[CameraRole, ...]
    weight: float
    weight_share: float  # the weight over the sum of weights: its share of the draws were all of one size
    share: float  # of the draws in training: weight x written samples, over the sum of that
    episodes: Tally
    steps: Tally
    images: int
    image_bytes: int
    clipped: tuple[float, ...]  # share of the samples whose value bins cannot say, per dimension
    near_constant: tuple[int, ...]  # dimensions with 99 % of the samples in one bin
    instructions: Instructions
    bad_records: tuple[BadRecord, ...]
    files: tuple[ConvertedFile, ...]
    validation_files: tuple[ConvertedFile, ...]
    frames: tuple[ConvertedFrames, ...]


class Asked(_Model):
    """The options that decided what the folder holds."""

    val_fraction: float
    statistics: str
    layout: Layout
    images: str
    resize: int | None
    chunk: int
    chunk_end: str | None
    stride: int
    steps_per_episode: int | None
    drop_idle: bool
    on_bad_record: str
    only: tuple[str, ...]


class Manifest(_Model):
    """All of a converted folder."""

    format: Literal[2] = 2
    oxe_mix: str
    mix: str | None  # its name; None when the folder's own datasets were taken, weight 1 each
    seed: int
    asked: Asked
    lock_sha256: tuple[str, ...]  # of the downloads that were read; none for folders without a lock
    codec_sha256: str
    missing: tuple[str, ...]  # what was asked for and did not arrive
    datasets: tuple[ConvertedDataset, ...]

    @property
    def num_samples(self) -> int:
        """Training samples of all datasets."""
        return sum(dataset.steps.written for dataset in self.datasets)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a converted folder. Raises: UserError when the folder is none or not finished."""
    file = folder / MANIFEST_FILE
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give one that oxe-mix convert wrote")
    if not file.exists():
        mend = f"--data {folder} --out llava" if holds_rlds(folder) else f"--out {folder}"
        raise UserError(
            f"{folder}: no {MANIFEST_FILE}, so no finished conversion; run oxe-mix convert {mend}"
        )
    return read_model(Manifest, file, "the manifest that oxe-mix convert writes")


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest of a converted folder."""
    write_json(folder / MANIFEST_FILE, manifest.model_dump(mode="json"))


def codec_of(folder: Path, manifest: Manifest) -> ActionCodec:
    """The codec of a converted folder. Raises: UserError when it does not know each of its datasets."""
    codec = read_codec(folder)
    if unknown := [own.name for own in manifest.datasets if own.name not in codec.datasets]:
        raise UserError(
            f"{folder / CODEC_FILE}: no statistics of {', '.join(unknown)}, which {MANIFEST_FILE} lists; "
            "run oxe-mix convert again"
        )
    return codec
