"""`oxe-mix datasets`: what the cards say, as people read it and as JSON."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from oxe_mix.cards import Card, Cards, Corrected, FillTerm, OpName, Slice, Term, load_cards
from oxe_mix.mix import OPEN_X_BUCKET
from oxe_mix.mods import FlipChannels, Mod, Resize
from oxe_mix.text import count, say, table

_WIDTH = 100
_LABEL = 14
_ENCODINGS = {"EEF_POS": "EEF", "JOINT_POS": "joint"}


def run_datasets(name: str | None, cards_folder: Path | None, as_json: bool) -> int:
    """Print all cards or one of them; returns the exit code.

    Raises: UserError for a name that no card has, with the closest one.
    """
    cards = load_cards(cards_folder)
    if name is None:
        say(_json([summary(card) for card in cards]) if as_json else datasets_text(cards))
    else:
        card = cards.get(name)
        say(_json(card.model_dump(mode="json")) if as_json else card_text(card))
    return 0


def summary(card: Card) -> dict[str, Any]:
    """What the list says of a card, for programs."""
    return {
        "name": card.name,
        "aliases": list(card.aliases),
        "version": card.version,
        "public": card.public,
        "robot": card.robot,
        "cameras": card.cameras.model_dump(),
        "control_hz": card.control_hz,
        "episodes": card.episodes,
        "size_gib": card.size_gib,
        "action": {"encoding": card.action.encoding, "dims": card.action.dims, "kind": card.action_kind},
        "defects": len(card.defects),
        "corrected": card.corrected is not None,
        "mods": [mod_text(mod) for mod in card.mods],
    }


def datasets_text(cards: Cards) -> str:
    """All cards, one a line, and what to type next."""
    header = ("dataset", "robot", "cameras", "Hz", "episodes", "GiB", "action", "defects", "mods")
    rows = [
        (
            card.name,
            card.robot,
            _cameras(card),
            number(card.control_hz),
            f"{sum(card.episodes.values()):,}" if card.episodes else "?",
            number(card.size_gib),
            _action(card),
            str(len(card.defects)),
            mod_kinds(card.mods),
        )
        for card in cards
    ]
    return "\n".join(
        [
            table(header, rows),
            f"{count(len(rows), 'dataset')}; cameras: outside views + wrist; episodes, GiB: of all splits; "
            "mods: what a mix had better ask for",
            "next: oxe-mix datasets NAME for all that is known of one; oxe-mix mix check MIX for a mix",
        ]
    )


def card_text(card: Card) -> str:
    """One card in full."""
    lines = [f"{card.name} {card.version}", *_labelled(_facts(card))]
    if card.corrected:
        lines += ["", "corrected recipe, for a mix that says recipe: corrected"]
        lines += [*_wrapped(card.corrected.differs), *_wrapped(f"source: {card.corrected.source}", "    ")]
        lines += _labelled(_recipe(card.corrected))
    lines += ["", "notes" if card.notes else "notes: none"]
    lines += [line for note in card.notes for line in _wrapped(note)]
    lines += ["", f"known defects ({len(card.defects)})" if card.defects else "known defects: none"]
    for defect in card.defects:
        lines += [*_wrapped(defect.what), *_wrapped(f"source: {defect.source}", "    ")]
    mods = f", mods: [{', '.join(map(mod_text, card.mods))}]" if card.mods else ""
    return "\n".join(
        [
            *lines,
            "",
            "next: in a mix, under datasets:",
            f"- {{name: {card.name}, version: {card.version}, fraction: 0.1{mods}}}",
        ]
    )


def mod_text(mod: Mod) -> str:
    """A mod as a mix writes it."""
    match mod:
        case FlipChannels():
            return f"{{flip_channels: [{', '.join(mod.flip_channels)}]}}"
        case Resize():
            return f"{{resize: {mod.resize}}}"
        case _:
            return mod


def mod_kinds(mods: Sequence[Mod]) -> str:
    """Mods in a word each, for a table: a flip's cameras have no place in a line."""
    kinds = (
        "resize" if isinstance(mod, Resize) else "filter" if mod == "filter_success" else "flip"
        for mod in mods
    )
    return "+".join(dict.fromkeys(kinds)) or "-"


