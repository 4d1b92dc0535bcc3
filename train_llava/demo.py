"""`make demo`: the four commands as a user types them, on an Open-X bucket that it makes; then one table."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from convert.prompt import Asking
from oxe_mix.errors import UserError
from oxe_mix.files import folder_lock
from oxe_mix.text import complain, say, size
from train_llava.metrics import summary

_BIN = Path(sys.executable).parent
_CONFIG = Path("train_llava/configs/tiny-cpu.yaml")
_MARK = ".demo"


@dataclass(frozen=True, slots=True)
class Demo:
    """What is run and where."""

    out: Path
    episodes: int
    config: Path
    ranks: int
    seed: int

    def run(self) -> None:
        """Run all stages. Raises: subprocess.CalledProcessError when one of them fails."""
        bucket, data, llava, run = (self.out / name for name in ("bucket", "data", "llava", "run"))
        options = ("--episodes", str(self.episodes), "--seed", str(self.seed))
        _command("oxe-mix", "synth", "--out", bucket, *options)
        _command("oxe-mix", "download", "--mix", "demo.yaml", "--source", bucket, "--out", data)
        start = time.monotonic()
        _command(
            "oxe-mix", "convert", "--to", "llava", "--data", data, "--out", llava, "--val-fraction", "0.1"
        )
        seconds = time.monotonic() - start
        config = self.out / "config.yaml"
        config.write_text(yaml.safe_dump({**yaml.safe_load(self.config.read_text()), "seed": self.seed}))
        _command("make", "train", f"CONFIG={config}", f"NPROC={self.ranks}", f"LLAVA={llava}", f"RUN={run}")
        asked = _held_out_sample(llava)
        instruction = Asking().instruction(asked["conversations"][0]["value"])
        image, key = llava / "images" / asked["image"], asked["dataset"]
        words = ("--image", image, "--instruction", instruction, "--unnorm-key", key)
        said = _command("python", "inference_action.py", "--checkpoint", run, *words, keep=True)
        say("\n" + _table(llava, run, seconds, said, asked["conversations"][1]["value"]))


def _command(*words: str | Path, keep: bool = False) -> str:
    """Show a command and run it; with `keep`, return what it prints."""
    shown = [str(word) for word in words]
    say("\n$ " + " ".join(f'"{word}"' if " " in word else word for word in shown))
    program = shutil.which(shown[0]) if shown[0] == "make" else str(_BIN / shown[0])
    assert program is not None
    done = subprocess.run(
        [program, *shown[1:]], check=True, text=True, stdout=subprocess.PIPE if keep else None
    )
    if keep:
        say(done.stdout.rstrip())
    return done.stdout or ""


def _held_out_sample(llava: Path) -> dict[str, Any]:
    """The first held-out sample."""
    file = sorted((llava / "val").glob("*.jsonl"))[0]
    sample: dict[str, Any] = json.loads(file.read_text().splitlines()[0])
    return sample


def _table(llava: Path, run: Path, convert_seconds: float, said: str, recorded: str) -> str:
    """The figures of the whole line, read from the files that the stages left."""
    manifest = json.loads((llava / "manifest.json").read_text())
    report = json.loads((run / "evaluation.json").read_text())
    predicted = json.loads(said)
    steps = _total(manifest, "steps")
    kept = steps["written"] + steps["held_out"]
    images = sum(dataset["image_bytes"] for dataset in manifest["datasets"])
    model = report["config"]["train"]
    rows = [
        ("episodes in = written + held out + dropped", _sum(_total(manifest, "episodes"))),
        ("steps in = written + held out + dropped", _sum(steps)),
        (
            "frames copied",
            f"{kept:,}, {size(images)}, {kept / convert_seconds:,.0f} a second, start-up included",
        ),
        (
            "training",
            f"{model['max_steps']:,} steps of {model['global_batch']}, {report['train_seconds']:.0f} s",
        ),
        ("training loss, last", f"{report['final_loss']:.3f}"),
        ("predicted action", " ".join(f"{value:.3f}" for value in predicted["actions"][0])),
        ("  bins", " ".join(map(str, predicted["bins"][0]))),
        ("  recorded bins", " ".join(recorded.replace("<ACTION_", " ").replace(">", "").split())),
        ("  latency", f"{predicted['latency_ms']['total']:.0f} ms"),
    ]
    lines = [f"{label:<44}{value}" for label, value in rows]
    return "\n".join(["the whole line", "-" * 78, *lines, "", summary(report["held_out"])])


def _total(manifest: dict[str, Any], of: str) -> Counter[str]:
    total: Counter[str] = Counter()
    for dataset in manifest["datasets"]:
        tally = dataset[of]
        parts = {key: tally[key] for key in ("total", "written", "held_out")}
        total.update({**parts, "dropped": sum(tally["dropped"].values())})
    return total


def _sum(total: Counter[str]) -> str:
    parts = " + ".join(f"{total[key]:,}" for key in ("written", "held_out", "dropped"))
    return f"{total['total']:,} = {parts}"


def _clear(out: Path) -> None:
    """Start afresh, but never delete what no demo made."""
    if out.exists() and any(out.iterdir()) and not (out / _MARK).exists():
        raise UserError(f"{out}: not empty, and no demo made it; choose another --out")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / _MARK).touch()


def main() -> None:
    """The command behind `make demo`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/demo"))
    parser.add_argument("--episodes", type=int, default=6000)
    parser.add_argument("--config", type=Path, default=_CONFIG)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    start = time.monotonic()
    try:
        with folder_lock(args.out.parent, "demo"):
            _clear(args.out)
            Demo(args.out, args.episodes, args.config, args.ranks, args.seed).run()
    except UserError as error:
        complain(str(error))
        raise SystemExit(2) from error
    except subprocess.CalledProcessError as error:
        complain(f"{' '.join(map(str, error.cmd))}: exit {error.returncode}")
        raise SystemExit(error.returncode) from error
    minutes = (time.monotonic() - start) / 60
    say(f"\nresult: {args.out}, {minutes:.1f} min")
    run, llava = args.out / "run", args.out / "llava"
    say(f"next: oxe-mix report {run} --data {llava} --open to look at it, oxe-mix serve --checkpoint {run}")


if __name__ == "__main__":
    main()
