"""The commands with which a trained model acts: `oxe-mix act`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

app = typer.Typer()

Checkpoint = Annotated[Path, typer.Option(help="Folder that make train wrote, or one of its checkpoints.")]
UnnormKey = Annotated[
    str | None, typer.Option(help="Dataset whose statistics give the units; needed if there are several.")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, …; else a GPU if there is one.")]
DType = Annotated[
    Literal["fp32", "bf16"] | None, typer.Option(help="Else as in training on a GPU, fp32 on a CPU.")
]
Quantize = Annotated[
    Literal["4bit", "8bit"] | None, typer.Option(help="The language model's weights, by bitsandbytes.")
]
Temperature = Annotated[float | None, typer.Option(min=0.01, help="Draw actions; else the most likely ones.")]
CudaGraph = Annotated[
    bool, typer.Option("--cuda-graph", help="Replay one recorded pass per token; not tried on a GPU yet.")
]


@app.command()
def act(
    checkpoint: Checkpoint,
    image: Annotated[
        list[str] | None,
        typer.Option(help="A picture, a folder of them, or a video. Of several cameras: CAMERA=PATH each."),
    ] = None,
    instruction: Annotated[str | None, typer.Option(help='In words: "put the carrot on the plate".')] = None,
    unnorm_key: UnnormKey = None,
    state: Annotated[
        str | None, typer.Option(help='Of the robot, if it was trained with it: "0.31 -0.02 0.15".')
    ] = None,
    requests: Annotated[
        Path | None,
        typer.Option(
            help="JSON lines: image or images, instruction, unnorm_key, state, seed; paths beside it."
        ),
    ] = None,
    stride: Annotated[int, typer.Option(min=1, help="Of a folder or video, every so many pictures.")] = 1,
    batch: Annotated[int, typer.Option(min=1, help="Observations in a forward pass.")] = 1,
    out: Annotated[Path | None, typer.Option(help="File for the answers; else the screen.")] = None,
    device: Device = None,
    dtype: DType = None,
    quantize: Quantize = None,
    temperature: Temperature = None,
    seed: Annotated[
        int, typer.Option(min=0, help="Of the first draw; the next observation has the next.")
    ] = 0,
    cuda_graph: CudaGraph = False,
) -> None:
    """Ask a trained checkpoint for actions: one JSON object for each observation, in robot units."""
    from train_llava.acting.act_command import ActOptions, run_act
    from train_llava.acting.load import Loading

    options = ActOptions(
        checkpoint=checkpoint,
        images=tuple(image or ()),
        instruction=instruction,
        unnorm_key=unnorm_key,
        state=state,
        requests=requests,
        stride=stride,
        batch=batch,
        seed=seed,
        out=out,
        loading=Loading(device, dtype, quantize, temperature, cuda_graph),
    )
    raise typer.Exit(run_act(options))
