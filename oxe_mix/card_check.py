"""Does a card fit a dataset's own features.json? Every key must be there, every width must come out."""

from __future__ import annotations

from pathlib import Path

from oxe_mix.cards import Action, Card, FillTerm, KeyTerm, OpName, Slice, State
from oxe_mix.errors import UserError
from oxe_mix.rlds import Feature, FeatureTree, Key
from oxe_mix.yaml_files import Loc, line_of


def check_fits(card: Card, file: Path, tree: FeatureTree, where: str) -> None:
    """Prove that a card, read from `file`, fits a dataset's own features.json, which messages call `where`.

    Raises: UserError with the card's file and line for a key that is not there or a width that does not come
    out.
    """
    misfit = _first_misfit(card, tree)
    if misfit:
        loc, text = misfit
        raise UserError(f"{file}:{line_of(file, loc)}: {text} ({where})")


def op_width(width: int, op: OpName | Slice) -> int:
    """Columns that an op makes of `width` columns.

    Raises: ValueError when the op does not take that many.
    """
    if isinstance(op, Slice):
        out = len(range(width)[slice(*op.slice)])
        if out == 0:
            raise ValueError(f"slice {list(op.slice)} of {width} columns is empty")
        return out
    if op in ("quat_to_euler", "wxyz_to_xyzw"):
        if width != 4:
            raise ValueError(f"{op} takes 4 columns, there are {width}")
        return 3 if op == "quat_to_euler" else 4
    if op in ("binarize", "rel2abs") and width != 1:
        raise ValueError(f"{op} takes one gripper column, there are {width}")
    return width


def _first_misfit(card: Card, tree: FeatureTree) -> tuple[Loc, str] | None:
    """Where and why a card does not fit a feature tree; None when it fits."""
    for group in ("cameras", "depth"):
        for role, name in getattr(card, group).model_dump().items():
            key = ("observation", name)
            if name is not None and (key not in tree.step or tree.step[key].kind not in ("image", "tensor")):
                return (group, role), f"no image feature {'/'.join(key)}"
    if card.language.key not in tree.step:
        return ("language", "key"), f"no feature {'/'.join(card.language.key)}"
    misfit = _misfit_of(card.action, card.state, tree, ())
    if misfit is None and card.corrected:
        ours = card.with_recipe("corrected")
        misfit = _misfit_of(ours.action, ours.state, tree, ("corrected",))
    return misfit


def _misfit_of(action: Action, state: State, tree: FeatureTree, at: Loc) -> tuple[Loc, str] | None:
    """The same of one recipe, which stands below `at` in the card."""
    total = 0
    for own, terms in ((("action", "recipe"), action.recipe), (("state", "parts"), state.parts)):
        for i, term in enumerate(terms):
            try:
                width = term.dims if isinstance(term, FillTerm) else _key_width(term, tree.step)
            except ValueError as error:
                return (*at, *own, i), str(error)
            total += width if own[0] == "action" else 0
    if total != action.dims:
        return (*at, "action", "dims"), f"the recipe comes to {total} columns, dims says {action.dims}"
    return None


def _key_width(term: KeyTerm, leaves: dict[Key, Feature]) -> int:
    name = "/".join(term.key)
    if term.key not in leaves:
        raise ValueError(f"no feature {name}")
    width = leaves[term.key].width
    if width is None:
        raise ValueError(f"{name} is no vector of numbers")
    for op in term.ops:
        width = op_width(width, op)
    return width
