"""The parts of the stage 2 benchmark. Runs that are compared stand in one round, in turn, so that neither has
the quieter machine.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable
from functools import partial

from benchmarks.convert_bench import (
    CORES,
    FILES,
    JPEG,
    LAYOUTS,
    TAR,
    Bench,
    Done,
    Figure,
    Source,
    images_of,
    median_rate,
    median_seconds,
)
from benchmarks.processes import run
from benchmarks.rlds_maker import Camera

_LIMIT_MB = 400  # peak resident memory of any process of the command
_BOTH = ("--workers", str(CORES))


def small(bench: Bench) -> None:
    """JPEG kept, into files and tars, beside the usual way."""
    source = bench.source(JPEG, bench.sizes.small)
    done = _rounds(
        bench.sizes.rounds,
        {
            "usual": partial(bench.usual, source, label="small: usual way"),
            "files": partial(bench.ours, source, *FILES, label="small: files"),
            "tar": partial(bench.ours, source, *TAR, label="small: tar"),
        },
    )
    usual = median_rate(done["usual"])
    bench.facts["usual way, frames/s"] = round(usual)
    for layout, target in (("files", 7), ("tar", 9)):
        rate = median_rate(done[layout])
        bench.add(
            Figure(f"small, {layout}: frames/s", rate),
            Figure(f"small, {layout}: beside the usual way", rate / usual, target),
        )


def large(bench: Bench) -> None:
    """JPEG kept at ten times the data, beside the usual way (measured at the small size) and cp."""
    few, many = bench.source(JPEG, bench.sizes.small), bench.source(JPEG, bench.sizes.large)
    kept = bench.scratch / "kept"

    def copy_of_images() -> Done:
        done = bench.copy(images_of(kept), many.num_frames, "large: cp -r of the images folder")
        shutil.rmtree(kept)
        return done

    done = _rounds(
        bench.sizes.large_rounds,
        {
            "cp for tar": partial(bench.copy, many.data, many.num_frames, "large: cp -r of the RLDS folder"),
            "tar": partial(bench.ours, many, *TAR, label="large: tar"),
            "small tar": partial(bench.ours, few, *TAR, *_BOTH, label="large: tar, small source"),
            "files": partial(bench.ours, many, *FILES, label="large: files", keep=kept),
            "cp for files": copy_of_images,
            "small files": partial(bench.ours, few, *FILES, *_BOTH, label="large: files, small source"),
            "usual": partial(bench.usual, few, label="large: usual way, small source"),
        },
    )
    usual_start = bench.usual(bench.source(JPEG, 1), label="usual way, one episode").run.seconds
    usual = median_rate(done["usual"])
    usual_net = few.num_frames / (median_seconds(done["usual"]) - usual_start)
    for layout, target in (("files", 12), ("tar", 25)):
        rate = median_rate(done[layout])
        copied = statistics.median(d.bytes_per_s for d in done[f"cp for {layout}"])
        ours = statistics.median(d.bytes_per_s for d in done[layout])
        bench.add(
            Figure(f"large, {layout}: frames/s", rate),
            Figure(f"large, {layout}: beside the usual way", rate / usual, target),
            Figure(f"large, {layout}: beside the usual way less its start-up", rate / usual_net),
            Figure(f"large, {layout}: MB/s read and written", ours / 1e6),
            Figure(f"large, {layout}: share of the rate of cp", ours / copied, 0.6),
        )
        _cost_at_ten_times(bench, layout, (few, many), (done[f"small {layout}"], done[layout]))


def _cost_at_ten_times(
    bench: Bench, layout: str, sources: tuple[Source, Source], done: tuple[list[Done], list[Done]]
) -> None:
    start = bench.start_up(layout, CORES)
    raw = [median_seconds(d) / s.num_frames for s, d in zip(sources, done, strict=True)]
    net = [(median_seconds(d) - start) / s.num_frames for s, d in zip(sources, done, strict=True)]
    bench.add(
        Figure(f"{layout}: cost of a frame at 10x the data, start-up subtracted", net[1] / net[0], 1.1, True),
        Figure(f"{layout}: cost of a frame at 10x the data, start-up included", raw[1] / raw[0]),
    )


def png(bench: Bench) -> None:
    """PNG kept, and made JPEG, beside the usual way."""
    _decoding(
        bench, Camera("png"), bench.sizes.png, {"kept": ((), 8), "jpeg:95": (("--images", "jpeg:95"), 2)}
    )


def resize(bench: Bench) -> None:
    """480x640 made smaller, beside the usual way, which does the same with Pillow's Lanczos."""
    options = ("--resize", "256")
    _decoding(bench, Camera("jpeg", 480, 640), bench.sizes.wide, {"--resize 256": (options, 2)}, "256")


