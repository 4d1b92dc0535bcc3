"""A policy from a checkpoint's folder."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from convert.action_codec import ActionCodec, read_codec
from oxe_mix.errors import UserError
from train_llava.config import CHECKPOINTS, holds_model, load_config

if TYPE_CHECKING:
    import torch

    from train_llava.acting.policy import Policy

DType = Literal["fp32", "bf16"]
Quantize = Literal["4bit", "8bit"]


@dataclass(frozen=True, slots=True)
class Loading:
    """How a checkpoint is made to act.

    device: cpu, cuda, cuda:1, …; None: a GPU if there is one. dtype: None: on a GPU what training calculated
    in, on a CPU fp32. quantize: the language model's linear layers. temperature: of sampling; None: the most
    likely bins. cuda_graph: as `ActionDecoder`.
    """

    device: str | None = None
    dtype: DType | None = None
    quantize: Quantize | None = None
    temperature: float | None = None
    cuda_graph: bool = False


def codec_of(checkpoint: Path) -> ActionCodec:
    """What a checkpoint acts with, before its weights are read.

    Raises: UserError when the folder is no checkpoint.
    """
    steps = sorted((checkpoint / CHECKPOINTS).glob("step-*"), key=lambda step: (len(step.name), step.name))
    if steps and not holds_model(checkpoint):
        raise UserError(f"{checkpoint}: the run has not ended; give one of its checkpoints, as {steps[-1]}")
    return read_codec(checkpoint)


def load_policy(checkpoint: Path, loading: Loading) -> Policy:
    """Raises: UserError for what is no checkpoint, or cannot be had on that device in that form."""
    codec = codec_of(checkpoint)
    from train_llava.quiet import quiet_libraries

    quiet_libraries()
    import torch

    from train_llava.acting.policy import Policy
    from train_llava.decode import ActionDecoder
    from train_llava.loading import DTYPES, load_checkpoint

    device = proved_device(loading.device)
    if loading.cuda_graph and device.type != "cuda":
        raise UserError("--cuda-graph: needs a CUDA device")
    dtype = DTYPES[loading.dtype or _dtype(checkpoint, device.type)]
    model, processor = load_checkpoint(checkpoint, dtype, loading.quantize)
    try:
        torch.nn.Module.to(model, device)
    except torch.OutOfMemoryError as error:
        raise UserError(f"{checkpoint}: does not fit {device}; try --quantize 4bit") from error
    decoder = ActionDecoder(model, processor, codec, reuse=True, cuda_graph=loading.cuda_graph)
    return Policy(decoder, processor, codec, loading.temperature)


def proved_device(name: str | None) -> torch.device:
    """A device that can be used. Raises: UserError for one that is not there."""
    import torch

    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        # torch says "not compiled with CUDA" with an AssertionError.
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return torch.device(name)


def _dtype(checkpoint: Path, device: str) -> DType:
    if device == "cpu":
        return "fp32"
    with contextlib.suppress(UserError):  # a model that was merged, or comes from elsewhere, has no run
        return load_config(checkpoint / "config.yaml").train.precision
    return "bf16"
