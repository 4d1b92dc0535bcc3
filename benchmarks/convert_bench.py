"""What the parts of the stage 2 benchmark are made of: sources, commands, figures with their targets."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.processes import Run, run
from benchmarks.rlds_maker import Camera, make_dataset
from convert.llava import IMAGES
from convert.manifest import read_manifest
from oxe_mix.text import count, say

FILES, TAR = ("--layout", "files"), ("--layout", "tar")
LAYOUTS = {"files": FILES, "tar": TAR}
JPEG = Camera("jpeg")
CORES = len(os.sched_getaffinity(0))


@dataclass(frozen=True, slots=True)
class Sizes:
    """Frames of each source, and how often things are measured. Below 24,000 frames start-up would decide."""

    small: int
    large: int
    png: int
    wide: int  # 480x640, the dearest to decode
    middle: int  # for memory, workers and the reader
    reads: int
    rounds: int
    large_rounds: int
    free_gb: float


FULL = Sizes(24_000, 240_000, 24_000, 6_000, 100_000, 30_000, rounds=3, large_rounds=2, free_gb=20)
QUICK = Sizes(1_600, 8_000, 400, 200, 2_000, 3_000, rounds=1, large_rounds=1, free_gb=2)


@dataclass(frozen=True, slots=True)
class Source:
    """A data folder of one dataset."""

    data: Path
    dataset: Path
    num_frames: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Done:
    """One run of a command, and what it read and wrote."""

    run: Run
    num_frames: int
    read: int
    written: int

    @property
    def frames_per_s(self) -> float:
        """Start-up included."""
        return self.num_frames / self.run.seconds

    @property
    def bytes_per_s(self) -> float:
        """Read and written, start-up included."""
        return (self.read + self.written) / self.run.seconds


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured number; the target is a lower bound, or an upper one."""

    name: str
    value: float
    target: float | None = None
    at_most: bool = False

    @property
    def met(self) -> bool:
        """Whether the target, if there is one, is reached."""
        return self.target is None or (
            self.value <= self.target if self.at_most else self.value >= self.target
        )


@dataclass(slots=True)
class Bench:
    """The scratch folder and what is known so far."""

    scratch: Path
    sizes: Sizes
    figures: list[Figure] = field(default_factory=list)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    starts: dict[str, float] = field(default_factory=dict)

    @property
    def out(self) -> Path:
        """Where commands write; it is removed after each."""
        return self.scratch / "out"

    def source(self, camera: Camera, num_frames: int) -> Source:
        """A data folder of that many frames, made when it is first asked for, and read once: all runs find
        it in the page cache, as far as memory reaches.
        """
        data = self.scratch / f"{camera.name}-{num_frames}"
        if not data.exists():
            say(f"  making {count(num_frames, 'frame')}, {camera.name}")
            make_dataset(data, camera, num_frames)
        dataset = next(data.glob("*/*"))
        num_bytes = 0
        for file in dataset.iterdir():
            with file.open("rb") as stream:
                while piece := stream.read(1 << 22):
                    num_bytes += len(piece)
        self.facts[f"{data.name}, records"] = {
            "shards": len(list(dataset.glob("*.tfrecord-*"))),
            "bytes per frame": round(num_bytes / num_frames),
        }
        return Source(data, dataset, num_frames, num_bytes)

    def ours(self, source: Source, *options: str, label: str, keep: Path | None = None) -> Done:
        """The whole command; its output is counted, then removed or kept."""
        command = [sys.executable, "-m", "oxe_mix.cli", "convert", "--data", str(source.data)]
        ran = self._run([*command, "--out", str(self.out), *options], label)
        steps = sum(dataset.steps.written for dataset in read_manifest(self.out).datasets)
        assert steps == source.num_frames, f"{steps} of {source.num_frames} frames written"
        done = Done(ran, source.num_frames, source.num_bytes, size_of(self.out))
        if keep is None:
            shutil.rmtree(self.out)
        else:
            self.out.rename(keep)
        return done

    def usual(self, source: Source, *options: str, label: str) -> Done:
        """The usual way; its output is counted, then removed."""
        command = [sys.executable, "-m", "benchmarks.usual_way", str(source.dataset), str(self.out), *options]
        ran = self._run(command, label)
        samples = json.loads((self.out / "conversations.json").read_text())
        assert len(samples) == source.num_frames, f"{len(samples)} of {source.num_frames} frames written"
        done = Done(ran, source.num_frames, source.num_bytes, size_of(self.out))
        shutil.rmtree(self.out)
        return done

    def copy(self, folder: Path, num_frames: int, label: str) -> Done:
        """`cp -r` of a folder to the same disk; the copy is removed."""
        num_bytes = size_of(folder)
        done = Done(
            self._run(["cp", "-r", str(folder), str(self.out)], label), num_frames, num_bytes, num_bytes
        )
        shutil.rmtree(self.out)
        return done

    def start_up(self, layout: str, num_workers: int) -> float:
        """Seconds that the command takes for a dataset of one episode; measured once."""
        label = f"one episode, {layout}, --workers {num_workers}"
        if label not in self.starts:
            options = (*LAYOUTS[layout], "--workers", str(num_workers))
            runs = [self.ours(self.source(JPEG, 1), *options, label=label) for _ in range(self.sizes.rounds)]
            self.starts[label] = median_seconds(runs)
        return self.starts[label]

    def add(self, *figures: Figure) -> None:
        """Take figures into the result, and print them."""
        self.figures.extend(figures)
        assert len({figure.name for figure in self.figures}) == len(self.figures), "a name came twice"
        for figure in figures:
            bound = "" if figure.target is None else f"   target {'<=' if figure.at_most else '>='} "
            bound += (
                "" if figure.target is None else f"{figure.target:g}: {'met' if figure.met else 'MISSED'}"
            )
            say(f"  {figure.name}: {figure.value:,.2f}{bound}")

    def _run(self, command: Sequence[str], label: str) -> Run:
        shutil.rmtree(self.out, ignore_errors=True)
        ran = run(command)
        self.seconds.setdefault(label, []).append(round(ran.seconds, 2))
        say(f"  {label}: {ran.seconds:.2f} s")
        return ran


def median_rate(runs: list[Done]) -> float:
    """Frames a second."""
    return statistics.median(done.frames_per_s for done in runs)


def median_seconds(runs: list[Done]) -> float:
    """Start-up included."""
    return statistics.median(done.run.seconds for done in runs)


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(
        entry.stat().st_size if entry.is_file(follow_symlinks=False) else size_of(Path(entry.path))
        for entry in os.scandir(folder)
    )


def images_of(converted: Path) -> Path:
    """The frames of a converted folder."""
    return converted / IMAGES
