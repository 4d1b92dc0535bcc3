"""A mix: which datasets, how much of each, and how often training draws from them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from oxe_mix.cards import Cards, Recipe
from oxe_mix.errors import UserError, did_you_mean
from oxe_mix.mods import Mod
from oxe_mix.rlds import SAFE_NAME
from oxe_mix.yaml_files import load_yaml

# The shipped mixes stand beside the packages in a checkout; a bare name is looked up there.
MIXTURES = Path(__file__).parent.parent / "mixtures"
OPEN_X_BUCKET = "gs://gresearch/robotics"


def _no_flag(value: Any) -> Any:
    """Pydantic takes true for 1."""
    if isinstance(value, bool):
        raise ValueError(f"{str(value).lower()} is no number")
    return value


def _no_number(value: Any) -> Any:
    if isinstance(value, (int, float)):
        raise ValueError(f'{value} is no text in YAML; quote it: "{value}"')
    return value


def _an_address(value: str) -> str:
    try:
        urlsplit(value)
    except ValueError as error:
        raise ValueError(f"{value}: is no address ({error})") from error
    return value


Number = Annotated[float, BeforeValidator(_no_flag)]
Gigabytes = Annotated[Number, Field(gt=0, allow_inf_nan=False)]
Word = Annotated[str, BeforeValidator(_no_number)]
Address = Annotated[str, AfterValidator(_an_address)]
# One address, or several copies of the same data, tried in this order.
Sources = Address | Annotated[tuple[Address, ...], Field(min_length=1)]


class DatasetSpec(BaseModel):
    """One split of one dataset: an exact RLDS build, the share of it to keep and its weight in training."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: Word
    version: Word  # exact, "0.1.0": with "latest", one mix would give two different downloads
    split: Word = "train"
    fraction: Number  # share of the split's episodes (not shards, bytes or steps), at least one episode
    # P(dataset) in training is proportional to weight x its written samples; 1 everywhere is one pass over
    # all of them.
    weight: Annotated[Number, Field(gt=0, allow_inf_nan=False)] = 1.0
    source: Sources | None = None  # where this dataset lies, when not in the mix's source
    max_gb: Gigabytes | None = None  # scales the fraction down to at most this, in 10^9 bytes
    mods: tuple[Mod, ...] = ()  # what is changed in its records, in this order
    recipe: Recipe = "openvla"  # or its card's corrected one; the records on disk are the same

    @field_validator("name", "version", "split")
    @classmethod
    def _is_a_name(cls, value: str) -> str:
        if not SAFE_NAME.fullmatch(value):
            raise ValueError(f"{value!r} is no name for a folder; only letters, digits, '-', '_' and '.'")
        return value

    @field_validator("fraction")
    @classmethod
    def _is_a_share(cls, value: float) -> float:
        if not 0 < value <= 1:
            hint = f"; write {value:g} percent as {value / 100:g}" if 1 < value <= 100 else ""
            raise ValueError(f"{value:g} is not in (0, 1]{hint}")
        return value


# What belongs to a dataset rather than to one of its splits.
_SHARED = ("version", "weight", "source", "mods", "recipe")


