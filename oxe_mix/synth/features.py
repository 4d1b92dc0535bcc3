"""A shipped feature tree as TFDS's own features, which write features.json and the records."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from oxe_mix.errors import UserError
from oxe_mix.tf_example import Example
from oxe_mix.trees import TREES

Node = dict[str, Any]


@cache
def feature_tree(name: str) -> Node:
    """The shipped tree of that name as it stands in its file.

    Raises: UserError where none is shipped.
    """
    file = TREES / f"{name}.json"
    if not file.exists():
        raise UserError(f"{name}: no feature tree is shipped, so it cannot be made; take it out of the mix")
    tree: Node = json.loads(file.read_text(encoding="utf-8"))
    return tree


@cache
def features(name: str) -> Any:
    """The tree as TFDS's FeaturesDict: what features.json declares."""
    return _tfds_feature(feature_tree(name), encoded=False)


def save_features(name: str, folder: Path) -> None:
    """Write the tree's features.json into `folder`, as TFDS does."""
    features(name).save_config(str(folder))


def serialize(name: str, example: Node) -> bytes:
    """One episode as the record that TFDS makes of it, the same bytes for the same values.

    Args:
        name: of the tree.
        example: values below the keys of the tree; frames encoded, float depth as the RGBA of its bytes.
    """
    payload = _encoded_features(name).serialize_example(example)
    # Protobuf leaves the order of a map open; this fixes it.
    fixed: bytes = Example.FromString(payload).SerializeToString(deterministic=True)
    return fixed


def blank(node: Node) -> Any:
    """Zeros, empty texts and False for everything below a node of a feature tree; frames are left to the
    caller.
    """
    match node["kind"]:
        case "dict":
            return {name: blank(child) for name, child in node["features"].items()}
        case "text":
            return ""
        case "scalar" | "tensor" if node["dtype"] == "string":
            return ""
        case "scalar" | "tensor":
            return np.zeros(node.get("shape", ()), node["dtype"])
        case _:
            return None


def image_encoding(node: Node) -> str:
    """`png` or `jpeg`: an encoding that no source states is taken for JPEG, which holds 8 bits only."""
    return "png" if node["encoding"] == "png" or node["dtype"] != "uint8" else "jpeg"


@cache
def _encoded_features(name: str) -> Any:
    """The same features for frames that are encoded already: TFDS takes those of float depth only as
    pixels, and would start TensorFlow to encode them.
    """
    return _tfds_feature(feature_tree(name), encoded=True)


def _tfds_feature(node: Node, encoded: bool) -> Any:
    import tensorflow_datasets as tfds

    match node["kind"]:
        case "dict":
            children = {name: _tfds_feature(child, encoded) for name, child in node["features"].items()}
            return tfds.features.FeaturesDict(children)
        case "dataset":
            return tfds.features.Dataset(_tfds_feature(node["feature"], encoded))
        case "image":
            return _tfds_image(node, encoded)
        case "text":
            return tfds.features.Text()
        case "scalar":
            return tfds.features.Scalar(_dtype(node))
        case "tensor":
            encoding = node["encoding"] if node["encoding"] == "zlib" else "none"
            return tfds.features.Tensor(shape=tuple(node["shape"]), dtype=_dtype(node), encoding=encoding)
        case kind:
            raise ValueError(f"unknown node {kind}")


def _tfds_image(node: Node, encoded: bool) -> Any:
    import tensorflow_datasets as tfds

    shape, dtype = tuple(node["shape"]), node["dtype"]
    if encoded and dtype == "float32":
        shape, dtype = (*shape[:2], 4), "uint8"
    return tfds.features.Image(shape=shape, dtype=np.dtype(dtype), encoding_format=image_encoding(node))


def _dtype(node: Node) -> Any:
    return np.str_ if node["dtype"] == "string" else np.dtype(node["dtype"])
