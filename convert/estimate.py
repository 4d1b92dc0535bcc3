"""What a conversion will take, told before its first byte is written: frames, disk and time.

One record of each dataset is read; all others are taken to be like it.
"""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from convert.options import Rules
from convert.plan import DatasetOnDisk
from convert.samples import Camera
from convert.shards import ShardJob
from oxe_mix.errors import UserError
from oxe_mix.images import reencode
from oxe_mix.rlds import Episode
from oxe_mix.text import count, size
from oxe_mix.tfrecord import Damage, scan_records

# Measured on two cores: what a frame costs a worker beside its bytes, into files on a disk or into tars; how
# fast bytes go through it; what the command takes to start, and how much work makes up for starting one more
# process.
_FRAME_S = {"files": 100e-6, "tar": 50e-6}
_BYTES_PER_S = 600e6
_START_S = 4.0
_WORTH_A_WORKER_S = 4.0
_LINE_BYTES = 600


@dataclass(frozen=True, slots=True)
class Estimate:
    """Of a whole conversion; `peak_bytes` on the disk of `--out`."""

    num_samples: int
    peak_bytes: int
    worker_seconds: float  # of one worker, without start-up

    def workers(self, num_shards: int) -> int:
        """As many processes as there are cores and shards, but only as many as earn the seconds that each
        takes to start.
        """
        cores = len(os.sched_getaffinity(0))
        return max(1, min(cores, num_shards, int(self.worker_seconds // _WORTH_A_WORKER_S)))


def estimate(datasets: list[DatasetOnDisk], jobs: list[ShardJob]) -> Estimate:
    """Guess from the first record of each dataset."""
    parts = [_of_dataset(d, [job for job in jobs if job.card.name == d.card.name]) for d in datasets]
    return Estimate(
        num_samples=round(sum(samples for samples, _, _ in parts)),
        peak_bytes=round(sum(num_bytes for _, num_bytes, _ in parts)),
        worker_seconds=sum(seconds for _, _, seconds in parts),
    )


def tell(guess: Estimate, out: Path, workers: int) -> str:
    """The estimate in words.

    Raises: UserError when the disk of `out` cannot hold it.
    """
    folder = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    free = shutil.disk_usage(folder).free
    if guess.peak_bytes > free:
        raise UserError(
            f"{out}: about {size(guess.peak_bytes)} will be written and only {size(free)} are free; "
            "take another disk, or less: --stride, --steps-per-episode, --resize, --only"
        )
    seconds = _START_S + guess.worker_seconds / workers
    duration = f"{seconds / 60:,.0f} min" if seconds >= 120 else f"{seconds:,.0f} s"
    return (
        f"about {count(guess.num_samples, 'sample')}, {size(guess.peak_bytes)} on disk ({size(free)} free), "
        f"{duration}"
    )


def _of_dataset(dataset: DatasetOnDisk, jobs: list[ShardJob]) -> tuple[float, float, float]:
    """Samples, bytes and worker seconds."""
    for job in jobs:
        probe = _probe(job)
        if probe is not None:
            break
    else:
        return 0, 0, 0
    samples, record_bytes, frame_bytes, frame_s = probe
    num_episodes = sum(job.num_episodes for job in jobs)
    total = samples * num_episodes
    out_bytes = total * (frame_bytes + _LINE_BYTES + 1024 * (job.rules.layout == "tar"))
    read = 2 * record_bytes * num_episodes / _BYTES_PER_S
    return total, out_bytes, read + total * len(job.cameras) * (_FRAME_S[job.rules.layout] + frame_s)


def _probe(job: ShardJob) -> tuple[int, int, float, float] | None:
    """Of a shard's first record: samples, its bytes, bytes a sample of its frames, and what it takes to
    change one. None when it cannot be read: the conversion will say why.
    """
    with Path(job.file).open("rb") as stream:
        record = next(iter(scan_records(stream, job.file)), None)
    if record is None or isinstance(record, Damage):
        return None
    try:
        episode = Episode(record.payload, job.tree)
        if not episode.num_steps:
            return None
        changed = [_changed(episode, camera, job.rules) for camera in job.cameras]
    except ValueError:
        return None
    steps = job.rules.steps
    samples = min(-(-episode.num_steps // steps.stride), steps.per_episode or episode.num_steps)
    frame_bytes = sum(num_bytes for num_bytes, _ in changed)
    return samples, len(record.payload), frame_bytes, sum(seconds for _, seconds in changed) / len(changed)


def _changed(episode: Episode, camera: Camera, rules: Rules) -> tuple[float, float]:
    """Bytes of a frame as it will be written, and seconds to make it so."""
    frames = episode.slices(camera.key)
    mean = sum(map(len, frames)) / len(frames)
    start = time.perf_counter()
    changed = reencode(bytes(frames[0]), rules.images)
    return mean * len(changed) / max(1, len(frames[0])), time.perf_counter() - start
