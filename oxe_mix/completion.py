"""What a shell may complete: names that are known without reading any data."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any, get_args

import typer

_HERE = Path(__file__).parent


def mix_names(incomplete: str) -> list[str]:
    """Files in mixtures/ that begin so."""
    return _names(_HERE.parent / "mixtures", incomplete, ".yaml")


def dataset_names(incomplete: str) -> list[str]:
    """Datasets with a card that begin so."""
    return _names(_HERE / "cards", incomplete, "")


def choice(kind: str, help_text: str) -> Any:
    """An option whose words are those of a Literal, `MODULE:NAME`, imported only when a shell asks."""

    def words(incomplete: str) -> list[str]:
        module, _, name = kind.partition(":")
        known = get_args(getattr(import_module(module), name))
        return [word for word in known if word.startswith(incomplete)]

    return typer.Option(help=help_text, autocompletion=words)


def _names(folder: Path, incomplete: str, ending: str) -> list[str]:
    return sorted(
        f"{file.stem}{ending}" for file in folder.glob("*.yaml") if file.stem.startswith(incomplete)
    )
