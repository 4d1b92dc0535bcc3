"""`steps.csv`: one row a step, columns that group into vectors by the first part of their names.

A card's key `[observation, state]` is answered by the columns `observation.state.…` or, shorter, `state.…`,
in the order in which they stand; or by one column of just that name.
"""

from __future__ import annotations

import csv
import io
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from oxe_mix.errors import UserError, did_you_mean
from oxe_mix.pack_card import OBSERVATION, Wanted, dotted
from oxe_mix.pack_frames import read_bytes
from oxe_mix.rlds import Key

STEPS_FILE = "steps.csv"
INSTRUCTION = "instruction"  # the column that says a step's own instruction
_LARGEST = float(np.finfo(np.float32).max)
_SHOWN = 3  # bad cells of one file that are named; the rest are counted


@dataclass(frozen=True, slots=True)
class Columns:
    """Which columns make up each vector, by name, in the order of the vector; and those that none takes."""

    vectors: dict[Key, tuple[str, ...]]
    unused: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Steps:
    """The numbers of one episode, vectors float32 [T, d]."""

    vectors: dict[Key, NDArray[np.float32]]
    num_steps: int


class Table:
    """A CSV file as text: UTF-8 with or without a byte order mark, any line ends, quotes as in RFC 4180."""

    def __init__(self, file: Path) -> None:
        """Read a file.

        Raises: UserError for what is no table: no text, no rows, rows of different lengths.
        """
        self.file = file
        try:
            text = read_bytes(file).decode("utf-8-sig")
            reader = csv.reader(io.StringIO(text, newline=""), strict=True)
            rows = [(reader.line_num, row) for row in reader if row]
        except UnicodeDecodeError as error:
            raise UserError(f"{file}: not UTF-8 text ({error.reason}); save it as CSV UTF-8") from error
        except csv.Error as error:
            raise UserError(f"{file}: not CSV ({error})") from error
        if not rows:
            raise UserError(f"{file}: empty; expected a row of column names, then one row a step")
        self.header = [name.strip() for name in rows[0][1]]
        self.lines = [line for line, _ in rows[1:]]  # of each step, counted from 1
        self.rows = [row for _, row in rows[1:]]
        self._check()

    def _check(self) -> None:
        if len(self.header) == 1 and any(mark in self.header[0] for mark in ";\t"):
            raise UserError(f"{self.file}:1: columns are not parted by commas; save it with commas")
        if not self.rows:
            raise UserError(f"{self.file}: no steps, only column names; expected one row a step")
        for line, row in zip(self.lines, self.rows, strict=True):
            if len(row) != len(self.header):
                raise UserError(f"{self.file}:{line}: {len(row)} cells, the header has {len(self.header)}")

    def columns(self, wanted: Wanted) -> Columns:
        """The columns of each vector that is wanted.

        Raises: UserError for a vector without columns and for a name that stands twice.
        """
        vectors = {key: self._columns_of(key) for key in wanted.vectors}
        used = [name for names in vectors.values() for name in names] + [INSTRUCTION]
        twice = next((name for name in used if self.header.count(name) > 1), None)
        if twice is not None:
            raise UserError(f"{self.file}:1: column {twice} stands there twice")
        return Columns(vectors, tuple(name for name in self.header if name not in used))

    def _columns_of(self, key: Key) -> tuple[str, ...]:
        names = _spellings(key)
        found = {name: self._below(name) for name in names}
        full = [name for name in names if found[name]]
        if len(full) > 1:
            raise UserError(f"{self.file}:1: both {' and '.join(f'{name}.…' for name in full)}; keep one")
        if not full:
            groups = sorted({name.rsplit(".", 1)[0] for name in self.header if name})
            raise UserError(
                f"{self.file}:1: no column for the card's key [{', '.join(key)}]; expected "
                f"{names[-1]}.NAME or {names[-1]}{did_you_mean(names[-1], groups)}"
            )
        return found[full[0]]

    def _below(self, name: str) -> tuple[str, ...]:
        return tuple(c for c in self.header if c == name or c.startswith(f"{name}."))

    def steps(self, columns: Columns) -> Steps:
        """The numbers. Raises: UserError, a line for each of the first cells that hold none."""
        bad: list[str] = []
        vectors = {key: self._vector(names, bad) for key, names in columns.vectors.items()}
        if bad:
            more = [f"{self.file}: {len(bad) - _SHOWN:,} more cells like these"] if len(bad) > _SHOWN else []
            raise UserError("\n".join([*bad[:_SHOWN], *more]))
        return Steps(vectors, len(self.rows))

    def instructions(self) -> list[str] | None:
        """The steps' own instructions, [T], some of them empty; None without such a column."""
        if INSTRUCTION not in self.header:
            return None
        at = self.header.index(INSTRUCTION)
        return [" ".join(row[at].split()) for row in self.rows]

    def _vector(self, names: tuple[str, ...], bad: list[str]) -> NDArray[np.float32]:
        out = np.zeros((len(self.rows), len(names)), np.float32)
        for column, name in enumerate(names):
            at = self.header.index(name)
            for t, row in enumerate(self.rows):
                try:
                    out[t, column] = number(row[at])
                except ValueError as error:
                    bad.append(f"{self.file}:{self.lines[t]}: column {name}: {error}")
        return out


def number(cell: str) -> float:
    """A cell as a number that float32 holds. Raises: ValueError that says what the cell is instead."""
    text = cell.strip()
    if not text:
        raise ValueError("empty, expected a number")
    try:
        value = float("" if "_" in text else text)
    except ValueError:
        hint = "; write decimals with a point" if "," in text else ""
        raise ValueError(f"{text!r} is no number{hint}") from None
    if not math.isfinite(value):
        raise ValueError(f"{text!r} is not finite; a robot cannot be sent it, so cut this step out")
    if abs(value) > _LARGEST:
        raise ValueError(f"{text} is too large for float32")
    return value


def _spellings(key: Key) -> list[str]:
    """How a key may stand in a header, the shortest last."""
    short = [dotted(key[1:])] if key[0] == OBSERVATION and len(key) > 1 else []
    return [dotted(key), *short]


def same_columns(table: Table, own: Columns, first: Columns, example: Path) -> Columns:
    """The columns of a later episode in the order of the first one, which was read from `example`.

    Raises: UserError when they are not the same ones.
    """
    for key, names in first.vectors.items():
        missing, extra = set(names) - set(own.vectors[key]), set(own.vectors[key]) - set(names)
        if missing or extra:
            parts = [
                f"{word} {', '.join(sorted(which))}"
                for word, which in (("lacks", missing), ("has also", extra))
                if which
            ]
            raise UserError(f"{table.file}:1: {' and '.join(parts)}, unlike {example}")
    return Columns(first.vectors, own.unused)
