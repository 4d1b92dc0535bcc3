"""Training speed on one GPU: our one-view loop beside the stock one, on LLaVA-OneVision's true shapes.

python -m benchmarks.gpu_train [--minutes 7] [--models ov-7b] [--dry]

Needs torch and transformers alone, from the repository's root; weights are random and made on the device.
Writes $OUT/gpu-train.json, or benchmarks/results/DATE-gpu-train.json, after every run. Without a GPU, or with
--dry, all paths are run for two steps at tiny shapes on the CPU, and nothing is said to be measured.

Ours: one 384 view a frame, logits at supervised positions, gradient checkpointing only when no batch fits
without, AdamW on fp32 masters of bf16 weights. "sdpa" passes the padding mask; "best" leaves
it out, as train_llava does, and prefers the attention kernel that was fastest beforehand; "compiled" compiles
layers too.
Stock: transformers' Trainer, default collator, anyres_max_9, logits everywhere, gradient checkpointing as in
LLaVA-NeXT's recipe; "tuned" goes without it. Its fused AdamW keeps bf16 states, and it has our LoRA layers:
both make it faster than a stock set-up is. Every run takes the largest batch of its list that fits.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import math
import os
import shutil
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_loops import (
    HAS_PILLOW,
    Collate,
    Samples,
    Settings,
    make_frames,
    stock_loop_name,
    tokens_of,
    train_ours,
    train_stock,
)
from benchmarks.gpu_measure import (
    Clock,
    Flops,
    attention_times,
    best_kernel,
    flops_per_sample,
    kernel_context,
    peak_flops,
)
from benchmarks.gpu_model import SHAPES, Shape, build, compile_layers, tiny
from benchmarks.results import write_result

WARMUP, MEASURED = 4, 12
NOT_MEASURED = "not measured: no GPU"
TARGETS: dict[str, Any] = {"mfu": {"ov-7b": 0.45, "ov-0.5b": 0.25}, "data_wait_share": 0.03, "speedup": 1.8}
FLASH_PACKAGE = "flash_attention_2"


@dataclass(frozen=True, slots=True)
class Run:
    """One loop on one model, and the batches it tries, largest first."""

    model: str
    loop: str  # ours or stock
    variant: str  # ours: sdpa, best, compiled; stock: recipe, tuned
    batches: tuple[int, ...]
    seconds: int = 55  # what it needs at most; it is left out when less time is left

    @property
    def is_stock(self) -> bool:
        """The loop that ours is compared with."""
        return self.loop == "stock"


# What matters most first: a run that finds no time left is left out, and said to be.
RUNS = (
    Run("ov-7b", "ours", "best", (16, 12, 8, 4)),
    Run("ov-7b", "stock", "recipe", (16, 8, 4)),
    Run("ov-0.5b", "ours", "best", (48, 32, 16, 8)),
    Run("ov-0.5b", "stock", "recipe", (16, 8, 4)),
    Run("ov-7b", "ours", "sdpa", (16, 12, 8, 4)),
    Run("ov-0.5b", "ours", "sdpa", (48, 32, 16, 8)),
    Run("ov-7b", "stock", "tuned", (8, 4, 2)),
    Run("ov-0.5b", "stock", "tuned", (8, 4, 2)),
    Run("ov-0.5b", "ours", "compiled", (48, 32, 16, 8), seconds=100),
    Run("ov-7b", "ours", "compiled", (16, 12, 8, 4), seconds=100),
)


@dataclass(frozen=True, slots=True)
class Bench:
    """The machine, and what all runs of a model share."""

    device: torch.device
    gpu: str  # its name; empty in a dry run
    deadline: float  # time.monotonic() by which everything has ended
    shapes: dict[str, Shape]
    kernels: dict[str, str]

    @property
    def dry(self) -> bool:
        """Whether paths are tried and nothing is measured."""
        return not self.gpu

    @property
    def num_workers(self) -> int:
        """Processes that decode frames: a core is left to each thread that feeds the GPU."""
        return 1 if self.dry else max(1, min(12, len(os.sched_getaffinity(0)) - 2))

    def clock(self) -> Clock:
        """Fresh, for one run."""
        warmup, measured = (0, 2) if self.dry else (WARMUP, MEASURED)
        return Clock(warmup, measured, min(self.deadline, time.monotonic() + 30), self.device)


def main() -> None:
    """Run what there is time for; exit 1 when a run failed."""
    options = _options()
    device = torch.device("cpu" if options.dry or not torch.cuda.is_available() else "cuda")
    dry = device.type == "cpu"
    gpu = "" if dry else torch.cuda.get_device_name()
    shapes = {name: tiny(shape) if dry else shape for name, shape in SHAPES.items() if name in options.models}
    deadline = time.monotonic() + 60 * options.minutes
    timed = {name: _kernel_times(shape, device) for name, shape in shapes.items()}
    kernels = {name: _choose(times) for name, times in timed.items()}
    bench = Bench(device, gpu, deadline, shapes, kernels)
    head = _head(bench) | {"attention": {} if dry else {"chosen": kernels, "milliseconds": timed}}
    results: list[dict[str, Any]] = []
    for run in [run for run in RUNS if run.model in shapes]:
        results.append(_result(run, bench))
        file = _write(head | {"comparison": compare(results), "runs": results}, dry=dry)
        _say(json.dumps(results[-1]))
    _say(f"{json.dumps(compare(results), indent=1)}\n{head.get('why', 'measured')}; result: {file}")
    sys.exit(any("failed" in result for result in results))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Training speed on one GPU.")
    parser.add_argument("--minutes", type=float, default=7, help="no run begins that would end later")
    parser.add_argument("--models", nargs="+", choices=sorted(SHAPES), default=sorted(SHAPES))
    parser.add_argument(
        "--dry", action="store_true", help="two steps of everything at tiny shapes on the CPU"
    )
    return parser.parse_args()


def _kernel_times(shape: Shape, device: torch.device) -> dict[str, float | None]:
    batch = 16 if device.type == "cuda" else 1
    return attention_times(shape, tokens_of(shape, stock=False), batch, device)


def _choose(times: dict[str, float | None]) -> str:
    """The package wins where it is installed: transformers calls it by itself."""
    return FLASH_PACKAGE if importlib.util.find_spec("flash_attn") else best_kernel(times)


def _result(run: Run, bench: Bench) -> dict[str, Any]:
    """A run with the first batch that fits; with checkpointing when none does."""
    about: dict[str, Any] = {"model": run.model, "loop": run.loop, "variant": run.variant, "too_large": []}
    batches = (2,) if bench.dry else run.batches
    recompute = run.is_stock and run.variant == "recipe"
    tries = [(batch, recompute) for batch in batches] + [(batches[-1], True)] * (not run.is_stock)
    for batch, checkpointing in tries:
        left = bench.deadline - time.monotonic()
        if left < run.seconds:
            return about | {"left_out": f"{left:.0f} s were left of the {run.seconds} it may need"}
        try:
            found = _measure(run, bench, batch, checkpointing=checkpointing)
            return about | {"batch": batch, "checkpointing": checkpointing} | found
        except torch.OutOfMemoryError:
            about["too_large"].append(batch)
        except (RuntimeError, ImportError) as error:  # the other runs still count
            return about | {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
        finally:
            _free()
    return about | {"left_out": "no batch fits"}


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _measure(run: Run, bench: Bench, batch: int, *, checkpointing: bool) -> dict[str, Any]:
    """One try. Raises: torch.OutOfMemoryError when the batch does not fit."""
    shape, clock, kernel = bench.shapes[run.model], bench.clock(), "torch's choice"
    if run.variant in ("best", "compiled"):
        kernel = bench.kernels[run.model]
    model = build(shape, bench.device, kernel if kernel == FLASH_PACKAGE else "sdpa")
    if run.variant == "compiled":
        compile_layers(model, "eager" if bench.dry else "inductor")
    samples = Samples(shape, make_frames(shape), stock=run.is_stock)
    settings = Settings(batch, checkpointing, bench.num_workers, bench.device, mask=run.variant == "sdpa")
    with kernel_context(kernel) if kernel != FLASH_PACKAGE else nullcontext():
        if run.is_stock:
            loss = train_stock(model, samples, clock, settings)
        else:
            loss = train_ours(model, samples, Collate(shape), clock, settings)
    if not math.isfinite(loss):
        return {"failed": f"the loss is {loss}"}
    done = {"kernel": kernel, "steps": len(clock.steps), "loss": round(loss, 3)}
    figures = speeds(clock, batch, tokens_of(shape, stock=run.is_stock).total)
    flops = flops_per_sample(model, shape, tokens_of(shape, stock=run.is_stock))
    figures |= shares_of_peak(figures["samples_per_s"], flops, bench.gpu)
    return done if bench.dry else done | figures


def speeds(clock: Clock, batch: int, tokens: int) -> dict[str, Any]:
    """Rates by the median step, and the most memory that was in use."""
    median, mean, wait = clock.figures()
    return {
        "samples_per_s": round(batch / median, 2),
        "tokens_per_s": round(batch / median * tokens),
        "step_s": {"median": round(median, 4), "mean": round(mean, 4)},
        "data_wait_share": round(wait, 4),
        "peak_memory_gb": round(torch.cuda.max_memory_allocated() / 1e9, 1),
        "peak_reserved_gb": round(torch.cuda.max_memory_reserved() / 1e9, 1),
    }


def shares_of_peak(samples_per_s: float, flops: Flops, gpu: str) -> dict[str, Any]:
    """MFU by the weights' FLOPs alone, and with attention's; None for a device whose peak we do not know."""
    peak = peak_flops(gpu) or math.nan
    mfu = samples_per_s * flops.weights / peak
    with_attention = samples_per_s * (flops.weights + flops.attention) / peak
    return {
        "mfu": None if math.isnan(mfu) else round(mfu, 4),
        "mfu_with_attention": None if math.isnan(mfu) else round(with_attention, 4),
        "tflop_per_sample": {"weights": flops.weights / 1e12, "attention": flops.attention / 1e12},
    }


def _head(bench: Bench) -> dict[str, Any]:
    """What the figures rest on."""
    head: dict[str, Any] = {
        "measured": not bench.dry,
        "gpu": bench.gpu or None,
        "cuda": torch.version.cuda,
        "peak_flops": peak_flops(bench.gpu),
        "stock_loop": stock_loop_name(),
        "frames": "256x256 JPEG and PNG, decoded by workers" if HAS_PILLOW else "ready uint8: no Pillow here",
        "workers": bench.num_workers,
        "tokens": {
            kind: tokens_of(SHAPES["ov-7b"], stock=kind == "stock").total for kind in ("ours", "stock")
        },
        "trained": {"ov-0.5b": "all weights", "ov-7b": "LoRA 32 in the language model, new tokens' rows"},
        "optimizer": {"ours": "fused AdamW, fp32 masters and states", "stock": "fused AdamW, bf16 states"},
        "targets": TARGETS,
    }
    return head | ({"why": NOT_MEASURED} if bench.dry else {})


def compare(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Our best run of each model beside its targets and each stock run; empty when nothing was measured."""
    compared: dict[str, Any] = {}
    for name in SHAPES:
        runs = [r for r in results if r["model"] == name and "samples_per_s" in r]
        ours = [r for r in runs if r["loop"] == "ours"]
        if not ours:
            continue
        best = max(ours, key=lambda r: r["samples_per_s"])
        verdicts = {"mfu": _verdict(best["mfu"], TARGETS["mfu"][name])}
        verdicts["data_wait_share"] = _verdict(best["data_wait_share"], TARGETS["data_wait_share"], most=True)
        for stock in [r for r in runs if r["loop"] == "stock"]:
            ratio = round(best["samples_per_s"] / stock["samples_per_s"], 2)
            verdicts[f"speedup_over_{stock['variant']}"] = _verdict(ratio, TARGETS["speedup"])
        compared[name] = {"ours": best["variant"]} | verdicts
    return compared


def _verdict(value: float | None, target: float, *, most: bool = False) -> dict[str, Any]:
    met = None if value is None else (value < target if most else value >= target)
    return {"value": value, "target": target, "met": met}


def _write(figures: dict[str, Any], *, dry: bool) -> Path:
    """Into results/, and a copy into $OUT where that is set. A dry run never replaces a measured one."""
    name = "gpu-train-dry" if dry else "gpu-train"
    file = write_result(name, ("torch", "transformers"), figures)
    if "OUT" in os.environ:
        shutil.copy(file, Path(os.environ["OUT"]) / f"{name}.json")
    return file


def _say(text: str) -> None:
    """Print at once; the module that prints for the project is not importable on a machine this bare."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
