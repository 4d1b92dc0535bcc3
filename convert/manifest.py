"""manifest.json, written last: what a converted folder holds and how it came to be. No manifest, no
result.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, model_validator

from oxe_mix.errors import UserError
from oxe_mix.files import read_model, write_json

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


class ConvertedDataset(_Model):
    """One dataset of a converted folder."""

    name: str
    version: str
    folder: str  # its RLDS, below the data folder
    splits: tuple[str, ...]
    weight: float
    share: float  # of the draws in training: weight x written samples, over the sum of that
    episodes: Tally
    steps: Tally
    image_bytes: int
    clipped: tuple[float, ...]  # share of the steps whose value lies outside what bins can say, per dimension
    files: tuple[ConvertedFile, ...]
    validation_files: tuple[ConvertedFile, ...]


class Manifest(_Model):
    """All of a converted folder."""

    format: Literal[1] = 1
    oxe_mix: str
    mix: str | None  # its name; None when the folder's own datasets were taken, weight 1 each
    seed: int
    val_fraction: float
    lock_sha256: str | None  # of the download that was read; None without a lock
    codec_sha256: str
    datasets: tuple[ConvertedDataset, ...]

    @property
    def num_samples(self) -> int:
        """Training samples of all datasets."""
        return sum(dataset.steps.written for dataset in self.datasets)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a converted folder. Raises: UserError when the folder is none or not finished."""
    file = folder / MANIFEST_FILE
    if not file.exists():
        raise UserError(
            f"{folder}: no {MANIFEST_FILE}, so no finished conversion; run oxe-mix convert --out {folder}"
        )
    return read_model(Manifest, file, "the manifest that oxe-mix convert writes")


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest of a converted folder."""
    write_json(folder / MANIFEST_FILE, manifest.model_dump(mode="json"))
