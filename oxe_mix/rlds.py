"""RLDS datasets on disk or in a bucket: dataset_info.json, features.json, shard names and records, as TFDS
lays them out.

Both JSON files are read here directly: TFDS would import classes by the names that features.json gives, and a
bucket's file must not decide what is imported.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from oxe_mix.errors import UserError
from oxe_mix.example import byte_values, find_features, float_values, integer_values, num_values

INFO_FILE = "dataset_info.json"
FEATURES_FILE = "features.json"
# Names become paths: letters, digits and -_. only, never a leading dot.
SAFE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*")
_DEFAULT_TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"

Key = tuple[str, ...]
# What JSON of another shape than expected comes to.
_MISSHAPEN = (AttributeError, KeyError, OverflowError, RecursionError, TypeError, ValueError)


@dataclass(frozen=True, slots=True)
class Split:
    """One split as dataset_info.json declares it: episodes per shard, and payload bytes of them all."""

    name: str
    shard_lengths: tuple[int, ...]
    num_bytes: int

    @property
    def num_episodes(self) -> int:
        """Episodes in the split."""
        return sum(self.shard_lengths)


@dataclass(frozen=True, slots=True)
class DatasetInfo:
    """What dataset_info.json says; `raw` is the file itself, so that what we do not know survives a
    rewrite.
    """

    name: str
    version: str
    splits: dict[str, Split]
    raw: dict[str, Any]

    def shard_file(self, split: str, index: int, num_shards: int) -> str:
        """The file name of one shard; the prefix is the name inside dataset_info.json, not the folder's."""
        return f"{self.name}-{split}.tfrecord-{index:05d}-of-{num_shards:05d}"

    def with_splits(self, splits: list[Split]) -> dict[str, Any]:
        """The JSON of this dataset with other splits, everything else as it was."""
        entries = [
            {
                "filepathTemplate": _DEFAULT_TEMPLATE,
                "name": split.name,
                "numBytes": str(split.num_bytes),
                "shardLengths": [str(length) for length in split.shard_lengths],
            }
            for split in splits
        ]
        return {**self.raw, "splits": entries}


def parse_dataset_info(text: str, where: str) -> DatasetInfo:
    """Parse dataset_info.json; `where` names the file in messages.

    Raises: UserError for broken JSON, unsafe names, another file format than TFRecord or another file naming.
    """
    try:
        raw = json.loads(text)
        name, version = raw["name"], raw["version"]
        splits = {entry["name"]: _split(entry) for entry in raw["splits"]}
        templates = {entry.get("filepathTemplate", _DEFAULT_TEMPLATE) for entry in raw["splits"]}
    except _MISSHAPEN as error:
        raise UserError(
            f"{where}: not a dataset_info.json of TFDS ({type(error).__name__}: {error})"
        ) from error
    for word in (name, version, *splits):
        if not isinstance(word, str) or not SAFE_NAME.fullmatch(word):
            raise UserError(
                f"{where}: {word!r} is no name for a file; only letters, digits, '-', '_' and '.'"
            )
    if raw.get("fileFormat", "tfrecord") != "tfrecord":
        raise UserError(f"{where}: file format {raw['fileFormat']}; only tfrecord is supported")
    if templates - {_DEFAULT_TEMPLATE}:
        raise UserError(f"{where}: files are named {templates}; only {_DEFAULT_TEMPLATE} is supported")
    return DatasetInfo(name, version, splits, raw)


def _split(entry: dict[str, Any]) -> Split:
    lengths = entry.get("shardLengths", [])
    if not isinstance(lengths, list):
        raise TypeError(f"shardLengths is {lengths!r}, no list")
    split = Split(entry["name"], tuple(map(int, lengths)), int(entry.get("numBytes", 0)))
    if min((split.num_bytes, *split.shard_lengths)) < 0:
        raise ValueError(f"split {split.name!r} has a negative length")
    return split


@dataclass(frozen=True, slots=True)
class Feature:
    """One leaf of the feature tree: kind is image, text or tensor; dtype as NumPy names it, 'string' for
    bytes.
    """

    kind: str
    shape: tuple[int | None, ...]
    dtype: str
    encoding: str

    @property
    def width(self) -> int | None:
        """Columns per step when stacked to (T, d): a scalar counts as one; None when it is no vector of
        numbers.
        """
        if self.kind != "tensor" or self.dtype == "string" or len(self.shape) > 1:
            return None
        return self.shape[0] if self.shape else 1


@dataclass(frozen=True, slots=True)
class FeatureTree:
    """Leaves of features.json by key, the names from the top downwards; a name may itself contain a slash."""

    episode: dict[Key, Feature]
    step: dict[Key, Feature]


