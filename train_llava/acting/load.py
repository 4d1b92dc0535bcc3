"""A policy from a checkpoint's folder."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from convert.action_codec import ActionCodec, read_codec
from oxe_mix.errors import UserError
from train_llava.config import Bits, Precision, load_config, refuse_unended

if TYPE_CHECKING:
    from train_llava.acting.policy import Policy


@dataclass(frozen=True, slots=True)
class Loading:
    """How a checkpoint is made to act.

    device: cpu, cuda, cuda:1, …; None: a GPU if there is one. dtype: None: on a GPU what training calculated
    in, on a CPU fp32. quantize: the language model's linear layers. temperature: of sampling; None: the most
    likely bins. cuda_graph: as `ActionDecoder`.
    """

    device: str | None = None
    dtype: Precision | None = None
    quantize: Bits | None = None
    temperature: float | None = None
    cuda_graph: bool = False


def codec_of(checkpoint: Path) -> ActionCodec:
    """What a checkpoint acts with, before its weights are read.

    Raises: UserError when the folder is no checkpoint.
    """
    refuse_unended(checkpoint)
    return read_codec(checkpoint)


def load_policy(checkpoint: Path, loading: Loading) -> Policy:
    """Raises: UserError for what is no checkpoint, or cannot be had on that device in that form."""
    codec = codec_of(checkpoint)
    from train_llava.quiet import quiet_libraries

    quiet_libraries()
    import torch

    from train_llava.acting.policy import Policy
    from train_llava.decode import ActionDecoder
    from train_llava.loading import DTYPES, load_checkpoint, proved_device

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
    if loading.cuda_graph and decoder.is_parallel:
        raise UserError(f"--cuda-graph: {checkpoint} answers in one pass; there is none to replay per token")
    return Policy(decoder, processor, codec, loading.temperature)


def _dtype(checkpoint: Path, device: str) -> Precision:
    if device == "cpu":
        return "fp32"
    with contextlib.suppress(UserError):  # a model that was merged, or comes from elsewhere, has no run
        return load_config(checkpoint / "config.yaml").train.precision
    return "bf16"
