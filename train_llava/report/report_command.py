"""`oxe-mix report`: a folder of downloaded data, of converted data or of a run as one HTML file."""

from __future__ import annotations

import shlex
import webbrowser
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from oxe_mix.errors import UserError
from oxe_mix.files import prove_writable
from oxe_mix.progress import Goal, Sample, progress
from oxe_mix.text import say, size, warn
from train_llava.report.kinds import kind_of
from train_llava.report.page import KINDS, Kind, Report, write_page
from train_llava.report.pictures import room_of
from train_llava.report.values import DatasetPage

_PAGE = "report.html"
_MOST_BYTES = 25_000_000

One = TypeVar("One")


@dataclass(frozen=True, slots=True)
class ReportOptions:
    """What a user asked for."""

    folder: Path  # of any stage
    out: Path | None = None  # a file; None: report.html in the folder
    data: Path | None = None  # of a run: the converted folder that it is asked about
    episodes: int = 3  # of each dataset that can be looked at step by step
    samples: int = 24  # of a run: held-out samples that the model is asked about
    seed: int = 0
    cards: Path | None = None  # of downloaded data: the user's own
    device: str | None = None
    opens: bool = False  # in a browser, at the end


def run_report(options: ReportOptions) -> int:
    """Read a folder and write its report.

    Returns: the exit code.
    Raises: UserError for what the user can mend.
    """
    kind = kind_of(options.folder)
    if options.data is not None and kind != "run":
        raise UserError(f"--data is for the report of a run; {options.folder} is {KINDS[kind]}")
    out = prove_writable(options.out or options.folder / _PAGE)
    report = {"llava": _converted, "data": _downloaded, "run": _run}[kind](options)
    num_bytes = write_page(report, out)
    if num_bytes > _MOST_BYTES:
        warn(f"{out}: {size(num_bytes)} is much for a browser; give a smaller --episodes")
    say(f"read: {options.folder}, {KINDS[kind]}: {report.overview.notes[0]}")
    for line in report.overview.warnings:
        warn(line)
    for page in report.datasets:
        say(f"{page.name}: {page.read}")
        for line in page.damage:
            warn(f"{page.name}: {line}")
    say(f"result: {out}, {size(num_bytes)}, one file that needs no network")
    say(f"next: open it in a browser, then {_next(options, kind)}")
    if options.opens and not webbrowser.open(out.resolve().as_uri()):
        warn("no browser could be started here; open the file yourself")
    return 0


def _converted(options: ReportOptions) -> Report:
    from train_llava.report.from_llava import dataset_page, open_converted, overview

    folder = open_converted(options.folder, options.seed)
    datasets = folder.manifest.datasets
    room = room_of(len(datasets), options.episodes)
    pages = _each(datasets, lambda own: dataset_page(folder, own, options.episodes, room))
    return Report(_name(options), "llava", overview(folder, pages), pages)


def _downloaded(options: ReportOptions) -> Report:
    from train_llava.report.data_folder import open_downloaded, overview
    from train_llava.report.from_data import dataset_page

    folder = open_downloaded(options.folder, options.cards, options.seed)
    room = room_of(len(folder.datasets), options.episodes)
    pages = _each(folder.datasets, lambda own: dataset_page(folder, own, options.episodes, room))
    return Report(_name(options), "data", overview(folder, pages), pages)


def _run(options: ReportOptions) -> Report:
    from train_llava.report.from_run import run_report_parts

    overview, page = run_report_parts(options.folder, options.data, options.samples, options.device)
    return Report(_name(options), "run", overview, run=page)


def _each(datasets: Iterable[One], page: Callable[[One], DatasetPage]) -> list[DatasetPage]:
    todo, done = list(datasets), list[DatasetPage]()
    with progress(Goal("report", "dataset", len(todo)), lambda: Sample(len(done))):
        for one in todo:
            done.append(page(one))
    return done


def _name(options: ReportOptions) -> str:
    return options.folder.resolve().name


def _next(options: ReportOptions, kind: Kind) -> str:
    folder = shlex.quote(str(options.folder))
    if kind == "data":
        return f"oxe-mix convert --to llava --data {folder}"
    if kind == "llava":
        return f"oxe-mix check {folder}, make train LLAVA={folder}"
    from train_llava.report.run_files import has_weights

    if not has_weights(options.folder):
        return "see how training goes on; the run has no weights yet, so there is nothing to serve"
    if options.data is None:
        return f"oxe-mix report {folder} --data LLAVA for predictions, oxe-mix serve --checkpoint {folder}"
    return f"oxe-mix replay --checkpoint {folder} --data {shlex.quote(str(options.data))}"
