"""What a user may give `oxe-mix doctor` and `report` in the place of a folder that they read."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from oxe_mix.cards import Cards
from oxe_mix.errors import UserError
from oxe_mix.lock import LOCK_FILE, holds_rlds
from oxe_mix.rlds import INFO_FILE

Kind = Literal["machine", "data", "llava"]
KINDS: dict[Kind, str] = {"machine": "this machine", "data": "downloaded data", "llava": "converted data"}


def refuse_a_file(folder: Path, wrote: str) -> None:
    """Raises: UserError for a file, with which folder is wanted."""
    if folder.is_file():
        raise UserError(f"{folder}: is a file; give the folder that {wrote} wrote")


def refuse_strangers(folder: Path, cards: Cards) -> None:
    """Raises: UserError where datasets lie and no card is of one of them."""
    names = sorted({info.parts[-3] for info in folder.glob(f"*/*/{INFO_FILE}")})
    if names and not any(cards.find(name) for name in names) and not (folder / LOCK_FILE).exists():
        raise UserError(
            f"{folder}: there is no card for {', '.join(names)}; give the folder of your own: --cards FOLDER"
        )


def of_one_dataset(folder: Path) -> str:
    """Of the folder of one dataset, or of its versions: what it is and which folder to give; else nothing."""
    for files, above in (
        (INFO_FILE, folder.absolute().parent.parent),
        (f"*/{INFO_FILE}", folder.absolute().parent),
    ):
        if any(folder.glob(files)):
            return f"is one dataset; give the folder of datasets: {above}"
    return ""


def refuse_other_depths(folder: Path) -> None:
    """Raises: UserError for the folder of one dataset, or of its versions, and for one without any."""
    if holds_rlds(folder):
        return
    problem = of_one_dataset(folder) or (
        f"neither RLDS datasets (NAME/VERSION/{INFO_FILE}) nor conversations (manifest.json); "
        "give a folder that download, pack or convert wrote"
    )
    raise UserError(f"{folder}: {problem}")
