"""How long `oxe-mix report` and `oxe-mix doctor` take, what they need, and how large a page becomes.

python -m benchmarks.report [--scratch build/report]

Two kinds of data: the default mix's 26 datasets in their true trees, whose pictures are two flat colours, and
one dataset of 24,000 frames as large as real ones, on which the page's limit of bytes is felt.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.processes import run
from benchmarks.results import write_result
from benchmarks.rlds_maker import Camera, make_dataset
from oxe_mix.text import say, table

_BIN = Path(sys.executable).parent
_FRAMES = 24_000
_PACKAGES = ("numpy", "pillow", "jinja2")


def main() -> None:
    """Make the data that is not there, look at it, and record."""
    parser = argparse.ArgumentParser(description="Time, memory and size of reports.")
    parser.add_argument("--scratch", type=Path, default=Path("build/report"))
    scratch = parser.parse_args().scratch.resolve()
    found = {}
    for what, folder in _folders(scratch).items():
        found[what] = _measure(scratch / f"{what.replace(' ', '-')}.html", folder)
    header = ("data", "report s", "report MB of memory", "page MB", "doctor s")
    keys = ("report_s", "report_mb", "page_mb", "doctor_s")
    say(table(header, [(what, *(str(own[key]) for key in keys)) for what, own in found.items()]))
    say(f"result: {write_result('report', _PACKAGES, found)}")


def _measure(page: Path, folder: Path) -> dict[str, Any]:
    reported = run([str(_BIN / "oxe-mix"), "report", str(folder), "--out", str(page)])
    looked = run(["sh", "-c", f"{_BIN}/oxe-mix doctor {folder} || test $? -eq 1"])  # 1: it found something
    return {
        "report_s": round(reported.seconds, 1),
        "report_mb": round(reported.command_mb),
        "page_mb": round(page.stat().st_size / 1e6, 1),
        "doctor_s": round(looked.seconds, 1),
    }


def _folders(scratch: Path) -> dict[str, Path]:
    mix, heavy = scratch / "mix", scratch / "heavy"
    if not (mix / "llava/manifest.json").exists():
        size = ("--episodes", "640", "--shards", "26", "--seed", "0")
        _oxe_mix("synth", "--mix", "default.yaml", "--out", mix / "bucket", *size)
        _oxe_mix("download", "--mix", "default.yaml", "--source", mix / "bucket", "--out", mix / "data")
        _oxe_mix("convert", "--data", mix / "data", "--out", mix / "llava")
    if not (heavy / "llava/manifest.json").exists():
        make_dataset(heavy / "data", Camera("jpeg"), _FRAMES)
        _oxe_mix("convert", "--data", heavy / "data", "--out", heavy / "llava")
    return {
        f"{what}, {stage}": folder / stage
        for what, folder in (("26 datasets", mix), ("24,000 frames", heavy))
        for stage in ("data", "llava")
    }


def _oxe_mix(*words: str | Path) -> None:
    subprocess.run([str(_BIN / "oxe-mix"), *map(str, words)], check=True)


if __name__ == "__main__":
    main()