class Mix(BaseModel):
    """What `oxe-mix download` fetches and `oxe-mix convert` weighs."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: Word
    seed: Annotated[int, BeforeValidator(_no_flag)] = 0
    source: Sources = OPEN_X_BUCKET
    max_gb: Gigabytes | None = None  # scales all fractions down, so that the whole is at most this
    datasets: tuple[DatasetSpec, ...]

    @model_validator(mode="after")
    def _each_once(self) -> Mix:
        if not self.datasets:
            raise ValueError("names no dataset")
        seen = [(spec.name, spec.split) for spec in self.datasets]
        twice = next((pair for pair in seen if seen.count(pair) > 1), None)
        if twice:
            raise ValueError(
                f"{twice[0]}, split {twice[1]}, stands here twice; add the fractions or weights up"
            )
        first: dict[str, DatasetSpec] = {}
        for spec in self.datasets:
            one = first.setdefault(spec.name, spec)
            for key in _SHARED:
                if getattr(one, key) != getattr(spec, key):
                    raise ValueError(f"the splits of {spec.name} differ in {key}; they share one")
        return self

    def with_source(self, source: Sources) -> Mix:
        """The same mix read from other places, whatever each dataset says.

        Raises: UserError for what is no address.
        """
        for one in (source,) if isinstance(source, str) else source:
            try:
                _an_address(one)
            except ValueError as error:
                raise UserError(f"--source {error}") from error
        datasets = tuple(spec.model_copy(update={"source": None}) for spec in self.datasets)
        return self.model_copy(update={"source": source, "datasets": datasets})

    def sources_of(self, spec: DatasetSpec) -> tuple[str, ...]:
        """Where a dataset of this mix is read from, in the order in which the copies are tried."""
        sources = spec.source or self.source
        return tuple(source.rstrip("/") for source in ((sources,) if isinstance(sources, str) else sources))


def load_mix(mix: Path, cards: Cards) -> Mix:
    """Read a mix file; a bare file name that is not in the working folder is looked up in mixtures/.

    Raises: UserError, one line per problem, for a file that is missing or does not say a valid mix.
    """
    file = find_mix(mix)
    raw = load_yaml(file)
    if not isinstance(raw, dict):
        raise UserError(f"{file}: a mix is a mapping with name and datasets")
    try:
        return _with_card_names(Mix.model_validate(raw), cards, file)
    except ValidationError as error:
        raise UserError("\n".join(f"{file}: {problem}" for problem in _problems(error, raw))) from error


def find_mix(mix: Path) -> Path:
    """The file that `--mix` means."""
    if mix.exists() or mix.parent != Path():
        return mix
    shipped = MIXTURES / mix.with_suffix(".yaml")
    if not shipped.exists():
        known = sorted(path.stem for path in MIXTURES.glob("*.yaml"))  # all endings are alike
        raise UserError(f"{mix}: no such file here or in mixtures/{did_you_mean(mix.stem, known)}")
    return shipped


def _with_card_names(mix: Mix, cards: Cards, file: Path) -> Mix:
    """Every name becomes its card's name, so that an alias and the name are one dataset everywhere after
    this.
    """
    specs = []
    for i, spec in enumerate(mix.datasets):
        try:
            card = cards.get(spec.name)
        except UserError as error:
            raise UserError(f"{file}: datasets.{i}.name: {error}") from error
        # A card's own address stands for a dataset that the Open-X bucket does not hold; another bucket may
        # hold it.
        elsewhere = card.source if mix.source == OPEN_X_BUCKET else None
        specs.append(spec.model_copy(update={"name": card.name, "source": spec.source or elsewhere}))
    return Mix.model_validate({**mix.model_dump(), "datasets": [spec.model_dump() for spec in specs]})


def _problems(error: ValidationError, raw: Any) -> list[str]:
    known = {**Mix.model_fields, **DatasetSpec.model_fields}
    by_place: dict[str, str] = {}
    for problem in error.errors():
        # Of several branches of a union that refuse one place, the first says enough.
        by_place.setdefault(_place(problem["loc"], raw) or "mix", _in_our_words(problem, known))
    # A place inside it says more than the branch that would have it be something else as a whole.
    inner = [place for place in by_place if not any(other.startswith(f"{place}.") for other in by_place)]
    return [f"{place}: {by_place[place]}" for place in inner]


def _place(loc: tuple[str | int, ...], raw: Any) -> str:
    """Where in the file: pydantic also names the branches of its unions, which the file does not have."""
    parts = []
    for i, part in enumerate(loc):
        try:
            raw = raw[part]
        except (KeyError, IndexError, TypeError):
            if i < len(loc) - 1 or not isinstance(raw, dict):
                continue
        parts.append(str(part))
    return ".".join(parts)


def _in_our_words(problem: Any, known: dict[str, Any]) -> str:
    match problem["type"]:
        case "extra_forbidden":
            return f"unknown key{did_you_mean(str(problem['loc'][-1]), list(known))}"
        case "missing":
            return "missing"
        case "tuple_type":
            return "expected a list, one `- ` line each"
        case "model_type":
            return "expected names with values, as in {name: kuka, version: 0.1.0, fraction: 0.1}"
        case _:
            return str(problem["msg"]).removeprefix("Value error, ")
