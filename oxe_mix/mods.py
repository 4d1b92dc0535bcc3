"""Mods: what a mix asks to be changed in the records of a dataset; `record_mods.py` applies them.

A mix names them, in its order; a card's `mods` are advice that nothing applies on its own.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag

FilterSuccess = Literal["filter_success"]
# The names that the published download lists use; which frames they mean is in `FLIPS`.
FlipName = Literal["flip_image_channels", "flip_wrist_image_channels"]
FLIPS: dict[FlipName, tuple[str, ...]] = {
    "flip_image_channels": ("image",),
    "flip_wrist_image_channels": ("wrist_image", "hand_image"),
}


class FlipChannels(BaseModel):
    """Reverse the colour channels of these cameras: for frames that were stored blue first."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    flip_channels: tuple[str, ...] = Field(min_length=1)  # feature names below `observation`


class Resize(BaseModel):
    """Shrink colour frames to a longer side of at most `resize` pixels: Lanczos, aspect kept, never
    enlarged.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    resize: int = Field(ge=16)


def _known(value: object) -> object:
    if value == "resize_and_jpeg_encode":
        raise ValueError(
            "resize_and_jpeg_encode would encode every frame anew and is not carried over; "
            "leave it out, or write {resize: 256} for smaller frames"
        )
    # Checked here, so that a misspelt mod is one complaint and not one for each kind of mod.
    name = next(iter(value)) if isinstance(value, dict) and len(value) == 1 else value
    known = _WITH_OPTIONS if isinstance(value, dict) else ("filter_success", *FLIPS)
    if not isinstance(value, BaseModel) and name not in known:
        raise ValueError(
            f"unknown mod {value!r}; there are filter_success, flip_image_channels, "
            "flip_wrist_image_channels, {flip_channels: [CAMERA, …]} and {resize: PIXELS}"
        )
    return value


def _kind(value: object) -> str:
    if isinstance(value, (dict, BaseModel)):
        return next(iter(value if isinstance(value, dict) else type(value).model_fields))
    return "name"


_WITH_OPTIONS = ("flip_channels", "resize")
Mod = Annotated[
    Annotated[FilterSuccess | FlipName, Tag("name")]
    | Annotated[FlipChannels, Tag("flip_channels")]
    | Annotated[Resize, Tag("resize")],
    Discriminator(_kind),
    BeforeValidator(_known),
]
