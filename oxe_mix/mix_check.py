"""`oxe-mix mix check`: what can be known of a mix before anything is fetched. It reads no network."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path

from oxe_mix.card_check import check_fits
from oxe_mix.cards import Card, Cards, Recipe, load_cards
from oxe_mix.catalog import mod_kinds, mod_text, number
from oxe_mix.errors import UserError
from oxe_mix.mix import OPEN_X_BUCKET, DatasetSpec, Mix, find_mix, load_mix
from oxe_mix.mods import Mod, Resize
from oxe_mix.record_mods import resolve
from oxe_mix.selection import num_kept
from oxe_mix.text import count, say, table
from oxe_mix.trees import shipped_tree


@dataclass(frozen=True, slots=True)
class Share:
    """What a mix asks of one split, by the card's figures; None where the card has none."""

    name: str
    version: str
    split: str
    fraction: float
    weight: float
    episodes: int | None  # before mods
    gib: float | None
    mods: tuple[Mod, ...]
    defects: int
    recipe: Recipe


@dataclass(frozen=True, slots=True)
class MixReport:
    """A checked mix: what it asks for, and what its writer may not have meant."""

    mix: str
    file: str
    shares: tuple[Share, ...]
    warnings: tuple[str, ...]


def run_mix_check(mix: Path, cards_folder: Path | None, as_json: bool) -> int:
    """Check a mix and print what it asks for; returns the exit code, 0 in spite of warnings.

    Raises: UserError for a mix that does not load, or whose cards or mods do not fit the shipped trees.
    """
    cards = load_cards(cards_folder)
    report = check_mix(load_mix(mix, cards), cards, find_mix(mix))
    say(report_json(report) if as_json else report_text(report))
    return 0


def check_mix(mix: Mix, cards: Cards, file: Path) -> MixReport:
    """Hold a mix, read from `file`, against its cards and their shipped trees.

    Raises: UserError, a line for each dataset whose card or mods do not fit.
    """
    misfits = [
        line for i, spec in enumerate(mix.datasets) for line in _misfits(spec, cards, f"{file}: datasets.{i}")
    ]
    if misfits:
        raise UserError("\n".join(misfits))
    shares = tuple(_share(spec, cards.get(spec.name)) for spec in mix.datasets)
    # The splits of a dataset share version, source and mods: one line for them all.
    one_each = {spec.name: spec for spec in mix.datasets}.values()
    doubts = [line for spec in one_each for line in _doubts(mix, spec, cards.get(spec.name))]
    return MixReport(mix.name, str(file), shares, (*doubts, *_widths(mix, cards), *_budgets(mix)))


def report_text(report: MixReport) -> str:
    """The report as people read it: a table, the warnings, what to type next."""
    header = ("dataset", "version", "split", "fraction", "weight", "episodes", "GiB", "defects", "mods")
    rows = [
        (
            share.name,
            share.version,
            share.split,
            f"{share.fraction:g}",
            f"{share.weight:g}",
            "?" if share.episodes is None else f"{share.episodes:,}",
            number(share.gib),
            str(share.defects),
            mod_kinds(share.mods),
        )
        for share in report.shares
    ]
    return "\n".join(
        [
            table(header, rows),
            _totals(report.shares),
            *_corrected(report.shares),
            *(f"warning: {line}" for line in report.warnings),
            f"{report.file}: sound, {count(len(report.warnings), 'warning')}",
            f"next: oxe-mix download --mix {shlex.quote(str(report.file))} --dry-run",
        ]
    )


def report_json(report: MixReport) -> str:
    """The report for programs."""
    raw = asdict(report)
    for share, written in zip(report.shares, raw["shares"], strict=True):
        written["mods"] = [mod_text(mod) for mod in share.mods]
    return json.dumps(raw, indent=2)


