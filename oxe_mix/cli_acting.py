"""The commands with which a trained model acts: `oxe-mix act`, `replay` and `serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

app = typer.Typer()

_HOST = "127.0.0.1"

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
LimitsFile = Annotated[
    Path | None, typer.Option("--limits", help="YAML; else each dataset's recorded range.")
]
OnViolation = Annotated[
    Literal["clamp", "reject"], typer.Option(help="Send the nearest action allowed, or an error.")
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
    limits: LimitsFile = None,
    on_violation: OnViolation = "clamp",
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
        limits=limits,
        on_violation=on_violation,
        loading=Loading(device, dtype, quantize, temperature, cuda_graph),
    )
    raise typer.Exit(run_act(options))


@app.command()
def replay(
    checkpoint: Checkpoint,
    data: Annotated[Path, typer.Option(help="Folder that convert wrote.")] = Path("llava"),
    episode: Annotated[
        str | None, typer.Option(help="As in the conversations' ids: viola/train/0/3; else the first.")
    ] = None,
    part: Annotated[str, typer.Option(help="val: held-out episodes; or train.")] = "val",
    out: Annotated[
        Path | None, typer.Option(help="Folder for picture and JSON; else CHECKPOINT/replay.")
    ] = None,
    unnorm_key: Annotated[
        str | None, typer.Option(help="Act with the checkpoint's statistics of this dataset.")
    ] = None,
    limits: LimitsFile = None,
    on_violation: OnViolation = "clamp",
    device: Device = None,
    dtype: DType = None,
    quantize: Quantize = None,
) -> None:
    """Replay a recorded episode by the path that a robot is served by, beside what was recorded."""
    from train_llava.acting.load import Loading
    from train_llava.acting.replay_command import ReplayOptions, run_replay

    options = ReplayOptions(
        checkpoint=checkpoint,
        data=data,
        episode=episode,
        part=part,
        out=out,
        unnorm_key=unnorm_key,
        limits=limits,
        on_violation=on_violation,
        loading=Loading(device, dtype, quantize),
    )
    raise typer.Exit(run_replay(options))


@app.command()
def serve(
    checkpoint: Checkpoint,
    host: Annotated[
        str, typer.Option(help="Address; another than this machine's own needs --token.")
    ] = _HOST,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8000,
    token: Annotated[
        str | None, typer.Option(envvar="OXE_MIX_TOKEN", help="What clients must know.", show_default=False)
    ] = None,
    allow_origin: Annotated[
        list[str] | None, typer.Option(help="Web page that may ask: https://robot.example. Again: another.")
    ] = None,
    obs_keys: Annotated[Path | None, typer.Option(help="YAML: other names for a request's fields.")] = None,
    max_batch: Annotated[int, typer.Option(min=1, help="Robots that are answered together.")] = 1,
    limits: LimitsFile = None,
    on_violation: OnViolation = "clamp",
    max_message_mb: Annotated[int, typer.Option(min=1, help="Of a request.")] = 16,
    max_pixels: Annotated[int, typer.Option(min=1, help="Of an image.")] = 4 * 2**20,
    max_text: Annotated[int, typer.Option(min=1, help="Characters of an instruction.")] = 1000,
    max_connections: Annotated[int, typer.Option(min=1, help="Robots at a time.")] = 64,
    device: Device = None,
    dtype: DType = None,
    quantize: Quantize = None,
    temperature: Temperature = None,
    cuda_graph: CudaGraph = False,
) -> None:
    """Answer robots over a socket, as openpi's policy server and OpenVLA's do."""
    from train_llava.acting.incoming import Caps
    from train_llava.acting.load import Loading
    from train_llava.acting.serve_command import ServeOptions, run_serve

    options = ServeOptions(
        checkpoint=checkpoint,
        host=host,
        port=port,
        token=token,
        allow_origins=tuple(allow_origin or ()),
        obs_keys=obs_keys,
        max_batch=max_batch,
        limits=limits,
        on_violation=on_violation,
        caps=Caps(max_message_mb * 2**20, max_pixels, max_text, max_connections),
        loading=Loading(device, dtype, quantize, temperature, cuda_graph),
    )
    raise typer.Exit(run_serve(options))