def _decoding(
    bench: Bench,
    camera: Camera,
    num_frames: int,
    ours: dict[str, tuple[tuple[str, ...], float]],
    *usual_options: str,
) -> None:
    source = bench.source(camera, num_frames)
    runs = {
        name: partial(bench.ours, source, *FILES, *options, label=f"{camera.name}: {name}")
        for name, (options, _) in ours.items()
    }
    usual = partial(bench.usual, source, *usual_options, label=f"{camera.name}: usual way")
    done = _rounds(bench.sizes.large_rounds, {"usual": usual, **runs})
    for name, (_, target) in ours.items():
        rate = median_rate(done[name])
        bench.add(
            Figure(f"{camera.name}, {name}: frames/s", rate),
            Figure(f"{camera.name}, {name}: beside the usual way", rate / median_rate(done["usual"]), target),
        )


def workers(bench: Bench) -> None:
    """Frames a second of one worker process and of two."""
    source = bench.source(JPEG, bench.sizes.middle)
    for layout, options in LAYOUTS.items():
        runs: dict[str, Callable[[], Done]] = {}
        for number in ("1", "2"):
            label = f"--workers {number}, {layout}"
            runs[number] = partial(bench.ours, source, *options, "--workers", number, label=label)
        done = _rounds(bench.sizes.rounds, runs)
        raw = {number: median_seconds(d) for number, d in done.items()}
        start = {number: bench.start_up(layout, int(number)) for number in runs}
        net = {number: raw[number] - start[number] for number in runs}
        bench.add(
            *(Figure(f"--workers {n}, {layout}: frames/s", source.num_frames / raw[n]) for n in runs),
            Figure(f"{layout}: efficiency of 2 workers, start-up subtracted", net["1"] / net["2"] / 2, 0.85),
            Figure(f"{layout}: efficiency of 2 workers, start-up included", raw["1"] / raw["2"] / 2),
        )


def memory(bench: Bench) -> None:
    """Peak resident memory of every process of the command, for little data and for much."""
    for num_frames in (100, bench.sizes.middle):
        source = bench.source(JPEG, num_frames)
        for layout, options in LAYOUTS.items():
            label = f"memory: {num_frames} frames, {layout}"
            ran = bench.ours(source, *options, *_BOTH, label=label).run
            name = f"{num_frames:,} frames, {layout}: peak MB of"
            bench.add(
                Figure(f"{name} the command", ran.command_mb, _LIMIT_MB, True),
                Figure(f"{name} its largest child", ran.child_mb, _LIMIT_MB, True),
            )


def reader(bench: Bench) -> None:
    """Random samples a second, line and encoded frames, by one process that has just started."""
    source = bench.source(JPEG, bench.sizes.middle)
    for layout, options in LAYOUTS.items():
        kept = bench.scratch / "kept"
        bench.ours(source, *options, label=f"reader: convert into {layout}", keep=kept)
        command = [sys.executable, "-m", "benchmarks.reading", str(kept), str(bench.sizes.reads)]
        reports = [json.loads(run(command).output) for _ in range(bench.sizes.rounds)]
        shutil.rmtree(kept)
        figures = {name: statistics.median(r[name] for r in reports) for name in reports[0]}
        bench.add(
            Figure(f"reader, {layout}: samples/s", figures["samples_per_s"], 3000),
            Figure(
                f"reader, {layout}: beside bare reads of as many bytes",
                figures["samples_per_s"] / figures["bare_reads_per_s"],
            ),
            Figure(f"reader, {layout}: seconds to open", figures["open_s"]),
        )


def _rounds(number: int, runs: dict[str, Callable[[], Done]]) -> dict[str, list[Done]]:
    done: dict[str, list[Done]] = defaultdict(list)
    for _ in range(number):
        for name, one in runs.items():
            done[name].append(one())
    return done


PARTS: dict[str, Callable[[Bench], None]] = {
    "jpeg24k": small,
    "jpeg240k": large,
    "png": png,
    "resize": resize,
    "workers": workers,
    "memory": memory,
    "reader": reader,
}
