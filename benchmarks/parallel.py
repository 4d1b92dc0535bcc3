"""Is an answer from one pass as good as one token by token? The demo trained both ways, on the same episodes.

The run token by token is that of `benchmarks.three_seeds` with the same seed, made where it is not there.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from benchmarks.results import write_result
from oxe_mix.text import say, table

_CONFIG = Path("train_llava/configs/tiny-cpu.yaml")
_BENCH = Path("build/bench")
_PACKAGES = ("torch", "transformers", "deepspeed", "numpy")


def main() -> None:
    """Train what is not there, compare, and record."""
    seed = sys.argv[1] if len(sys.argv) > 1 else "0"
    config = yaml.safe_load(_CONFIG.read_text())
    config["train"]["parallel_action_slots"] = True
    file = _BENCH / "parallel.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(config))
    found = {
        "token by token": _run(_BENCH / f"seed-{seed}", seed, _CONFIG),
        "one pass": _run(_BENCH / f"parallel-{seed}", seed, file),
    }
    rows = [_row(way, report["held_out"]) for way, report in found.items()]
    say("\n" + table(("held-out episodes", "exact bins", "within 1", "L1", "of mean's"), rows))
    say(f"result: {write_result('parallel', _PACKAGES, {'seed': int(seed), 'reports': found})}")


def _run(out: Path, seed: str, config: Path) -> dict[str, Any]:
    report = out / "run/evaluation.json"
    if not report.exists():
        words = ["--out", str(out), "--seed", seed, "--config", str(config)]
        subprocess.run([sys.executable, "-m", "train_llava.demo", *words], check=True)
    found: dict[str, Any] = json.loads(report.read_text())
    return found


def _row(way: str, held_out: dict[str, Any]) -> tuple[str, ...]:
    accuracy, l1 = held_out["accuracy"]["model"], held_out["l1"]
    return (
        way,
        f"{accuracy['exact']:.1%}",
        f"{accuracy['within_1']:.1%}",
        f"{l1['model']:.3f}",
        f"{l1['model'] / l1['mean_action']:.2f}",
    )


if __name__ == "__main__":
    main()
