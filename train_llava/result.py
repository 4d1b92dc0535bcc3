"""What a run leaves: one folder that loads as it is, and says where it comes from."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml

from convert.action_codec import ActionCodec, write_codec
from convert.finish import CARDS
from convert.manifest import MANIFEST_FILE
from oxe_mix import __version__
from oxe_mix.files import write_json
from train_llava import ranks
from train_llava.config import RunConfig
from train_llava.loading import save_checkpoint
from train_llava.model import OneViewLlava
from train_llava.processor import OneViewProcessor

REPORT_FILE, CONFIG_FILE, VERSIONS_FILE = "evaluation.json", "config.yaml", "versions.json"
DATA_MANIFEST = f"data_{MANIFEST_FILE}"
_PACKAGES = ("torch", "transformers", "deepspeed", "accelerate", "peft", "tokenizers", "numpy", "pillow")
_SAVING = ".saving"


def save_weights(
    folder: Path, model: OneViewLlava, processor: OneViewProcessor, config: RunConfig, engine: Any = None
) -> None:
    """Write the model's files into a folder that is there; all ranks must call.

    Args:
        engine: DeepSpeed's. Where stage 3 split the weights, it gathers them on rank 0.
    """
    weights: dict[str, torch.Tensor] | None = None
    if engine is not None and config.train.zero.stage == 3:
        weights = engine._zero3_consolidated_16bit_state_dict()  # noqa: SLF001 (there is no public way)
    if ranks.rank() != 0:
        return
    if config.model.lora is not None:
        from train_llava.lora import save_adapter

        save_adapter(folder, model, processor, weights)
    else:
        save_checkpoint(folder, model, processor, weights)


def write_origin(folder: Path, config: RunConfig, codec: ActionCodec, data: tuple[Path, ...]) -> None:
    """What a checkpoint carries beside its weights: how to act with it, and what it was trained on."""
    write_codec(folder, codec)
    (folder / CONFIG_FILE).write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    write_json(folder / VERSIONS_FILE, {"oxe-mix": __version__} | dict(_versions()))
    (folder / CARDS).mkdir(exist_ok=True)
    for number, source in enumerate(data):
        name = DATA_MANIFEST if number == 0 else f"data_{number}_{MANIFEST_FILE}"
        shutil.copy(source / MANIFEST_FILE, folder / name)
        for card in sorted((source / CARDS).glob("*.yaml")):
            shutil.copy(card, folder / CARDS / card.name)


def _versions() -> list[tuple[str, str]]:
    found = []
    for name in _PACKAGES:
        try:
            found.append((name, version(name)))
        except PackageNotFoundError:
            continue
    return found


def publish(run: Path, write: Callable[[Path], None]) -> None:
    """Write the final model into the run's folder, config.json last: with it the folder is a checkpoint.

    Args:
        write: all of it into a folder; called on every rank.
    """
    scratch = run / _SAVING
    if ranks.rank() == 0:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
    ranks.wait()
    write(scratch)
    ranks.wait()
    if ranks.rank() != 0:
        return
    last = ("adapter_config.json", "config.json")
    for file in sorted(scratch.iterdir(), key=lambda file: file.name in last):
        if file.is_dir():
            shutil.rmtree(run / file.name, ignore_errors=True)
        file.replace(run / file.name)
    scratch.rmdir()
