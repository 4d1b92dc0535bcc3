"""Dataset cards: one YAML file per dataset says where it lies and what its numbers mean. Nothing of it is in
code.

A card is checked twice: its form when it is read, its keys and widths against the dataset's own features.json
when that is at hand. Both kinds of fault are reported with the card's file and line.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator

from oxe_mix.errors import UserError, did_you_mean
from oxe_mix.mods import Mod
from oxe_mix.rlds import SAFE_NAME, Key
from oxe_mix.yaml_files import Loc, line_of, load_yaml

SHIPPED = Path(__file__).parent / "cards"

# The closed vocabulary; `convert/ops.py` says what each op does, in NumPy.
OpName = Literal[
    "cast_float",
    "clip01",
    "invert",
    "binarize",
    "rel2abs",
    "wxyz_to_xyzw",
    "quat_to_euler",
    "next_state_delta",
    "previous_delta",
    "wrap_angle",
    "inflate_zlib_f32",
]
# A difference has no value at one end of the episode; that step has to be dropped after the recipe.
_NEEDS = {"next_state_delta": "drop_last_step", "previous_delta": "drop_first_step"}
# Where OpenVLA's recipe of a dataset is known to be wrong, a mix may ask for the corrected one.
Recipe = Literal["openvla", "corrected"]
ActionKind = Literal["delta", "absolute"]
LanguageDecode = Literal["utf8", "int32_codepoints"]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Slice(_Strict):
    """Columns a to b - 1 of the last axis, with the usual negative indices; b null means to the end."""

    slice: tuple[int, int | None]


class KeyTerm(_Strict):
    """Columns read from one feature of a step, ops applied left to right."""

    key: Key = Field(min_length=1)
    ops: tuple[OpName | Slice, ...] = ()


class FillTerm(_Strict):
    """A constant block of `dims` columns."""

    fill: float
    dims: int = Field(gt=0)


Term = KeyTerm | FillTerm


class Cameras(_Strict):
    """Feature names below `observation`, null where the dataset has no such camera."""

    primary: str | None = None
    secondary: str | None = None
    wrist: str | None = None


class State(_Strict):
    """The robot's own state vector, joined on the last axis."""

    encoding: str
    parts: tuple[Term, ...] = ()


class DropZero(_Strict):
    """Which steps are idle: those whose six movements, scaled by these fixed quantiles, are all at zero."""

    q01: tuple[FiniteFloat, ...] = Field(min_length=6, max_length=6)
    q99: tuple[FiniteFloat, ...] = Field(min_length=6, max_length=6)


class Action(_Strict):
    """The recipe that turns recorded steps into the action vector, gripper last (1 open, 0 closed)."""

    encoding: str
    dims: int = Field(gt=0)
    recipe: tuple[Term, ...]
    units: tuple[str, ...] | None = None  # of each column, for who reads the answers
    trajectory_before: tuple[Literal["drop_first_step"], ...] = ()
    trajectory_after: tuple[Literal["drop_first_step", "drop_last_step"], ...] = ()
    drop_zero: DropZero | None = None  # idle steps; none are dropped without it

    @model_validator(mode="after")
    def _ops_and_drops_agree(self) -> Action:
        ops = [op for term in self.recipe if isinstance(term, KeyTerm) for op in term.ops]
        for op, drop in _NEEDS.items():
            if op in ops and drop not in self.trajectory_after:
                end = drop.split("_")[1]
                raise ValueError(f"{op} has no value for the {end} step; add trajectory_after: [{drop}]")
        if self.units is not None and len(self.units) != self.dims:
            raise ValueError(f"units has {len(self.units)} entries, dims is {self.dims}")
        if self.drop_zero and self.dims < len(self.drop_zero.q01):
            raise ValueError(f"drop_zero is of six movements, dims is {self.dims}")
        return self


class Corrected(_Strict):
    """What stands in for OpenVLA's recipe where that is known to be wrong; what is left out stays."""

    differs: str
    source: str
    action: Action | None = None
    state: State | None = None
    action_kind: ActionKind | None = None

    @model_validator(mode="after")
    def _corrects_something(self) -> Corrected:
        if self.action is None and self.state is None and self.action_kind is None:
            raise ValueError("corrects nothing; give action, state or action_kind")
        return self


class Language(_Strict):
    """Where the instruction is and how its bytes become text."""

    key: Key
    decode: LanguageDecode


class Defect(_Strict):
    """Something known to be wrong with the data, and who says so."""

    what: str
    source: str


FolderName = Annotated[str, Field(pattern=f"^{SAFE_NAME.pattern}$")]


