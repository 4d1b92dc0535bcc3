"""A report as a program reads it: its marked figures, its tables, its drawings and what its viewer knows."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from train_llava.report.report_command import ReportOptions, run_report

_PARTS = ("data-dataset", "data-score", "data-near", "data-guess")
_BAR = re.compile(r"M([\d.]+) 100v-([\d.]+)h")


def bars_of(path: str) -> list[tuple[float, float]]:
    """The left end and the height of each bar."""
    return [(float(x), float(height)) for x, height in _BAR.findall(path)]


def points_of(path: str) -> list[tuple[float, float]]:
    """The points of a curve or an arrow."""
    return [(float(x), float(y)) for x, y in re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", path)]


def levels_of(path: str) -> list[float]:
    """The height of each step of a timeline, 0 to 1; the steps are of one width and fill the row."""
    steps = re.findall(r"V([\d.]+)H([\d.]+)", path)
    for i, (_, end) in enumerate(steps, 1):
        assert abs(float(end) - i * 400 / len(steps)) <= 0.051
    return [(98 - float(y)) / 96 for y, _ in steps]


class Page(HTMLParser):
    """The parts of a page that carry data."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.figures: dict[tuple[str, str, str], str] = {}  # by dataset, dimension and name
        self.rows: dict[str, list[str]] = {}  # of the overview's table, by dataset
        self.drawn: dict[tuple[str, str], list[tuple[str, str]]] = {}  # by part and name: classes and paths
        self.shares: dict[tuple[str, str], tuple[str, float]] = {}  # by part and label: words, percent drawn
        self.sheets: dict[tuple[str, int], list[int]] = {}  # by dataset and episode: frames at a glance
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.policy = ""
        self.text = ""
        self._dimension = self._figure = self._row = self._raw = self._svg = self._share = self._class = ""
        self._datasets = [""]  # of the sections and articles that are open
        self._json = ""
        self.feed(text)
        self.viewer: list[dict[str, Any]] = json.loads(self._json)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        own = {name: value or "" for name, value in attrs}
        self.tags.add(tag)
        self.attributes |= set(own)
        if own.get("http-equiv") == "Content-Security-Policy":
            self.policy = own["content"]
        if tag in ("section", "article"):
            named = [own[key] for key in _PARTS if key in own]
            self._datasets.append(named[0] if named else self._datasets[-1])
        self._draw(tag, own)
        self._dimension = own.get("data-dimension", self._dimension)
        self._figure = own.get("data-figure", self._figure)
        self._row = own.get("data-row", "" if tag in ("tr", "table", "section") else self._row)
        if tag in ("th", "td") and self._row:
            self.rows.setdefault(self._row, []).append("")
        if tag in ("script", "style"):
            self._raw = own.get("id", "own")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("section", "article"):
            self._datasets.pop()
            self._dimension = ""
        if tag == "tbody":
            self._row = ""
        if tag in ("script", "style"):
            self._raw = ""

    def _draw(self, tag: str, own: dict[str, str]) -> None:
        self._class = own.get("class", "")
        if tag == "svg":
            self._svg = own.get("aria-label", "")
        if tag == "path":
            self.drawn.setdefault((self._datasets[-1], self._svg), []).append((self._class, own["d"]))
        if tag == "li":
            self._share = own.get("data-share", "")
        if tag == "rect" and self._share and self._class.startswith("full"):
            words, _ = self.shares[self._datasets[-1], self._share]
            self.shares[self._datasets[-1], self._share] = (words, float(own["width"]))
        if tag == "img" and "data-frame" in own:
            key = (own["data-frame"], int(own["data-episode"]))
            self.sheets.setdefault(key, []).append(int(own["data-place"]))

    def handle_data(self, data: str) -> None:
        if self._raw == "episodes":
            self._json += data
        if self._raw:
            return
        self.text += data
        if self._share and self._class == "value" and (self._datasets[-1], self._share) not in self.shares:
            self.shares[self._datasets[-1], self._share] = (data, 0.0)
        if self._figure:
            self.figures[self._datasets[-1], self._dimension, self._figure] = data
            self._figure = ""
        if self._row in self.rows:
            self.rows[self._row][-1] += data

    def episodes(self, dataset: str) -> list[dict[str, Any]]:
        """What the viewer shows of a dataset."""
        found: list[dict[str, Any]] = next(one["episodes"] for one in self.viewer if one["name"] == dataset)
        return found


def is_share(page: Page, where: tuple[str, str], words: str, share: float) -> None:
    """What stands at a part's label is said and drawn as this share, 0 to 1."""
    said, percent = page.shares[where]
    assert said == words
    assert abs(percent - share * 100) <= 0.006


def report(folder: Path, out: Path, **options: Any) -> Page:
    """Write the report of a folder and read it."""
    assert run_report(ReportOptions(folder, out, **options)) == 0
    return Page(out.read_text())
