"""What adapters were trained on: where their base is, and whether it is still the one that it was."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from oxe_mix.errors import UserError
from oxe_mix.files import read_model
from train_llava.loading import find_folder

ADAPTER_CONFIG, BASE_RECORD = "adapter_config.json", "base.json"
_BLOCK, _NUM_BLOCKS = 1 << 16, 64  # of a file of weights, what is read to know it again


class BaseRecord(BaseModel):
    """What adapters were trained on, and what was trained beside them."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    quantize: Literal["none", "nf4"]
    files: dict[str, str]  # the base's config and weights: size, and a digest of samples
    trained_parts: tuple[str, ...] = ()  # weights that were trained in full


class PeftRecord(BaseModel):
    """What is read of peft's own config of adapters."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    base_model_name_or_path: str
    rank: int = Field(alias="r")
    alpha: float = Field(alias="lora_alpha")
    dropout: float = Field(alias="lora_dropout")
    rows: dict[str, list[int]] = Field(alias="trainable_token_indices")


def read_peft_record(folder: Path) -> PeftRecord:
    """Peft's config in a folder. Raises: UserError when there is none or it is not of such adapters."""
    return read_model(PeftRecord, folder / ADAPTER_CONFIG, "the config of adapters that training wrote")


def read_base_record(folder: Path) -> BaseRecord:
    """What a folder's adapters were trained on. Raises: UserError when it does not say."""
    return read_model(BaseRecord, folder / BASE_RECORD, "the note of the base that training wrote")


def check_base(folder: Path, about: PeftRecord, record: BaseRecord) -> Path:
    """Where the base of a folder's adapters is.

    Raises: UserError when it is gone or is not what it was.
    """
    path = about.base_model_name_or_path
    move = f"put it back, or write where it is into {ADAPTER_CONFIG}"
    try:
        base = find_folder(path)
    except UserError as error:
        raise UserError(f"{folder}: adapters without their base, {error}; {move}") from error
    if differs := _difference(record.files, fingerprint(base)):
        raise UserError(
            f"{folder}: was trained on another base than what is now at {path} ({differs}); {move}"
        )
    return base


def fingerprint(base: Path) -> dict[str, str]:
    """Of config and weights: what tells a base from another one, without reading all of it."""
    files = [base / "config.json", *sorted(base.glob("*.safetensors"))]
    return {file.name: _digest(file) for file in files if file.exists()}


def _digest(file: Path) -> str:
    size, digest = file.stat().st_size, hashlib.sha256()
    step = max(_BLOCK, size // _NUM_BLOCKS)
    with file.open("rb") as stream:
        for start in range(0, size, step):
            stream.seek(start)
            digest.update(stream.read(_BLOCK))
    return f"{size} bytes, {digest.hexdigest()}"


def _difference(then: dict[str, str], now: dict[str, str]) -> str:
    """The first file that differs, and how; empty when none does."""
    for name in sorted({*then, *now}):
        if then.get(name) != now.get(name):
            how = "missing" if name not in now else "new" if name not in then else "of other content"
            return f"{name} is {how}"
    return ""
