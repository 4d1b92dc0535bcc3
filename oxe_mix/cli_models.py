"""The commands about trained models, `oxe-mix eval` and `oxe-mix export`; `make train` makes the models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()


@app.command("eval")
def evaluate(
    checkpoint: Annotated[
        Path, typer.Option(help="Folder that make train wrote, or one of its checkpoints.")
    ],
    data: Annotated[Path, typer.Option(help="Folder that convert wrote.")] = Path("llava"),
    part: Annotated[str, typer.Option(help="val: held-out samples; or train.")] = "val",
    samples: Annotated[int | None, typer.Option(min=1, help="So many, evenly spread; else all.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Samples in a forward pass.")] = 32,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; else cuda if there is one.")] = None,
    out: Annotated[Path | None, typer.Option(help="The report; else CHECKPOINT/eval-DATA.json.")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Only this dataset. Again: another one.")] = None,
    unnorm_key: Annotated[
        list[str] | None,
        typer.Option(help="NAME=KEY: on dataset NAME, act with the checkpoint's statistics of KEY."),
    ] = None,
) -> None:
    """Score a checkpoint's actions on a converted folder, beside those of policies without eyes."""
    from train_llava.eval_command import EvalOptions, run_eval

    keys = tuple(unnorm_key or ())
    options = EvalOptions(
        checkpoint, data, part, samples, batch, device, out, tuple(only or ()), unnorm_keys=keys
    )
    raise typer.Exit(run_eval(options))


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Option(help="Run, or checkpoint of one, that was trained with LoRA.")],
    out: Annotated[Path, typer.Option(help="Folder for the model; a new or an empty one.")],
    dtype: Annotated[str | None, typer.Option(help="bf16 or fp32; else the base's.")] = None,
) -> None:
    """Merge adapters into their base: a whole model that stock transformers loads, proved to be the same."""
    from train_llava.export import run_export

    raise typer.Exit(run_export(checkpoint, out, dtype))
