"""What a shell may complete: names that are known without reading any data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

_HERE = Path(__file__).parent


def mix_names(incomplete: str) -> list[str]:
    """Files in mixtures/ that begin so."""
    return _names(_HERE.parent / "mixtures", incomplete, ".yaml")


def dataset_names(incomplete: str) -> list[str]:
    """Datasets with a card that begin so."""
    return _names(_HERE / "cards", incomplete, "")


def one_of(*words: str) -> Callable[[str], list[str]]:
    """Those of some words that begin so."""

    def begin(incomplete: str) -> list[str]:
        return [word for word in words if word.startswith(incomplete)]

    return begin


def _names(folder: Path, incomplete: str, ending: str) -> list[str]:
    return sorted(
        f"{file.stem}{ending}" for file in folder.glob("*.yaml") if file.stem.startswith(incomplete)
    )
