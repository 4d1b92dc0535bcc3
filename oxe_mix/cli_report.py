"""The commands that look at folders of any stage: `oxe-mix report` and `doctor`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from oxe_mix.errors import UserError

app = typer.Typer()

# The kinds of folder that read an option; what is not named here is for all of them.
_DOCTOR = {
    "episodes": ("data", "llava"),
    "every": ("data", "llava"),
    "seed": ("data", "llava"),
    "cards": ("data",),
    "offline": ("machine",),
}
_REPORT = {
    "data": ("run",),
    "episodes": ("data", "llava"),
    "samples": ("run",),
    "seed": ("data", "llava"),
    "cards": ("data",),
    "device": ("run",),
}


@app.command()
def report(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(help="That download, convert or make train wrote.")],
    out: Annotated[Path | None, typer.Option(help="The page; else FOLDER/report.html.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="Of a run: the converted folder, to see what the model says.")
    ] = None,
    episodes: Annotated[int, typer.Option(min=1, help="Of each dataset, to look at step by step.")] = 3,
    samples: Annotated[int, typer.Option(min=1, help="With --data: held-out samples to ask about.")] = 24,
    seed: Annotated[int, typer.Option(min=0, help="Of the episodes that are drawn.")] = 0,
    cards: Annotated[Path | None, typer.Option(help="Folder with your own dataset cards.")] = None,
    device: Annotated[
        str | None, typer.Option(help="With --data: cpu or cuda; else a cuda there is.")
    ] = None,
    opens: Annotated[bool, typer.Option("--open", help="Show it in a browser at the end.")] = False,
) -> None:
    """Show a folder of data or a run as one HTML file that needs no network."""
    from convert.doctor_folder import refuse_a_file, refuse_strangers
    from oxe_mix.cards import load_cards
    from train_llava.report.kinds import kind_of
    from train_llava.report.page import KINDS
    from train_llava.report.report_command import ReportOptions, run_report

    refuse_a_file(folder, "download, pack, convert or make train")
    kind = kind_of(folder)
    given = _refuse_unused(context, _REPORT, kind, KINDS)
    if data is None and given & {"samples", "device"}:
        raise UserError("--samples and --device are for what the model says; give --data, too")
    if kind == "data":
        refuse_strangers(folder, load_cards(cards))
    options = ReportOptions(folder, out, data, episodes, samples, seed, cards, device, opens)
    raise typer.Exit(run_report(options))


@app.command()
def doctor(
    context: typer.Context,
    folder: Annotated[
        Path | None, typer.Argument(help="Downloaded or converted data; without one, this machine.")
    ] = None,
    episodes: Annotated[int, typer.Option(min=1, help="Of each dataset, looked at.")] = 32,
    every: Annotated[bool, typer.Option("--all", help="All episodes.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of the episodes that are drawn.")] = 0,
    cards: Annotated[Path | None, typer.Option(help="Of downloaded data: your own dataset cards.")] = None,
    offline: Annotated[
        bool, typer.Option("--offline", help="Of the machine: do not try the network.")
    ] = False,
    all_checks: Annotated[bool, typer.Option("--all-checks", help="Print what is ok, too.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Look for what is wrong with this machine, or with data, and say what mends it."""
    from convert.doctor_command import DoctorOptions, kind_of, run_doctor
    from convert.doctor_folder import KINDS

    given = _refuse_unused(context, _DOCTOR, kind_of(folder), KINDS)
    if every and "episodes" in given:
        raise UserError("--episodes and --all: give one of the two")
    options = DoctorOptions(folder, episodes, every, seed, cards, offline, as_json, all_checks)
    raise typer.Exit(run_doctor(options))


def _refuse_unused(
    context: typer.Context, readers: Mapping[str, tuple[str, ...]], kind: str, kinds: Mapping[Any, str]
) -> set[str]:
    """The names of the options that were typed. Raises: UserError for one that this kind does not read."""
    given = set[str]()
    for option in context.command.params:
        source = context.get_parameter_source(option.name or "")
        if source is None or source.name != "COMMANDLINE":
            continue
        given.add(option.name or "")
        of = readers.get(option.name or "", (kind,))
        if kind not in of:
            wanted = " or ".join(kinds[one] for one in of)
            raise UserError(f"{option.opts[0]}: not used for {kinds[kind]}, only for: {wanted}")
    return given
