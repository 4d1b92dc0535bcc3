"""Does the demo's model learn, whatever the seed? The whole line from a fresh world, once per seed.

`make bench` writes a dated file to benchmarks/results/ with hardware and versions.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.results import write_result
from oxe_mix.text import say, table

_PACKAGES = ("torch", "transformers", "deepspeed", "apache-beam", "tensorflow-datasets", "numpy", "pillow")


def main() -> None:
    """Run the demo for each seed given and put the figures beside each other."""
    seeds = [int(seed) for seed in sys.argv[1:]] or [0, 1, 2]
    reports = {seed: _run(seed) for seed in seeds}
    rows = [_row(seed, report) for seed, report in reports.items()]
    header = (
        "seed",
        "model",
        "shuffled",
        "mean action",
        "repeat last",
        "model / mean",
        "exact bins",
        "training s",
    )
    text = table(header, rows)
    say("\n" + text)
    say(f"result: {write_result('three-seeds', _PACKAGES, {'seeds': reports})}")


def _run(seed: int) -> dict[str, Any]:
    out = Path("build/bench") / f"seed-{seed}"
    command = [sys.executable, "-m", "train_llava.demo", "--out", str(out), "--seed", str(seed)]
    subprocess.run(command, check=True)
    report: dict[str, Any] = json.loads((out / "run/evaluation.json").read_text())
    return report


def _row(seed: int, report: dict[str, Any]) -> tuple[str, ...]:
    l1 = report["held_out"]["l1"]
    figures = [l1[name] for name in ("model", "shuffled_images", "mean_action", "repeat_last")]
    ratio = l1["model"] / l1["mean_action"]
    exact = report["held_out"]["accuracy"]["model"]["exact"]
    return (
        str(seed),
        *(f"{figure:.3f}" for figure in figures),
        f"{ratio:.2f}",
        f"{exact:.1%}",
        f"{report['train_seconds']:.0f}",
    )


if __name__ == "__main__":
    main()