def parse_features(text: str, where: str) -> FeatureTree:
    """Parse features.json into the leaves of the episode and of its steps.

    Raises: UserError when it is broken or holds no dataset of steps, so is no RLDS.
    """
    try:
        top = _children(json.loads(text))
        steps = top.pop("steps")
        tree = FeatureTree(_leaves(top), _leaves(_children(steps["sequence"]["feature"])))
    except _MISSHAPEN as error:
        raise UserError(
            f"{where}: not the features.json of an RLDS dataset ({type(error).__name__}: {error})"
        ) from error
    return tree


def _children(node: dict[str, Any]) -> dict[str, Any]:
    # TFDS writes an empty FeaturesDict without its "features".
    return dict(node["featuresDict"].get("features", {}))


def _leaves(children: dict[str, Any], above: Key = ()) -> dict[Key, Feature]:
    leaves: dict[Key, Feature] = {}
    for name, node in children.items():
        key = (*above, name)
        if "featuresDict" in node:
            leaves |= _leaves(_children(node), key)
        else:
            leaves[key] = _leaf(node)
    return leaves


def _leaf(node: dict[str, Any]) -> Feature:
    if "image" in node:
        image = node["image"]
        dtype, encoding = image.get("dtype", "uint8"), image.get("encodingFormat", "png")
        return Feature("image", _shape(image), _word(dtype), _word(encoding))
    if "text" in node:
        return Feature("text", (), "string", "none")
    if "tensor" in node:
        tensor = node["tensor"]
        encoding = tensor.get("encoding", "none")
        return Feature("tensor", _shape(tensor), _word(tensor["dtype"]), _word(encoding))
    # Anything else (a nested sequence, a video) is kept by name: it matters only if a card asks for it.
    return Feature(node.get("pythonClassName", "unknown").rsplit(".", 1)[-1], (), "unknown", "none")


def _word(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no word")
    return value


def _shape(node: dict[str, Any]) -> tuple[int | None, ...]:
    sizes = (int(size) for size in node.get("shape", {}).get("dimensions", ()))
    return tuple(None if size < 0 else size for size in sizes)


class Episode:
    """The values of one record, by key; frames stay encoded. Arrays are stacked over the steps, [T, …]."""

    def __init__(self, payload: bytes, tree: FeatureTree) -> None:
        """Find the columns of a record's payload (a tf.train.Example).

        Raises: ValueError when it is no Example or its columns disagree on the number of steps.
        """
        self._tree = tree
        self._columns = find_features(payload)
        self._slices: dict[Key, list[memoryview]] = {}
        self.num_steps = self._count_steps()

    def array(self, key: Key) -> NDArray[Any]:
        """Numbers of a step feature, [T, *shape]: float32, or int64 for whole numbers and flags; tensors
        packed with zlib are unpacked.

        Raises: KeyError for a key that is not in the tree; ValueError when values are missing.
        """
        feature = self._tree.step[key]
        if feature.encoding == "zlib":
            import zlib

            try:
                unpacked = [zlib.decompress(value) for value in self.values(key)]
            except zlib.error as error:
                raise ValueError(f"{'/'.join(key)}: cannot be unpacked ({error})") from error
            flat = np.concatenate([np.frombuffer(one, feature.dtype) for one in unpacked])
        elif feature.dtype in ("float32", "float64", "float16", "bfloat16"):
            flat = float_values(self._column(key))
        else:
            flat = integer_values(self._column(key))
        return flat.reshape(self.num_steps, *(-1 if size is None else size for size in feature.shape))

    def values(self, key: Key) -> list[bytes]:
        """Byte strings of a step feature, one a step: texts, packed tensors, encoded frames.

        Raises: ValueError when there is not one for each step.
        """
        return [bytes(value) for value in self.slices(key)]

    def slices(self, key: Key) -> list[memoryview]:
        """The same without copying them: where they lie in the record.

        Raises: ValueError when there is not one for each step.
        """
        if key not in self._slices:
            self._slices[key] = byte_values(self._column(key))
        values = self._slices[key]
        if len(values) != self.num_steps:
            raise ValueError(f"{'/'.join(key)}: {len(values)} values for {self.num_steps} steps")
        return values

    def _column(self, key: Key) -> memoryview:
        name = "/".join(("steps", *key))
        if name not in self._columns:
            raise ValueError(f"the record has no {name}")
        return self._columns[name]

    def _count_steps(self) -> int:
        """Steps of the episode, taken from a feature that has exactly one value a step."""
        for key, feature in self._tree.step.items():
            if feature.dtype != "unknown" and feature.shape == () and feature.dtype != "string":
                return num_values(self._column(key))
            if feature.dtype != "unknown" and feature.kind in ("image", "text"):
                self._slices[key] = byte_values(self._column(key))
                return len(self._slices[key])
        raise ValueError("no feature with one value a step, so the number of steps is unknown")