def number(value: float | None) -> str:
    """A figure in few digits: 780, 7.12, 0.05, or ? where it is not known."""
    if value is None:
        return "?"
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value >= 1 else f"{value:.2g}" if value >= 0.01 else f"{value:.1g}"


def _facts(card: Card) -> Iterator[tuple[str, Sequence[str]]]:
    yield "lies in", [_location(card)]
    if card.aliases:
        yield "also called", [", ".join(card.aliases)]
    yield "robot", [f"{card.robot}, {number(card.control_hz)} Hz"]
    yield "license", [card.license]
    splits = ", ".join(f"{split} {episodes:,}" for split, episodes in card.episodes.items())
    yield "episodes", [splits or "unknown"]
    yield "size", [f"{number(card.size_gib)} GiB" if card.size_gib else "unknown"]
    yield "cameras", [_by_role(card.cameras.model_dump())]
    if any(card.depth.model_dump().values()):
        yield "depth", [_by_role(card.depth.model_dump())]
    yield from _recipe(card)
    raw = [str(i) for i, scaled in enumerate(card.normalise_mask) if not scaled]
    yield "normalised", [f"every column but {', '.join(raw)}" if raw else "every column"]
    yield "language", [f"{'/'.join(card.language.key)}, {card.language.decode}"]
    yield "mods advised", [", ".join(map(mod_text, card.mods)) or "none"]


def _recipe(part: Card | Corrected) -> Iterator[tuple[str, Sequence[str]]]:
    """State and action of a card, or what its corrected recipe puts in their place."""
    if part.state:
        yield "state", [part.state.encoding, *map(_term, part.state.parts)]
    if part.action:
        action = part.action
        kind = f", {part.action_kind}" if part.action_kind else ""
        yield "action", [f"{action.encoding}, {action.dims} columns{kind}", *map(_term, action.recipe)]
        if action.units:
            yield "units", [", ".join(action.units)]
        idle = ["idle steps (drop_zero)"] if action.drop_zero else []
        if dropped := [*action.trajectory_before, *action.trajectory_after, *idle]:
            yield "steps lost", [", ".join(dropped)]
    elif part.action_kind:
        yield "action", [f"the same columns, {part.action_kind}"]


def _labelled(facts: Iterator[tuple[str, Sequence[str]]]) -> list[str]:
    return [
        f"  {label if i == 0 else '':{_LABEL}}{value}"
        for label, values in facts
        for i, value in enumerate(values)
    ]


def _location(card: Card) -> str:
    if not card.public:
        return "no public copy is known; a mix has to name one (source: ...)"
    if card.source is None:
        return f"{OPEN_X_BUCKET}/{card.name}/{card.version}"
    return f"{card.source}, as {' or '.join(card.names)}"


def _by_role(cameras: dict[str, str | None]) -> str:
    return ", ".join(f"{role} {name}" for role, name in cameras.items() if name) or "none"


def _term(term: Term) -> str:
    if isinstance(term, FillTerm):
        return f"- {term.fill:g} in {count(term.dims, 'column')}"
    return "- " + ", ".join(["/".join(term.key), *map(_op, term.ops)])


def _op(op: OpName | Slice) -> str:
    if not isinstance(op, Slice):
        return op
    start, end = op.slice
    return f"[{start}:{'' if end is None else end}]"


def _cameras(card: Card) -> str:
    outside = sum(1 for name in (card.cameras.primary, card.cameras.secondary) if name)
    return "+".join(part for part in (str(outside or ""), "wrist" if card.cameras.wrist else "") if part)


def _action(card: Card) -> str:
    action = card.action
    kind = "abs." if card.action_kind == "absolute" else card.action_kind
    return f"{_ENCODINGS.get(action.encoding, action.encoding)} {action.dims} {kind}"


def _wrapped(text: str, indent: str = "- ") -> list[str]:
    return textwrap.wrap(
        text, _WIDTH, initial_indent=indent, subsequent_indent=" " * len(indent), break_on_hyphens=False
    )


def _json(value: Any) -> str:
    return json.dumps(value, indent=2)
