"""Packed episodes as TFDS knows them: what features.json declares, and the record of an episode."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from oxe_mix.pack_card import FLAGS, OBSERVATION, Wanted
from oxe_mix.pack_csv import Columns
from oxe_mix.pack_frames import FrameFormat
from oxe_mix.pack_source import Recording
from oxe_mix.rlds import Key
from oxe_mix.tf_example import Example

_METADATA, _FILE_PATH = "episode_metadata", "file_path"


@dataclass(frozen=True, slots=True)
class Layout:
    """What every episode of a dataset has: its columns, and the format of each camera's frames."""

    wanted: Wanted
    columns: Columns
    formats: dict[str, FrameFormat]


def save_features(layout: Layout, folder: Path) -> None:
    """Write features.json into `folder`, as TFDS does."""
    import tensorflow_datasets as tfds

    features = tfds.features
    leaves: dict[Key, Any] = {layout.wanted.language: features.Text()}
    leaves |= {(flag,): features.Scalar(np.bool_) for flag in FLAGS}
    for key, names in layout.columns.vectors.items():
        leaves[key] = features.Tensor(shape=(len(names),), dtype=np.float32)
    for camera, form in layout.formats.items():
        shape = (form.height, form.width, form.channels)
        leaves[OBSERVATION, camera] = features.Image(
            shape=shape, dtype=np.dtype(form.dtype), encoding_format=form.encoding
        )
    steps = features.Dataset(_nested(leaves, features))
    metadata = features.FeaturesDict({_FILE_PATH: features.Text()})
    features.FeaturesDict({"steps": steps, _METADATA: metadata}).save_config(str(folder))


def _nested(leaves: dict[Key, Any], features: Any) -> Any:
    """Leaves by key as dictionaries in dictionaries."""
    below: dict[str, dict[Key, Any]] = {}
    for key, leaf in leaves.items():
        below.setdefault(key[0], {})[key[1:]] = leaf
    children = {name: own[()] if () in own else _nested(own, features) for name, own in below.items()}
    return features.FeaturesDict(children)


def record(recording: Recording, frames: Mapping[str, list[bytes]], name: str, language: Key) -> bytes:
    """One episode as a tf.train.Example, the same bytes for the same values.

    Args:
        recording: the numbers and texts of its steps.
        frames: by camera, [T] encoded; they go in as they are.
        name: of the episode, kept as `episode_metadata/file_path`.
        language: the key of the instruction.
    """
    example = Example()
    column, num_steps = example.features.feature, recording.steps.num_steps
    column[f"{_METADATA}/{_FILE_PATH}"].bytes_list.value.append(name.encode(errors="replace"))
    for key, vector in recording.steps.vectors.items():
        column[_column(key)].float_list.value.extend(vector.ravel().tolist())
    texts = [text.encode() for text in recording.instructions]
    column[_column(language)].bytes_list.value.extend(texts)
    for camera, images in frames.items():
        column[_column((OBSERVATION, camera))].bytes_list.value.extend(images)
    for flag in FLAGS:
        place = 0 if flag == "is_first" else num_steps - 1
        column[_column((flag,))].int64_list.value.extend(int(t == place) for t in range(num_steps))
    # Protobuf leaves the order of a map open; this fixes it.
    payload: bytes = example.SerializeToString(deterministic=True)
    return payload


def _column(key: Key) -> str:
    return "/".join(("steps", *key))
