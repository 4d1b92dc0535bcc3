"""Stage 2 beside the usual way and cp, in one run: whole commands as a user types them, start-up included.

python -m benchmarks.convert [--quick] [--part NAME ...] [--scratch FOLDER]

Writes benchmarks/results/DATE-convert.json; with other sizes or only some parts, the name says so.
`--quick` is a trial of the benchmark itself: at its sizes start-up is most of what is measured, so targets
mean nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.convert_bench import FULL, QUICK, Bench
from benchmarks.convert_parts import PARTS
from benchmarks.results import write_result
from oxe_mix.text import say, table

_PACKAGES = ("apache-beam", "tensorflow-datasets", "tensorflow-cpu", "numpy", "pillow", "protobuf")
_CACHE = "warm: sources are read once before a part; os.sync() before each run, none inside it"


def main() -> None:
    """Run the parts asked for, print the figures beside their targets and write the result."""
    options = _options()
    signal.signal(signal.SIGTERM, _stop)
    sizes = QUICK if options.quick else FULL
    with tempfile.TemporaryDirectory(prefix="oxe-mix-bench-", dir=options.scratch) as folder:
        free = shutil.disk_usage(folder).free / 1e9
        if free < sizes.free_gb:
            sys.exit(f"{folder}: {free:.0f} GB free, {sizes.free_gb:g} needed; choose another --scratch")
        bench = Bench(Path(folder), sizes)
        for name in options.part:
            say(f"{name}: {PARTS[name].__doc__}")
            start = time.monotonic()
            PARTS[name](bench)
            bench.facts[f"{name}, s in all"] = round(time.monotonic() - start)
    say(
        "\n"
        + table(("figure", "measured", "target", ""), [_row(bench, i) for i in range(len(bench.figures))])
    )
    whole = list(PARTS) == options.part
    names = ["convert", *(["quick"] if options.quick else []), *([] if whole else options.part)]
    say(f"result: {write_result('-'.join(names), _PACKAGES, _result(bench))}")


def _stop(*_: object) -> None:
    """A stopped benchmark, too, ends its command and removes its files; asked twice, it does so once."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(143)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Benchmark of stage 2.")
    parser.add_argument("--quick", action="store_true", help="small sizes, one round: about two minutes")
    parser.add_argument("--part", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--scratch", type=Path, help="folder for sources and outputs, on the disk to measure")
    return parser.parse_args()


def _row(bench: Bench, index: int) -> tuple[str, ...]:
    figure = bench.figures[index]
    value = f"{figure.value:,.0f}" if figure.value >= 1000 else f"{figure.value:.2f}"
    if figure.target is None:
        return figure.name, value, "", ""
    sign = "<=" if figure.at_most else ">="
    return figure.name, value, f"{sign} {figure.target:g}", "met" if figure.met else "MISSED"


def _result(bench: Bench) -> dict[str, Any]:
    figures = {
        figure.name: {
            "value": round(figure.value, 3),
            **({} if figure.target is None else {"target": figure.target, "met": figure.met}),
        }
        for figure in bench.figures
    }
    return {
        "sizes": dataclasses.asdict(bench.sizes),
        "page_cache": _CACHE,
        "facts": bench.facts,
        "figures": figures,
        "seconds": bench.seconds,
    }


if __name__ == "__main__":
    main()