class Card(_Strict):
    """All that is known of one dataset."""

    name: FolderName
    aliases: tuple[FolderName, ...] = ()
    version: FolderName
    source: str | None = None  # only where it is not in the mix's bucket
    public: bool = True  # false: no public address is known, a mix has to name a copy
    tree: FolderName | None = None  # its shipped feature tree, where that is not called as the card is
    robot: str
    control_hz: float | None  # null: unknown
    license: str  # of the data; "unknown" where no source states it
    episodes: dict[str, int] = {}  # per split, as the catalog lists them
    size_gib: float | None = None
    steps: int | None = None  # of all splits together, where someone counted them
    cameras: Cameras
    depth: Cameras = Cameras()
    state: State
    action: Action
    action_kind: ActionKind  # decides what stands past an episode's end when answers are chunks
    corrected: Corrected | None = None
    language: Language
    normalise_mask: tuple[bool, ...]
    mods: tuple[Mod, ...] = ()  # advice: applied only when a mix asks for them
    notes: tuple[str, ...] = ()
    defects: tuple[Defect, ...] = ()

    @model_validator(mode="after")
    def _mask_covers_action(self) -> Card:
        if len(self.normalise_mask) != self.action.dims:
            raise ValueError(
                f"normalise_mask has {len(self.normalise_mask)} entries, action.dims is {self.action.dims}"
            )
        own = self.corrected.action if self.corrected else None
        if own and own.dims != self.action.dims:
            raise ValueError(f"corrected.action.dims is {own.dims}, action.dims is {self.action.dims}")
        return self

    def with_recipe(self, recipe: Recipe) -> Card:
        """The card with the recipe that a mix asks for.

        Raises: UserError when it asks for a corrected one and there is none.
        """
        if recipe == "openvla":
            return self
        if self.corrected is None:
            raise UserError(f"card {self.name}: has no corrected recipe; drop `recipe: corrected`")
        parts = {key: getattr(self.corrected, key) for key in ("action", "state", "action_kind")}
        return self.model_copy(update={key: part for key, part in parts.items() if part is not None})

    @property
    def names(self) -> tuple[str, ...]:
        """The card's name and its aliases: what a folder of this dataset may be called."""
        return (self.name, *self.aliases)

    @property
    def camera_key(self) -> Key:
        """The camera of single-camera data: the primary one, else the wrist; never an invented frame."""
        name = self.cameras.primary or self.cameras.wrist
        if name is None:
            raise UserError(f"card {self.name}: neither a primary nor a wrist camera")
        return ("observation", name)


class Cards:
    """Cards by name and alias."""

    def __init__(self, cards: list[Card], files: dict[str, Path]) -> None:
        self._any_name = {name: card for card in cards for name in card.names}
        self._files = files

    def __iter__(self) -> Iterator[Card]:
        """Every card once, by name."""
        one_each = {card.name: card for card in self._any_name.values()}
        return iter(sorted(one_each.values(), key=lambda card: card.name))

    def get(self, name: str) -> Card:
        """The card of a dataset, by its name or an alias.

        Raises: UserError with the closest known name.
        """
        if name not in self._any_name:
            raise UserError(f"no dataset called {name!r}{did_you_mean(name, list(self._any_name))}")
        return self._any_name[name]

    def find(self, name: str) -> Card | None:
        """The card of a dataset, or None."""
        return self._any_name.get(name)

    def file_of(self, card: Card) -> Path:
        """The file that a card was read from."""
        return self._files[card.name]


def load_cards(extra: Path | None = None) -> Cards:
    """The shipped cards and those in the folder `extra`, which win over shipped ones of the same name."""
    files = sorted(SHIPPED.glob("*.yaml"))
    if extra is not None:
        if not extra.is_dir():
            raise UserError(f"{extra}: no such folder of cards")
        files += sorted(extra.glob("*.yaml"))
    cards: dict[str, Card] = {}
    origin: dict[str, Path] = {}
    for file in files:
        card = load_card(file)
        cards[card.name], origin[card.name] = card, file
    return Cards(list(cards.values()), origin)


@functools.cache
def load_card(file: Path) -> Card:
    """Read one card.

    Raises: UserError with file and line for the first thing that is wrong.
    """
    raw = load_yaml(file)
    try:
        card = Card.model_validate(raw)
    except ValidationError as error:
        loc, text = _readable(error)
        raise UserError(f"{file}:{line_of(file, loc)}: {'.'.join(map(str, loc))}: {text}") from error
    if card.name != file.stem:
        raise UserError(
            f"{file}:{line_of(file, ('name',))}: the file is {file.stem}.yaml but name is {card.name}"
        )
    return card


def _readable(error: ValidationError) -> tuple[Loc, str]:
    """The first problem of a validation error: its place in the file, and what is wrong in our words."""
    # The deepest place says most; a misspelt key shows as unknown and as missing, and the first has the line.
    first = min(error.errors(), key=lambda problem: (problem["type"] == "missing", -len(problem["loc"])))
    # The names of union branches ("KeyTerm", "Slice") are no part of the file.
    loc = tuple(
        part
        for part in first["loc"]
        if not (isinstance(part, str) and part[:1].isupper()) and "[" not in str(part)
    )
    match first["type"]:
        case "literal_error":
            text = f"{first['input']!r} is unknown; allowed: {first['ctx']['expected']}"
        case "extra_forbidden":
            text = "unknown key"
        case "missing":
            text = "missing"
        case _:
            text = first["msg"].removeprefix("Value error, ")
    return loc, text
