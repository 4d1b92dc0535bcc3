"""A folder of episodes as a user keeps it: `0000/steps.csv`, `0000/CAMERA/0000.jpg …`,
`0000/instruction.txt`.

The folders of episodes stand in the folder that is given, then all are the split `train`; or one level
below, in a folder for each split.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from oxe_mix.errors import UserError
from oxe_mix.pack_card import Wanted
from oxe_mix.pack_csv import INSTRUCTION, STEPS_FILE, Columns, Steps, Table, same_columns
from oxe_mix.pack_frames import frame_files, in_order, read_bytes

INSTRUCTION_FILE = "instruction.txt"
_SPLIT = re.compile(r"[A-Za-z]\w*", re.ASCII)
_BYTES_PER_STEP = 64  # about what flags and lengths of a step come to in a record


@dataclass(frozen=True, slots=True)
class EpisodeFolder:
    """One episode: its folder, its name below the folder of episodes, and its split."""

    path: Path
    name: str
    split: str


@dataclass(frozen=True, slots=True)
class Recording:
    """One episode as read, frames by camera as files: [T] each."""

    steps: Steps
    instructions: list[str]
    frames: dict[str, list[Path]]
    columns: Columns

    @property
    def num_bytes(self) -> int:
        """About what its record comes to."""
        files = (file for camera in self.frames.values() for file in camera)
        numbers = sum(vector.nbytes for vector in self.steps.vectors.values())
        texts = sum(len(text.encode()) for text in self.instructions)
        overhead = _BYTES_PER_STEP * self.steps.num_steps
        return sum(file.stat().st_size for file in files) + numbers + texts + overhead


def find_episodes(source: Path) -> list[EpisodeFolder]:
    """Every episode of a folder, splits by name, episodes in natural order.

    Raises: UserError when there are none, or folders that are neither episodes nor splits.
    """
    if not source.is_dir():
        raise UserError(f"{source}: no such folder; expected a folder with one folder for each episode")
    children = _folders(source)
    own = [child for child in children if (child / STEPS_FILE).exists()]
    if not own and any((c / STEPS_FILE).exists() for child in children for c in _folders(child)):
        return [episode for child in children for episode in _split(child)]
    if not children:
        raise UserError(f"{source}: no episodes; expected {source}/0000/{STEPS_FILE} and so on")
    _refuse_others(children)
    return [EpisodeFolder(child, child.name, "train") for child in children]


def _split(folder: Path) -> list[EpisodeFolder]:
    if not _SPLIT.fullmatch(folder.name) or folder.name == "all":
        raise UserError(f"{folder}: no name for a split; use train, val, test or another word")
    children = _folders(folder)
    if not children:
        raise UserError(f"{folder}: a split without episodes; remove the folder or fill it")
    _refuse_others(children)
    return [EpisodeFolder(child, f"{folder.name}/{child.name}", folder.name) for child in children]


def _refuse_others(children: Sequence[Path]) -> None:
    without = [child for child in children if not (child / STEPS_FILE).exists()]
    if without:
        raise UserError("\n".join(f"{child}: no {STEPS_FILE}, so this is no episode" for child in without))


def _folders(parent: Path) -> list[Path]:
    found = (child for child in parent.iterdir() if child.is_dir() and not child.name.startswith("."))
    return sorted(found, key=in_order)


def read_recording(folder: Path, wanted: Wanted, first: tuple[Path, Columns] | None) -> Recording:
    """One episode's steps and the names of its frames.

    Args:
        folder: of the episode.
        wanted: what the card asks for.
        first: the file and columns of the first episode, which the others have to match; None for itself.

    Raises: UserError with a line for each thing that is wrong: in the CSV, in the instruction, in a camera.
    """
    problems: list[str] = []
    table = Table(folder / STEPS_FILE)
    columns = table.columns(wanted)
    if first is not None:
        columns = same_columns(table, columns, first[1], first[0])
    steps, frames, instructions = None, {}, list[str]()
    try:
        steps = table.steps(columns)
    except UserError as error:
        problems.append(str(error))
    try:
        instructions = _instructions(folder, table)
    except UserError as error:
        problems.append(str(error))
    for camera in wanted.cameras:
        try:
            frames[camera] = frame_files(folder / camera, len(table.rows))
        except UserError as error:
            problems.append(str(error))
    if steps is None or problems:
        raise UserError("\n".join(problems))
    return Recording(steps, instructions, frames, columns)


def _instructions(folder: Path, table: Table) -> list[str]:
    """The text of each step: from the column, or the one text of the whole episode from its file."""
    file = folder / INSTRUCTION_FILE
    own = table.instructions()
    if own is not None:
        if file.exists():
            raise UserError(f"{file}: {STEPS_FILE} has a column {INSTRUCTION} as well; keep one of them")
        if not any(own):
            raise UserError(f"{table.file}: column {INSTRUCTION} is empty at every step")
        return own
    if not file.exists():
        raise UserError(f"{file}: no such file, and {STEPS_FILE} has no column {INSTRUCTION}")
    try:
        text = " ".join(read_bytes(file).decode("utf-8-sig").split())
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text ({error.reason})") from error
    if not text:
        raise UserError(f"{file}: empty; write what the robot was to do, as one sentence")
    return [text] * len(table.rows)
