"""A report as a program reads it: its marked figures, its tables and what its viewer knows."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from train_llava.report.report_command import ReportOptions, run_report


class Page(HTMLParser):
    """The parts of a page that carry data."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.figures: dict[tuple[str, str, str], str] = {}  # by dataset, dimension and name
        self.rows: dict[str, list[str]] = {}  # of the overview's table, by dataset
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.policy = ""
        self.text = ""
        self._dimension = self._figure = self._row = self._raw = ""
        self._datasets = [""]  # of the sections that are open
        self._json = ""
        self.feed(text)
        self.viewer: list[dict[str, Any]] = json.loads(self._json)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        own = {name: value or "" for name, value in attrs}
        self.tags.add(tag)
        self.attributes |= set(own)
        if own.get("http-equiv") == "Content-Security-Policy":
            self.policy = own["content"]
        if tag == "section":
            self._datasets.append(own.get("data-dataset", own.get("data-score", self._datasets[-1])))
        self._dimension = own.get("data-dimension", self._dimension)
        self._figure = own.get("data-figure", self._figure)
        self._row = own.get("data-row", "" if tag in ("tr", "table", "section") else self._row)
        if tag in ("th", "td") and self._row:
            self.rows.setdefault(self._row, []).append("")
        if tag in ("script", "style"):
            self._raw = own.get("id", "own")

    def handle_endtag(self, tag: str) -> None:
        if tag == "article":
            self._dimension = ""
        if tag == "section":
            self._datasets.pop()
            self._dimension = ""
        if tag == "tbody":
            self._row = ""
        if tag in ("script", "style"):
            self._raw = ""

    def handle_data(self, data: str) -> None:
        if self._raw == "episodes":
            self._json += data
        if self._raw:
            return
        self.text += data
        if self._figure:
            self.figures[self._datasets[-1], self._dimension, self._figure] = data
            self._figure = ""
        if self._row in self.rows:
            self.rows[self._row][-1] += data

    def episodes(self, dataset: str) -> list[dict[str, Any]]:
        """What the viewer shows of a dataset."""
        found: list[dict[str, Any]] = next(one["episodes"] for one in self.viewer if one["name"] == dataset)
        return found


def report(folder: Path, out: Path, **options: Any) -> Page:
    """Write the report of a folder and read it."""
    assert run_report(ReportOptions(folder, out, **options)) == 0
    return Page(out.read_text())
