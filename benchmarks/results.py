"""Where measured figures go: a dated file with the machine and the versions they were measured on."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def write_result(name: str, packages: tuple[str, ...], figures: dict[str, Any]) -> Path:
    """Write benchmarks/results/DATE-NAME.json; returns the file."""
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{datetime.datetime.now(datetime.UTC).date()}-{name}.json"
    file.write_text(json.dumps({"machine": _machine(packages), **figures}, indent=1) + "\n")
    return file


def _machine(packages: tuple[str, ...]) -> dict[str, Any]:
    model = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": model[0].partition(":")[2].strip() if model else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in packages},
    }
