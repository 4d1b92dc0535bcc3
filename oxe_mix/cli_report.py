"""The commands that look at folders of any stage: `oxe-mix report` and `doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="That download, convert or make train wrote.")],
    out: Annotated[Path | None, typer.Option(help="The page; else FOLDER/report.html.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="Of a run: the converted folder, to see what the model says.")
    ] = None,
    episodes: Annotated[int, typer.Option(min=1, help="Of each dataset, to look at step by step.")] = 3,
    samples: Annotated[int, typer.Option(min=1, help="With --data: held-out samples to ask about.")] = 24,
    seed: Annotated[int, typer.Option(min=0, help="Of the episodes that are drawn.")] = 0,
    cards: Annotated[Path | None, typer.Option(help="Folder with your own dataset cards.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; else cuda if there is one.")] = None,
    opens: Annotated[bool, typer.Option("--open", help="Show it in a browser at the end.")] = False,
) -> None:
    """Show a folder of data or a run as one HTML file that needs no network."""
    from train_llava.report.report_command import ReportOptions, run_report

    options = ReportOptions(folder, out, data, episodes, samples, seed, cards, device, opens)
    raise typer.Exit(run_report(options))


@app.command()
def doctor(
    folder: Annotated[
        Path | None, typer.Argument(help="Downloaded or converted data; without one, this machine.")
    ] = None,
    episodes: Annotated[int, typer.Option(min=1, help="Of each dataset, looked at.")] = 32,
    every: Annotated[bool, typer.Option("--all", help="All episodes.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of the episodes that are drawn.")] = 0,
    cards: Annotated[Path | None, typer.Option(help="Folder with your own dataset cards.")] = None,
    offline: Annotated[
        bool, typer.Option("--offline", help="Of the machine: do not try the network.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Look for what is wrong with this machine, or with data, and say what mends it."""
    from convert.doctor_command import DoctorOptions, run_doctor

    raise typer.Exit(run_doctor(DoctorOptions(folder, episodes, every, seed, cards, offline, as_json)))
