"""What a dataset's card says, in rows."""

from __future__ import annotations

from oxe_mix.cards import Card, Recipe
from oxe_mix.text import count
from train_llava.dimensions import is_arm
from train_llava.report.values import CardFacts, Motion, Row


def card_facts(card: Card, recipe: Recipe) -> CardFacts:
    """The card of a dataset that was read by this recipe of it."""
    own = card.with_recipe(recipe)
    named = {role: name for role, name in card.cameras.model_dump().items() if name}
    rows = {
        "Robot": card.robot,
        "Version": card.version,
        "Also called": ", ".join(card.aliases),
        "Control rate": "unknown" if card.control_hz is None else f"{card.control_hz:g} Hz",
        "Cameras": ", ".join(f"{role}: {name}" for role, name in named.items()),
        "Action": f"{own.action.encoding}, {count(own.action.dims, 'dimension')}, {own.action_kind}",
        "Recipe": recipe,
        "State": own.state.encoding,
        "Advised mods": ", ".join(map(str, card.mods)),
        "Licence": card.license,
        "Episodes published": ", ".join(f"{split} {num:,}" for split, num in card.episodes.items()),
        "Size published": "" if card.size_gib is None else f"{card.size_gib:,.1f} GiB",
    }
    differs = []
    if card.corrected is not None:
        used = "used here" if recipe == "corrected" else "not used here"
        differs = [(f"a corrected recipe ({used}): {card.corrected.differs}", card.corrected.source)]
    return CardFacts(
        rows=tuple(Row(label, value) for label, value in rows.items() if value),
        notes=card.notes,
        defects=(*differs, *((defect.what, defect.source) for defect in card.defects)),
    )


def motion_of(card: Card | None, width: int) -> Motion:
    """What an arrow of one of its actions would be."""
    if card is None or not is_arm(card, width):
        return "none"
    return "delta" if card.action_kind == "delta" else "change"
