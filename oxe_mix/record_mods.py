"""The mods of a mix, applied to one record: an episode is kept or dropped, its frames are changed or not.

A record that no mod changes keeps its bytes, and so does a frame. Frames are decoded only where a channel
flip or a resize is due, and encoded once, as they came: JPEG at quality 95 with full chroma, or PNG.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import DecodeError

from oxe_mix.errors import UserError
from oxe_mix.images import FrameChange, reencode, shrunk
from oxe_mix.mods import FLIPS, FlipChannels, Mod, Resize
from oxe_mix.rlds import Feature, FeatureTree, Key
from oxe_mix.tf_example import Example

_SUCCESS: tuple[Key, ...] = (("success",), ("episode_metadata", "success"))


@dataclass(frozen=True, slots=True)
class FrameMod:
    """What happens to the frames of one feature."""

    column: str  # its name in the record
    flip: bool
    max_side: int | None


@dataclass(frozen=True, slots=True)
class RecordMods:
    """A mix's mods, resolved against a dataset's features; falsy when nothing is to be done."""

    success_column: str | None = None  # keep the episode only if this is true
    frames: tuple[FrameMod, ...] = ()

    def __bool__(self) -> bool:
        return self.success_column is not None or bool(self.frames)

    @property
    def filters(self) -> RecordMods:
        """Only what decides whether an episode is kept: enough where frames are not read."""
        return RecordMods(self.success_column)

    def apply(self, payload: bytes) -> bytes | None:
        """One record's payload after the mods; None when the episode is dropped.

        Raises: ValueError for a record without what a mod needs.
        """
        try:
            example = Example.FromString(payload)
        except DecodeError as error:
            raise ValueError("not a tf.train.Example") from error
        features = example.features.feature
        if self.success_column is not None:
            if self.success_column not in features:
                raise ValueError(f"the record has no {self.success_column}")
            if not any(features[self.success_column].int64_list.value):
                return None
        changes = [_change(features, mod) for mod in self.frames]
        if not any(changes):
            return payload
        changed: bytes = example.SerializeToString(deterministic=True)
        return changed


def resolve(mods: tuple[Mod, ...], tree: FeatureTree, where: str) -> RecordMods:
    """Find what the mods mean in a dataset whose features `where` describes.

    Raises: UserError for a mod whose feature is not there.
    """
    success, flips, max_side = None, dict[Key, bool](), None
    for mod in mods:
        if mod == "filter_success":
            success = next((key for key in _SUCCESS if _is_flag(tree.episode.get(key))), None)
            if success is None:
                raise UserError(f"{where}: mod filter_success: no flag called success in an episode")
        elif isinstance(mod, Resize):
            max_side = min(mod.resize, max_side or mod.resize)
        else:
            for key in _flipped(mod, tree, where):
                flips[key] = not flips.get(key, False)
    resized = [key for key, leaf in tree.step.items() if max_side and is_colour(key, leaf)]
    frames = tuple(
        FrameMod("/".join(("steps", *key)), flips.get(key, False), max_side if key in resized else None)
        for key in sorted({*resized, *(key for key, flip in flips.items() if flip)})
    )
    return RecordMods("/".join(success) if success else None, frames)


def is_colour(key: Key, leaf: Feature) -> bool:
    """Whether a feature is a camera's colour picture; depth and masks are not for Lanczos."""
    three = leaf.kind == "image" and leaf.dtype == "uint8" and leaf.shape[-1:] == (3,)
    return three and "depth" not in key[-1]


def resized_features(text: str, mods: tuple[Mod, ...]) -> str:
    """features.json of a dataset after the mods: a resized frame has another shape."""
    sides = [mod.resize for mod in mods if isinstance(mod, Resize)]
    if not sides:
        return text
    raw = json.loads(text)
    _resize_shapes(raw, min(sides), "")
    return json.dumps(raw, indent=4)


def _flipped(mod: Any, tree: FeatureTree, where: str) -> list[Key]:
    names = mod.flip_channels if isinstance(mod, FlipChannels) else FLIPS[mod]
    keys: list[Key] = [("observation", name) for name in names]
    there = [key for key in keys if key in tree.step and is_colour(key, tree.step[key])]
    # The published names each stand for several cameras, of which a dataset has at least one.
    missing = keys if not there else [key for key in keys if key not in there]
    if missing and (isinstance(mod, FlipChannels) or not there):
        what = "flip_channels" if isinstance(mod, FlipChannels) else mod
        raise UserError(f"{where}: mod {what}: no colour frames called {'/'.join(missing[0])}")
    return there


def _is_flag(leaf: Feature | None) -> bool:
    return leaf is not None and leaf.dtype == "bool" and leaf.shape == ()


def _change(features: Any, mod: FrameMod) -> bool:
    if mod.column not in features:
        raise ValueError(f"the record has no {mod.column}")
    values = features[mod.column].bytes_list.value
    changed = [_frame(value, mod) for value in values]
    if all(new is old for new, old in zip(changed, values, strict=True)):
        return False
    values[:] = changed
    return True


def _frame(encoded: bytes, mod: FrameMod) -> bytes:
    """One frame after a mod; the very same object when nothing changes."""
    try:
        return reencode(encoded, FrameChange(max_side=mod.max_side, flip=mod.flip))
    except ValueError as error:
        raise ValueError(f"{mod.column}: {error}") from error


def _resize_shapes(node: Any, max_side: int, name: str) -> None:
    """Walk features.json and shrink the shapes of colour frames in place."""
    if not isinstance(node, dict):
        return
    image = node.get("image")
    if isinstance(image, dict) and "depth" not in name and image.get("dtype", "uint8") == "uint8":
        sizes = [int(size) for size in image.get("shape", {}).get("dimensions", ())]
        if len(sizes) == 3 and sizes[2] == 3 and min(sizes[:2]) > 0:
            width, height = shrunk(sizes[1], sizes[0], max_side)
            image["shape"]["dimensions"] = [str(height), str(width), "3"]
    for key, child in node.items():
        if key == "features" and isinstance(child, dict):
            for feature, inner in child.items():
                _resize_shapes(inner, max_side, feature)
        else:
            _resize_shapes(child, max_side, name)
