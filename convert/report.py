"""What came of one shard, in a file of its own: the counts for the manifest, and the proof that it need not
be converted again.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from convert.action_codec import NUM_BINS
from convert.manifest import BadRecord, ConvertedFile
from convert.samples import BAD_RECORD, EpisodeSamples
from oxe_mix.files import write_json

WRITTEN, HELD_OUT = "written", "held_out"


class ShardReport(BaseModel):
    """What went in and what came out of one shard; in = written + held out + dropped, for episodes and
    steps.
    """

    model_config = ConfigDict(extra="forbid")
    mark: str  # of all that it was made from
    dataset: str
    split: str
    index: int
    episodes: Counter[str] = Counter()
    steps: Counter[str] = Counter()
    num_images: int = 0
    image_bytes: int = 0
    image_crc32c: int = 0  # of all frames in the order in which they were written
    clipped: list[int] = []  # per dimension, over the first actions of all samples
    histogram: list[list[int]] = []  # of the first actions' bins, [A][NUM_BINS]
    instructions: Counter[str] = Counter()  # episodes with each, written and held out
    num_unlabelled: int = 0  # samples without an instruction of their own
    bad: list[BadRecord] = []
    train_file: ConvertedFile | None = None
    val_file: ConvertedFile | None = None

    def count(self, samples: EpisodeSamples, *, held_out: bool) -> None:
        """Book an episode and its steps under what becomes of them."""
        kind = samples.reason or (HELD_OUT if held_out else WRITTEN)
        self.episodes.update(["in", kind])
        self.steps.update({"in": samples.num_steps, **samples.dropped})
        if samples.reason:
            return
        self.steps[kind] += len(samples.steps)
        self.instructions[samples.instruction] += 1
        self.num_unlabelled += samples.num_unlabelled
        self._count_bins(samples)

    def count_bad(self) -> None:
        """Book the records that were skipped; of one that cannot be read nobody knows the steps."""
        self.episodes.update({"in": len(self.bad), BAD_RECORD: len(self.bad)})
        num_steps = sum(record.num_steps for record in self.bad)
        self.steps.update({"in": num_steps, BAD_RECORD: num_steps})

    def _count_bins(self, samples: EpisodeSamples) -> None:
        first: NDArray[np.int64] = samples.bins[:, 0]
        lost = samples.clipped.sum(axis=0).tolist()
        own = [np.bincount(column, minlength=NUM_BINS).tolist() for column in first.T]
        self.clipped = _sum(self.clipped, lost) if self.clipped else lost
        self.histogram = (
            [_sum(a, b) for a, b in zip(self.histogram, own, strict=True)] if self.histogram else own
        )


def write_report(file: Path, report: ShardReport) -> None:
    """Write a shard's report."""
    write_json(file, report.model_dump(mode="json"))


def read_report(file: Path) -> ShardReport | None:
    """A shard's report; None when there is none, or none of this version."""
    try:
        return ShardReport.model_validate_json(file.read_bytes())
    except (OSError, ValidationError):
        return None


def mark_of(*parts: object) -> str:
    """One hash over all that decides what a shard's output is."""
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()


def _sum(a: list[int], b: list[int]) -> list[int]:
    return [x + y for x, y in zip(a, b, strict=True)]
