"""Is an answer from one pass as good as one token by token? The demo trained both ways, on the same episodes.

    python -m benchmarks.parallel [SEED [CHUNK]]

Of single actions the run token by token is that of `benchmarks.three_seeds` with the same seed, made where it
is not there.
"""

from __future__ import annotations

import argparse
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
    parser = argparse.ArgumentParser(description="The demo from one pass and token by token.")
    parser.add_argument("seed", nargs="?", default="0")
    parser.add_argument("chunk", nargs="?", default="1", help="actions per answer")
    args = parser.parse_args()
    seed, chunk = args.seed, args.chunk
    config = yaml.safe_load(_CONFIG.read_text())
    config["train"]["parallel_action_slots"] = True
    file = _BENCH / "parallel.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(config))
    if chunk == "1":
        found = {
            "token by token": _demo(_BENCH / f"seed-{seed}", seed, _CONFIG),
            "one pass": _demo(_BENCH / f"parallel-{seed}", seed, file),
        }
    else:
        llava = _chunks(_BENCH / f"chunks-{seed}", seed, chunk)
        found = {
            "token by token": _trained(llava, f"steps-of-{chunk}", _CONFIG),
            "one pass": _trained(llava, f"pass-of-{chunk}", file),
        }
    rows = [_row(way, report["held_out"]) for way, report in found.items()]
    say("\n" + table(("held-out episodes", "exact bins", "within 1", "L1", "of mean's"), rows))
    name = "parallel" if chunk == "1" else f"parallel-chunk{chunk}"
    figures = {"seed": int(seed), "chunk": int(chunk), "reports": found}
    say(f"result: {write_result(name, _PACKAGES, figures)}")


def _demo(out: Path, seed: str, config: Path) -> dict[str, Any]:
    report = out / "run/evaluation.json"
    if not report.exists():
        _python("-m", "train_llava.demo", "--out", out, "--seed", seed, "--config", config)
    found: dict[str, Any] = json.loads(report.read_text())
    return found


def _chunks(out: Path, seed: str, chunk: str) -> Path:
    """The demo's data with chunks of actions as answers."""
    llava = out / f"llava-{chunk}"
    if not (llava / "manifest.json").exists():
        _oxe_mix("synth", "--out", out / "bucket", "--episodes", "6000", "--seed", seed)
        _oxe_mix("download", "--mix", "demo.yaml", "--source", out / "bucket", "--out", out / "data")
        words = ("--data", out / "data", "--val-fraction", "0.1", "--chunk", chunk)
        _oxe_mix("convert", "--to", "llava", *words, "--out", llava)
    return llava


def _trained(llava: Path, name: str, config: Path) -> dict[str, Any]:
    run = llava.parent / name
    words = ("--config", config, "--nproc", "2", "--llava", llava, "--run", run)
    _python("-m", "train_llava.launch", *words)  # of one that is finished it says so
    found: dict[str, Any] = json.loads((run / "evaluation.json").read_text())
    return found


def _oxe_mix(*words: str | Path) -> None:
    subprocess.run([str(Path(sys.executable).parent / "oxe-mix"), *map(str, words)], check=True)


def _python(*words: str | Path) -> None:
    subprocess.run([sys.executable, *map(str, words)], check=True)


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
