"""`oxe-mix doctor`: what is wrong with this machine, or with the data in a folder, and what mends it."""

from __future__ import annotations

import json
import shlex
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert.doctor_checks import judge
from convert.doctor_folder import Kind, refuse_a_file, refuse_other_depths, refuse_strangers
from convert.doctor_llava import ConvertedFolder, is_converted
from convert.doctor_mends import CARD, Place
from convert.doctor_rlds import Sampling, summarize_rlds
from convert.doctor_summary import DatasetSummary
from convert.finish import CARDS
from convert.plan import DataFolder, DatasetOnDisk, find_each, open_folders
from oxe_mix.cards import Cards, load_cards
from oxe_mix.doctor_machine import machine_verdicts
from oxe_mix.errors import UserError
from oxe_mix.mix import load_mix
from oxe_mix.progress import Goal, Sample, progress
from oxe_mix.rlds import INFO_FILE
from oxe_mix.text import say
from oxe_mix.verdicts import Verdict, report, summary, tally
from oxe_mix.verdicts import as_json as verdicts_as_json

_DEFAULT_MIX = Path("default.yaml")
_DEFAULT_DATA = Path("data")
_WROTE = "download, pack or convert"


@dataclass(frozen=True, slots=True)
class DoctorOptions:
    """The options of the command; `folder` None: the machine."""

    folder: Path | None = None
    episodes: int = 32  # of each dataset at most
    every: bool = False  # all episodes, whatever `episodes` says
    seed: int = 0
    cards: Path | None = None
    offline: bool = False
    json: bool = False
    all_checks: bool = False  # print those that are ok, too

    @property
    def sampling(self) -> Sampling:
        """Which episodes are looked at."""
        return Sampling(None if self.every else self.episodes, self.seed)


def run_doctor(options: DoctorOptions) -> int:
    """Look at the machine, or at a folder of RLDS datasets or of conversations, and say what was found.

    Returns: the exit code: 1 when something is an error, else 0.
    Raises: UserError for a folder that is neither.
    """
    start, cards, folder = time.monotonic(), load_cards(options.cards), options.folder
    kind = kind_of(folder)
    if folder is None:
        mix = None if options.offline else load_mix(_DEFAULT_MIX, cards)
        verdicts, then = machine_verdicts(_DEFAULT_DATA, mix, cards), "oxe-mix mix check default.yaml"
    elif kind == "llava":
        verdicts, then = _of_llava(options, folder), f"make train LLAVA={shlex.quote(str(folder))}"
    else:
        verdicts = _of_data(options, folder, cards)
        then = Place(folder, cards=options.cards).fill("oxe-mix convert --to llava --data DATA", "")
    if options.json:
        say(json.dumps({"event": "examined", **verdicts_as_json(verdicts)}))
    else:
        # What is ok of a machine is what one wants to tell others of it.
        every = options.all_checks or kind == "machine"
        say(report(verdicts, every=every))
        hint = "" if every else "; --all-checks prints what is ok, too"
        say(f"{summary(verdicts)}, {time.monotonic() - start:.1f} s{hint}")
        say(f"next: {_next(verdicts, then)}")
    return int(tally(verdicts)["error"] > 0)


def kind_of(folder: Path | None) -> Kind:
    """What is looked at. Raises: UserError for a folder that is not there, and for a file."""
    if folder is None:
        return "machine"
    refuse_a_file(folder, _WROTE)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give one that {_WROTE} wrote")
    return "llava" if is_converted(folder) else "data"


def _next(verdicts: list[Verdict], then: str) -> str:
    counts = tally(verdicts)
    if counts["error"]:
        first = next(verdict for verdict in verdicts if verdict.level == "error")
        return f"mend the errors, {first.check} of {first.subject} first, and run oxe-mix doctor again"
    return f"{then}{' (read the warnings before)' if counts['warning'] else ''}"


def _of_llava(options: DoctorOptions, folder: Path) -> list[Verdict]:
    converted, done = ConvertedFolder(folder), list[None]()
    totals = {one.name: one.episodes.written + one.episodes.held_out for one in converted.datasets}
    with _watched(options, list(totals.values()), done):
        found = [
            converted.summarize(dataset, options.sampling, lambda: done.append(None))
            for dataset in converted.datasets
        ]
    place = Place(folder, converted=True, cards=folder / CARDS)
    return [verdict for data in found for verdict in judge(data, place)]


def _of_data(options: DoctorOptions, folder: Path, cards: Cards) -> list[Verdict]:
    [opened] = open_folders((folder,))
    refuse_other_depths(folder)
    refuse_strangers(folder, cards)
    place = Place(folder, cards=options.cards)
    datasets, verdicts = _datasets(opened, cards, place)
    usual = Counter(dataset.card.action.dims for dataset in datasets).most_common(1)
    done, found = list[None](), list[DatasetSummary]()
    totals = [sum(split.num_episodes for split in one.info.splits.values()) for one in datasets]
    with _watched(options, totals, done):
        for dataset in datasets:
            found.append(summarize_rlds(dataset, options.sampling, usual[0][0], lambda: done.append(None)))
    return [*(verdict for data in found for verdict in judge(data, place)), *verdicts]


def _watched(options: DoctorOptions, totals: list[int], done: list[None]) -> Any:
    looked = sum(total if options.every else min(total, options.episodes) for total in totals)
    goal = Goal("doctor", "episode", looked)
    return progress(goal, lambda: Sample(len(done)), "json" if options.json else "auto")


def _datasets(opened: DataFolder, cards: Cards, place: Place) -> tuple[list[DatasetOnDisk], list[Verdict]]:
    """The datasets that can be looked at, and a verdict on each that cannot."""
    datasets, wrong = find_each(opened, cards)
    verdicts = [
        Verdict("error", name, "layout", str(error), mend=place.fill(f"what its card asks for: {CARD}", name))
        for name, error in wrong.items()
    ]
    mend = "write one (docs/add-a-robot.md), and give its folder as --cards"
    names = [info.parts[-3] for info in sorted(opened.path.glob(f"*/*/{INFO_FILE}"))]
    verdicts += [
        Verdict("warning", name, "card", "has no card, so convert leaves it out", mend=mend)
        for name in names
        if cards.find(name) is None
    ]
    return datasets, verdicts
