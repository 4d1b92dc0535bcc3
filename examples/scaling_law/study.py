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

from oxe_mix.cards import load_cards
from oxe_mix.errors import UserError
from oxe_mix.mix import find_mix, load_mix
from oxe_mix.text import complain, say

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


def main() -> None:
    """Download, convert, train and score at each fraction; then draw."""
    args = _arguments()
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    load_mix(args.mix, load_cards())  # says what is wrong with it
    mix = yaml.safe_load(find_mix(args.mix).read_text())
    source = args.source or str(_bucket(out, args.episodes))
    fractions = sorted(args.fractions)
    for fraction in fractions:
        _prepare(out, source, mix, fraction)
    points = []
    for fraction in fractions:
        folder = out / f"{fraction:g}"
        _train(folder, args.config.resolve(), args.ranks)
        points.append(_score(folder, out / f"{fractions[-1]:g}" / "llava"))
    (out / "points.json").write_text(json.dumps(points, indent=1) + "\n")
    draw(points, out / "scaling.png")
    for point in points:
        say(f"{point['episodes']:>8,} episodes  held-out loss {point['loss']:.3f}  L1 {point['l1']:.3f}")
    say(f"result: {out / 'scaling.png'}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/scaling-law"))
    parser.add_argument("--fractions", type=float, nargs="+", default=[0.05, 0.2, 0.8])
    parser.add_argument("--mix", type=Path, default=Path("demo.yaml"))
    parser.add_argument("--source", help="where the datasets are; if not given, a bucket of our own")
    parser.add_argument("--episodes", type=int, default=6000, help="of our own bucket")
    parser.add_argument("--config", type=Path, default=ROOT / "train_llava/configs/tiny-cpu.yaml")
    parser.add_argument("--ranks", type=int, default=2)
    return parser.parse_args()


def _bucket(out: Path, episodes: int) -> Path:
    _run("oxe-mix", "synth", "--out", out / "bucket", "--episodes", episodes, "--seed", 0)
    return out / "bucket"


def _prepare(out: Path, source: str, mix: dict[str, Any], fraction: float) -> None:
    """Download the mix with all datasets at one fraction, and convert it.

    All fractions share one data folder, the smallest first: each fetches only what the one before it has not.
    One seed nests them, and holds out the same episodes.
    """
    folder = out / f"{fraction:g}"
    folder.mkdir(exist_ok=True)
    file = folder / "mix.yaml"
    text = yaml.safe_dump(mix | {"datasets": [own | {"fraction": fraction} for own in mix["datasets"]]})
    if file.exists() and file.read_text() != text:
        raise UserError(f"{file}: an earlier study had another mix; choose another --out")
    file.write_text(text)
    if (folder / "llava/manifest.json").exists():  # the last file of a conversion
        return
    _run("oxe-mix", "download", "--mix", file, "--source", source, "--out", out / "data")
    words = ("--data", out / "data", "--out", folder / "llava", "--val-fraction", 0.1)
    _run("oxe-mix", "convert", "--to", "llava", *words)


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


def draw(points: list[dict[str, float]], file: Path) -> None:
    """Held-out loss against training episodes, both logarithmic, with the measured values."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    episodes, losses = ([point[what] for point in points] for what in ("episodes", "loss"))
    axes.plot(episodes, losses, marker="o")
    axes.set(xscale="log", yscale="log", xlabel="training episodes", ylabel="held-out loss per token")
    axes.set_ylim(min(losses) / 1.5, max(losses) * 1.5)  # a fall of 3 % must not look like one of 30
    axes.set_xticks(episodes, [f"{number:,.0f}" for number in episodes])
    axes.set_yticks([])
    axes.minorticks_off()
    for place in zip(episodes, losses, strict=True):
        axes.annotate(f"{place[1]:.3f}", place, (0, 8), textcoords="offset points", ha="center")
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def _run(*words: object) -> None:
    """Run one of our commands. Ends with its exit code where it fails: it has said why."""
    program, *others = map(str, words)
    say(" ".join(["$", program, *others]))
    code = subprocess.run([str(BIN / program), *others], check=False).returncode
    if code:
        sys.exit(code)


if __name__ == "__main__":
    try:
        main()
    except UserError as problem:
        complain(str(problem))
        sys.exit(2)
