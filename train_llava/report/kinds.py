"""Of which stage a folder is, by its files."""

from __future__ import annotations

from pathlib import Path

from convert.action_codec import CODEC_FILE
from convert.doctor_folder import of_one_dataset
from convert.llava import CONVERSATIONS
from convert.manifest import MANIFEST_FILE
from oxe_mix.errors import UserError
from oxe_mix.lock import holds_rlds
from train_llava.config import METRICS_FILE
from train_llava.report.page import Kind

_EVALUATION_FILE = "evaluation.json"


def kind_of(folder: Path) -> Kind:
    """Raises: UserError when it is of none, with what it may be instead."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give one that download, convert or make train wrote")
    if (folder / MANIFEST_FILE).exists():
        return "llava"
    if any((folder / name).exists() for name in (METRICS_FILE, _EVALUATION_FILE)):
        return "run"
    if holds_rlds(folder):
        return "data"
    raise UserError(f"{folder}: {_perhaps(folder)}")


def _perhaps(folder: Path) -> str:
    if (folder / CONVERSATIONS).is_dir():
        return f"no {MANIFEST_FILE}, so the conversion is not finished; run oxe-mix convert again"
    if (folder / CODEC_FILE).exists():
        return f"a checkpoint without {METRICS_FILE} and {_EVALUATION_FILE}; give the run's own folder"
    return of_one_dataset(folder) or "holds nothing that download, convert or make train wrote"
