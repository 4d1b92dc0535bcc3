"""Held-out loss against episodes: one mix at three nested fractions, trained alike, drawn in one picture.

    python examples/scaling_law/study.py --out build/scaling-law

makes a bucket of its own. With `--source` and `--mix` it studies your data; each run gets the same number of
steps, and all are scored on the same held-out episodes, those of the largest fraction.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from oxe_mix.text import say

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


def main() -> None:
    """Download, convert, train and score at each fraction; then draw."""
    args = _arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    source = args.source or str(_bucket(args.out, args.episodes))
    mix = yaml.safe_load(Path(args.mix).read_text())
    largest = max(args.fractions)
    for fraction in sorted(args.fractions):
        _prepare(args.out / f"{fraction:g}", source, mix, fraction)
    points = []
    for fraction in sorted(args.fractions):
        folder = args.out / f"{fraction:g}"
        _train(folder, args.config, args.ranks)
        points.append(_score(folder, args.out / f"{largest:g}" / "llava"))
    (args.out / "points.json").write_text(json.dumps(points, indent=1) + "\n")
    _draw(points, args.out / "scaling.png")
    for point in points:
        say(f"{point['episodes']:>8,} episodes  held-out loss {point['loss']:.3f}  L1 {point['l1']:.3f}")
    say(f"result: {args.out / 'scaling.png'}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/scaling-law"))
    parser.add_argument("--fractions", type=float, nargs="+", default=[0.05, 0.2, 0.8])
    parser.add_argument("--mix", default=str(ROOT / "mixtures/demo.yaml"))
    parser.add_argument("--source", help="where the datasets are; if not given, a bucket of our own")
    parser.add_argument("--episodes", type=int, default=6000, help="of our own bucket")
    parser.add_argument("--config", type=Path, default=ROOT / "train_llava/configs/tiny-cpu.yaml")
    parser.add_argument("--ranks", type=int, default=2)
    return parser.parse_args()


def _bucket(out: Path, episodes: int) -> Path:
    _run("oxe-mix", "synth", "--out", out / "bucket", "--episodes", episodes, "--seed", 0)
    return out / "bucket"


def _prepare(folder: Path, source: str, mix: dict[str, Any], fraction: float) -> None:
    """The mix with all datasets at one fraction. One seed nests them, and holds out the same episodes."""
    folder.mkdir(exist_ok=True)
    datasets = [dataset | {"fraction": fraction} for dataset in mix["datasets"]]
    (folder / "mix.yaml").write_text(yaml.safe_dump(mix | {"datasets": datasets}))
    _run("oxe-mix", "download", "--mix", folder / "mix.yaml", "--source", source, "--out", folder / "data")
    held_out = ("--val-fraction", 0.1)
    _run(
        "oxe-mix", "convert", "--to", "llava", "--data", folder / "data", "--out", folder / "llava", *held_out
    )


def _train(folder: Path, config: Path, ranks: int) -> None:
    if not (folder / "run/README.md").exists():  # the last file of a run
        words = ("--config", config, "--nproc", ranks, "--llava", folder / "llava", "--run", folder / "run")
        _run("python", "-m", "train_llava.launch", *words)


def _score(folder: Path, held_out: Path) -> dict[str, float]:
    """On the largest fraction's held-out episodes: they are in no smaller one's training data."""
    report = folder / "eval.json"
    _run("oxe-mix", "eval", "--checkpoint", folder / "run", "--data", held_out, "--out", report)
    found = json.loads(report.read_text())["report"]
    manifest = json.loads((folder / "llava/manifest.json").read_text())
    episodes = sum(dataset["episodes"]["written"] for dataset in manifest["datasets"])
    return {"episodes": episodes, "loss": found["loss"]["model"], "l1": found["l1"]["model"]}


def _draw(points: list[dict[str, float]], file: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    episodes = [point["episodes"] for point in points]
    axes.plot(episodes, [point["loss"] for point in points], marker="o")
    axes.set(xscale="log", yscale="log", xlabel="training episodes", ylabel="held-out loss per token")
    axes.set_xticks(episodes, [f"{number:,.0f}" for number in episodes])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=150)


def _run(*words: object) -> None:
    program, *others = map(str, words)
    say(" ".join(["$", program, *others]))
    subprocess.run([str(BIN / program), *others], check=True, cwd=ROOT)


if __name__ == "__main__":
    main()
