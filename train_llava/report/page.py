"""A report as one HTML file that needs nothing else: no network, no font, no script but its own.

What comes from data is text and is escaped as such. The page's own policy lets it load nothing: its one
script and its one style are named by their hashes, and frames are part of the file.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from oxe_mix import __version__
from oxe_mix.files import atomic_write
from oxe_mix.text import count
from train_llava.report import shapes
from train_llava.report.run_values import RunPage
from train_llava.report.values import DatasetPage, Overview, Strip

Kind = Literal["data", "llava", "run"]
KINDS: dict[Kind, str] = {"data": "downloaded data", "llava": "converted data", "run": "training run"}
_DIGITS = 5


@dataclass(frozen=True, slots=True)
class Report:
    """All of a page."""

    name: str  # of the folder
    kind: Kind
    overview: Overview
    datasets: Sequence[DatasetPage] = ()
    run: RunPage | None = None


def write_page(report: Report, file: Path) -> int:
    """Write the page; returns its bytes."""
    page = render(report).encode(errors="replace")  # half a surrogate pair is no text
    with atomic_write(file) as stream:
        stream.write(page)
    return len(page)


def render(report: Report) -> str:
    """The page's HTML."""
    templates = Environment(
        loader=PackageLoader("train_llava.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.globals |= {"shapes": shapes, "count": count}
    templates.filters["num"] = number
    templates.filters["logs"] = np.log1p
    templates.filters["jpeg"] = _data_uri
    style, script = _own("report.css"), _own("report.js")
    return templates.get_template("report.html").render(
        report=report,
        kind=KINDS[report.kind],
        version=__version__,
        style=style,
        script=script,
        policy=policy(style, script),
        episodes=[_dataset(page) for page in report.datasets if page.strips],
    )


def policy(style: str, script: str) -> str:
    """What the page may do: show itself and the pictures inside it, load nothing, send nothing."""
    return (
        f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )


def number(value: float) -> str:
    """A figure in robot units, short: 0.0123, 12.3, 0."""
    return f"{value:.3g}" if value else "0"


def _own(name: str) -> Markup:
    """One of the page's own parts, which is no data and is not escaped."""
    return Markup((files("train_llava.report") / "templates" / name).read_text())


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _data_uri(frame: bytes) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(frame).decode()}"


def _dataset(page: DatasetPage) -> dict[str, Any]:
    """What the viewer knows of a dataset."""
    return {
        "name": page.name,
        "motion": page.motion,
        "reach": list(map(_short, page.reach)),
        "dimensions": [
            {
                "name": one.name,
                "q01": _short(one.q01),
                "q99": _short(one.q99),
                "gripper": one.is_gripper,
            }
            for one in page.dimensions
        ],
        "episodes": [_episode(strip) for strip in page.strips],
    }


def _episode(strip: Strip) -> dict[str, Any]:
    return {
        "id": strip.id,
        "instruction": strip.instruction,
        "numSteps": strip.num_steps,
        "steps": strip.steps.tolist(),
        "actions": [list(map(_short, row)) for row in strip.actions.tolist()],
        "arrows": [list(map(_short, row)) for row in strip.arrows.tolist()],
        "shown": strip.shown.tolist(),
        "frames": [_data_uri(frame) for frame in strip.frames],
    }


def _short(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")
