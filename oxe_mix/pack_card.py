"""What a card asks of a folder of episodes: which vectors, which cameras, and where the instruction goes."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from pathlib import Path

from oxe_mix.cards import Card, KeyTerm
from oxe_mix.errors import UserError
from oxe_mix.rlds import Key
from oxe_mix.yaml_files import Loc, line_of

OBSERVATION = "observation"
FLAGS = ("is_first", "is_last", "is_terminal")
# What TFDS takes for the name and the version of a dataset.
_NAME, _VERSION = re.compile(r"[A-Za-z]\w*", re.ASCII), re.compile(r"\d+\.\d+\.\d+", re.ASCII)


@dataclass(frozen=True, slots=True)
class Wanted:
    """The step features that a card reads; below `observation`, cameras by their plain names."""

    vectors: tuple[Key, ...]
    cameras: tuple[str, ...]
    language: Key


def wanted_by(card: Card, file: Path) -> Wanted:
    """What a card, read from `file`, asks for.

    Raises: UserError with the card's file and line for a card that no folder of episodes can serve.
    """
    recipes = [card, card.with_recipe("corrected")] if card.corrected else [card]
    terms = [term for own in recipes for term in (*own.state.parts, *own.action.recipe)]
    vectors = dict.fromkeys(term.key for term in terms if isinstance(term, KeyTerm))
    roles = (*card.cameras.model_dump().values(), *card.depth.model_dump().values())
    wanted = Wanted(tuple(vectors), tuple(dict.fromkeys(filter(None, roles))), card.language.key)
    misfit = _misfit(card, wanted)
    if misfit:
        loc, text = misfit
        raise UserError(f"{file}:{line_of(file, loc)}: {text}")
    return wanted


def _misfit(card: Card, wanted: Wanted) -> tuple[Loc, str] | None:
    """The first thing of a card that cannot be packed: its place, and why."""
    checks: tuple[tuple[bool, Loc, str], ...] = (
        (
            bool(_NAME.fullmatch(card.name)),
            ("name",),
            f"{card.name!r} is no name for TFDS; use letters and '_'",
        ),
        (
            bool(_VERSION.fullmatch(card.version)),
            ("version",),
            f"{card.version!r} is no version for TFDS; write it as 1.0.0",
        ),
        (
            card.language.decode == "utf8",
            ("language", "decode"),
            f"{card.language.decode}: pack writes text; use utf8",
        ),
        (bool(wanted.cameras), ("cameras",), "no camera; a conversation needs a frame"),
        (bool(wanted.vectors), ("action", "recipe"), "reads no column"),
    )
    wrong = next(((loc, text) for fine, loc, text in checks if not fine), None)
    clash = _clash(wanted)
    return wrong or ((("name",), clash) if clash else None)


def _clash(wanted: Wanted) -> str | None:
    """Two keys that cannot both be features; None when all can."""
    keys = [*wanted.vectors, *((OBSERVATION, name) for name in wanted.cameras), wanted.language]
    for key, other in itertools.combinations([*keys, *((flag,) for flag in FLAGS)], 2):
        if key[: len(other)] == other[: len(key)]:
            return f"{dotted(key)} and {dotted(other)} cannot both be features: one is or holds the other"
    return None


def dotted(key: Key) -> str:
    """A key as it stands in the header of a CSV and in messages: `observation.state`."""
    return ".".join(key)
