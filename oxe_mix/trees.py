"""The feature trees that are shipped beside the cards: what a dataset holds, known before a byte of it is
there.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from oxe_mix.rlds import Feature, FeatureTree, Key

# As TFDS's catalog and the contributors' builders give them; a downloaded features.json has the last word.
TREES = Path(__file__).parent / "trees"


def shipped_tree(name: str) -> FeatureTree | None:
    """The feature tree of that name, or None where none is shipped; read without TFDS."""
    file = TREES / f"{name}.json"
    if not file.exists():
        return None
    top = dict(json.loads(file.read_text(encoding="utf-8"))["features"])
    steps = top.pop("steps")
    return FeatureTree(_leaves(top), _leaves(steps["feature"]["features"]))


def _leaves(children: dict[str, Any], above: Key = ()) -> dict[Key, Feature]:
    leaves: dict[Key, Feature] = {}
    for name, node in children.items():
        key = (*above, name)
        if node["kind"] == "dict":
            leaves |= _leaves(node["features"], key)
        else:
            leaves[key] = _leaf(node)
    return leaves


def _leaf(node: dict[str, Any]) -> Feature:
    if node["kind"] == "text":
        return Feature("text", (), "string", "none")
    # A scalar is stored as a tensor of empty shape.
    kind = "image" if node["kind"] == "image" else "tensor"
    return Feature(kind, tuple(node.get("shape", ())), node["dtype"], node.get("encoding", "none"))