def _misfits(spec: DatasetSpec, cards: Cards, where: str) -> list[str]:
    """What a card says against the recipe that a mix asks for, and a shipped tree against card and mods."""
    card = cards.get(spec.name)
    tree = shipped_tree(card.tree or card.name)
    lines = []
    try:
        card.with_recipe(spec.recipe)
    except UserError as error:
        lines.append(f"{where}.recipe: {error}")
    if tree is None:
        return lines
    try:
        check_fits(card, cards.file_of(card), tree, f"shipped feature tree of {card.tree or card.name}")
    except UserError as error:
        lines.append(str(error))
    try:
        resolve(spec.mods, tree, f"{where}.mods: {card.name}")
    except UserError as error:
        lines.append(str(error))
    return lines


def _share(spec: DatasetSpec, card: Card) -> Share:
    known = card.episodes.get(spec.split)
    kept = None if known is None else num_kept(known, spec.fraction)
    # A card's size is of all splits.
    part = spec.fraction if kept is None else kept / sum(card.episodes.values())
    return Share(
        name=spec.name,
        version=spec.version,
        split=spec.split,
        fraction=spec.fraction,
        weight=spec.weight,
        episodes=kept,
        gib=None if card.size_gib is None else card.size_gib * part,
        mods=spec.mods,
        defects=len(card.defects),
        recipe=spec.recipe,
    )


def _doubts(mix: Mix, spec: DatasetSpec, card: Card) -> list[str]:
    lines = []
    left_out = [mod_text(mod) for mod in card.mods if mod not in spec.mods]
    # A resize is taste; a flip or a filter mends something, and harms where nothing is broken.
    unasked = [mod_text(mod) for mod in spec.mods if mod not in card.mods and not isinstance(mod, Resize)]
    if left_out:
        lines.append(f"{spec.name}: its card advises {', '.join(left_out)}; the mix leaves that out")
    if unasked:
        lines.append(f"{spec.name}: {', '.join(unasked)} is in the mix, but its card does not advise it")
    if spec.version != card.version:
        lines.append(f"{spec.name}: its card describes {card.version}, the mix asks for {spec.version}")
    if not card.public and spec.source is None and mix.source == OPEN_X_BUCKET:
        lines.append(f"{spec.name}: no public copy is known; name yours with source: or --source")
    if shipped_tree(card.tree or card.name) is None:
        lines.append(f"{spec.name}: no feature tree is shipped; card and mods are checked at download")
    return lines


def _widths(mix: Mix, cards: Cards) -> list[str]:
    by_width: dict[int, list[str]] = {}
    for name in dict.fromkeys(spec.name for spec in mix.datasets):
        by_width.setdefault(cards.get(name).action.dims, []).append(name)
    if len(by_width) == 1:
        return []
    # The most common width goes without saying.
    usual = max(by_width, key=lambda width: len(by_width[width]))
    others = [f"{width} in {', '.join(names)}" for width, names in by_width.items() if width != usual]
    return [f"actions are not of one width: {'; '.join(others)}; {usual} in all others"]


def _budgets(mix: Mix) -> list[str]:
    if mix.max_gb is None and all(spec.max_gb is None for spec in mix.datasets):
        return []
    return ["max_gb may scale fractions down at download; the figures here are before that"]


def _corrected(shares: tuple[Share, ...]) -> list[str]:
    names = dict.fromkeys(share.name for share in shares if share.recipe == "corrected")
    return [f"corrected recipe: {', '.join(names)}"] if names else []


def _totals(shares: tuple[Share, ...]) -> str:
    episodes = [share.episodes for share in shares if share.episodes is not None]
    sizes = [share.gib for share in shares if share.gib is not None]
    missing = [
        f"{what} of {len(shares) - len(known)}"
        for what, known in (("episodes", episodes), ("size", sizes))
        if len(known) < len(shares)
    ]
    return (
        f"about {sum(episodes):,} episodes, {number(sum(sizes))} GiB, by the cards' figures and before mods"
        + (f"; unknown, so not counted: {', '.join(missing)}" if missing else "")
    )
