"""The `oxe-mix` command: reads the options, calls the stage, prints what came of it. Nothing is decided
here.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Any

import typer

from oxe_mix.cli_acting import app as acting_app
from oxe_mix.cli_models import app as models_app
from oxe_mix.cli_report import app as report_app
from oxe_mix.completion import choice, dataset_names, mix_names
from oxe_mix.run_app import run_app

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Open X-Embodiment fractions in, a vision-language-action model out.",
)

mix_app = typer.Typer(no_args_is_help=True, help="Mixes: which datasets, and how much of each.")
app.add_typer(mix_app, name="mix")
app.add_typer(models_app)
app.add_typer(acting_app)
app.add_typer(report_app)

_MIX: Any = {"help": "Mix file; a bare name is looked up in mixtures/.", "autocompletion": mix_names}
Mix = Annotated[Path, typer.Option(**_MIX)]
CardsFolder = Annotated[Path | None, typer.Option("--cards", help="Folder with your own dataset cards.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
Workers = Annotated[
    int | None, typer.Option(min=1, help="Worker processes; if not given, as many as the data is worth.")
]
Runner = Annotated[str, typer.Option(help="Where Beam runs: local, or a Beam runner, its options after --.")]
BeamOptions = Annotated[
    list[str] | None, typer.Argument(help="Beam's own options, after --.", metavar="BEAM")
]


@app.command()
def download(
    mix: Mix,
    out: Annotated[str, typer.Option(help="Folder, or gs:// address, for the datasets.")] = "data",
    source: Annotated[
        list[str] | None,
        typer.Option(help="Read all datasets from here, whatever the mix says. Again: a mirror behind it."),
    ] = None,
    max_gb: Annotated[
        float | None, typer.Option(help="Scale all fractions down, so that it is at most this.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only read metadata and print the plan.")
    ] = False,
    jobs: Annotated[int, typer.Option(min=1, help="Shards in flight at most.")] = 8,
    retries: Annotated[int, typer.Option(min=0, help="Tries in a row that may bring nothing.")] = 6,
    stall: Annotated[float, typer.Option(min=0.1, help="Seconds of silence before a new try.")] = 30.0,
    cards: CardsFolder = None,
    workers: Workers = None,
    runner: Runner = "local",
    as_json: AsJson = False,
    beam_options: BeamOptions = None,
) -> None:
    """Fetch the fraction of each dataset that a mix asks for, record by record proved, as valid RLDS."""
    from oxe_mix.engine import Engine
    from oxe_mix.source_file import Patience
    from oxe_mix.stage1 import DownloadOptions, run_download

    options = DownloadOptions(
        mix=mix,
        out=out,
        sources=tuple(source or ()),
        max_gb=max_gb,
        dry_run=dry_run,
        cards=cards,
        jobs=jobs,
        patience=Patience(retries, stall),
        json=as_json,
    )
    raise typer.Exit(run_download(options, Engine(runner, workers, tuple(beam_options or ()))))


@app.command()
def verify(
    data: Annotated[str, typer.Argument(help="Folder of RLDS datasets, downloaded here or not.")] = "data",
    cards: CardsFolder = None,
    jobs: Annotated[int, typer.Option(min=1, help="Shards read at the same time.")] = 4,
    as_json: AsJson = False,
) -> None:
    """Read every byte of a data folder and say whether it is what it says it is; nothing is changed."""
    from oxe_mix.verify import run_verify

    raise typer.Exit(run_verify(data, cards, jobs, as_json=as_json))


@app.command()
def convert(
    to: Annotated[str, typer.Option(help="Output format.")] = "llava",
    mix: Annotated[
        Path | None, typer.Option(help="Mix file; if not given, the one that was downloaded.")
    ] = None,
    data: Annotated[
        list[Path] | None, typer.Option(help="Folder of RLDS datasets; else data. Again: another one.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for conversations, images and the action codec.")] = Path(
        "llava"
    ),
    only: Annotated[
        list[str] | None,
        typer.Option(help="Only this dataset. Again: another one.", autocompletion=dataset_names),
    ] = None,
    val_fraction: Annotated[float, typer.Option(help="Share of the episodes to hold out, in [0, 1).")] = 0.0,
    statistics: Annotated[
        str,
        choice(
            "convert.options:StatisticsOf", "Scale actions by the steps of all episodes, or of train only."
        ),
    ] = "all",
    layout: Annotated[
        str, choice("convert.frames:Layout", "Frames as files, or in one tar per shard.")
    ] = "files",
    array: Annotated[bool, typer.Option("--json", help="All samples as one .json array, too.")] = False,
    images: Annotated[str, typer.Option(help="keep the bytes, or jpeg:Q to turn PNG into JPEG.")] = "keep",
    resize: Annotated[
        int | None, typer.Option(min=16, help="Longer side of the frames at most; never enlarged.")
    ] = None,
    cameras: Annotated[str, typer.Option(help="Of primary, secondary, wrist, with commas.")] = "primary",
    state: Annotated[bool, typer.Option("--state", help="The robot's own state in the prompt.")] = False,
    allow_missing: Annotated[
        bool, typer.Option("--allow-missing", help="Go on where a dataset lacks a camera or state.")
    ] = False,
    prompt: Annotated[str | None, typer.Option(help="Other words around {instruction}.")] = None,
    binning: Annotated[
        str, choice("convert.action_codec:Binning", "uniform256, or openvla255.")
    ] = "uniform256",
    chunk: Annotated[int, typer.Option(min=1, max=256, help="Actions per answer.")] = 1,
    chunk_end: Annotated[
        str | None, typer.Option(help="Past an episode's end: repeat, neutral or drop; else the card's.")
    ] = None,
    stride: Annotated[int, typer.Option(min=1, help="Every how many steps one is taken.")] = 1,
    steps_per_episode: Annotated[int | None, typer.Option(min=1, help="A seeded sample of so many.")] = None,
    drop_idle: Annotated[
        bool, typer.Option("--drop-idle", help="Leave out steps whose tokens say not to move.")
    ] = False,
    on_bad_record: Annotated[
        str, choice("convert.options:OnBadRecord", "stop at a broken record, or skip it.")
    ] = "stop",
    max_bad: Annotated[int, typer.Option(min=0, help="Broken records to skip at most.")] = 10,
    cards: CardsFolder = None,
    workers: Workers = None,
    runner: Runner = "local",
    beam_options: BeamOptions = None,
) -> None:
    """Turn RLDS into conversations with action tokens; frames are copied as they are."""
    from convert.options import ConvertOptions
    from convert.stage2 import run_convert
    from oxe_mix.engine import Engine

    options = ConvertOptions(
        to=to,
        mix=mix,
        data=tuple(data or [Path("data")]),
        out=out,
        only=tuple(only or ()),
        val_fraction=val_fraction,
        statistics=statistics,
        cards=cards,
        layout=layout,
        array=array,
        images=images,
        resize=resize,
        cameras=cameras,
        state=state,
        allow_missing=allow_missing,
        prompt=prompt,
        binning=binning,
        chunk=chunk,
        chunk_end=chunk_end,
        stride=stride,
        steps_per_episode=steps_per_episode,
        drop_idle=drop_idle,
        on_bad_record=on_bad_record,
        max_bad=max_bad,
    )
    raise typer.Exit(run_convert(options, Engine(runner, workers, tuple(beam_options or ()))))


@app.command("check")
def check_llava(
    llava: Annotated[Path, typer.Argument(help="Folder that convert wrote.")] = Path("llava"),
    decode: Annotated[bool, typer.Option("--decode", help="Decode every frame, too.")] = False,
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes; if not given, one per core.")] = None,
    as_json: AsJson = False,
) -> None:
    """Read every line and frame of a converted folder and say whether a trainer can use them all."""
    from convert.check import run_check

    raise typer.Exit(run_check(llava, jobs, decode=decode, as_json=as_json))


@app.command()
def pack(
    episodes: Annotated[Path, typer.Argument(help="Folder with one folder for each episode.")],
    card: Annotated[Path, typer.Option(help="The card of this robot, a YAML file.")],
    out: Annotated[Path, typer.Option(help="Folder for the dataset: NAME/VERSION/ below it.")] = Path("data"),
    shard_mb: Annotated[float, typer.Option(help="Megabytes of a shard, about.")] = 256.0,
) -> None:
    """Turn a folder of your own episodes (frames, steps.csv, instruction.txt) into RLDS, by your card."""
    from oxe_mix.pack import PackOptions, run_pack

    raise typer.Exit(run_pack(PackOptions(episodes=episodes, card=card, out=out, shard_mb=shard_mb)))


@app.command()
def synth(
    out: Annotated[Path, typer.Option(help="Folder for the bucket.")],
    mix: Annotated[
        Path | None, typer.Option(help="Make every dataset of this mix, not the six that can be learnt.")
    ] = None,
    episodes: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Episodes in all, spread over six datasets (240); with --mix, of each train split (40).",
        ),
    ] = None,
    shards: Annotated[
        int | None, typer.Option(min=1, help="Shards of each train split (5); with --mix (16).")
    ] = None,
    seed: Annotated[int, typer.Option(help="Same seed, same bytes.")] = 0,
    workers: Workers = None,
) -> None:
    """Make an Open-X bucket of our own: six datasets in their true layouts, showing a tabletop world one can
    learn; or every dataset of a mix, the others with random values.
    """
    from oxe_mix.synth.bucket import run_synth
    from oxe_mix.synth.plan import SynthOptions

    options = SynthOptions(out=out, mix=mix, episodes=episodes, shards=shards, seed=seed, workers=workers)
    raise typer.Exit(run_synth(options))


@app.command()
def datasets(
    name: Annotated[
        str | None, typer.Argument(help="One dataset, by its name or an alias.", autocompletion=dataset_names)
    ] = None,
    as_json: AsJson = False,
    cards: CardsFolder = None,
) -> None:
    """List the datasets, or show one in full: what its numbers mean and what is known to be wrong with it."""
    from oxe_mix.catalog import run_datasets

    raise typer.Exit(run_datasets(name, cards, as_json))


@mix_app.command()
def check(
    mix: Annotated[Path, typer.Argument(**_MIX)],
    as_json: AsJson = False,
    cards: CardsFolder = None,
) -> None:
    """Check a mix against the cards and the datasets' feature trees, without any network."""
    from oxe_mix.mix_check import run_mix_check

    raise typer.Exit(run_mix_check(mix, cards, as_json))


@app.callback(invoke_without_command=True)
def _options(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Versions, hashes of code and cards.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="What libraries say; tracebacks.")] = False,
) -> None:
    if verbose:
        logging.getLogger().setLevel(logging.INFO)
    if version:
        from oxe_mix.fingerprint import fingerprint

        typer.echo(fingerprint())
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main() -> None:
    """The `oxe-mix` command."""
    run_app(app)


if __name__ == "__main__":
    main()
