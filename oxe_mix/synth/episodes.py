"""Episodes of the tabletop world: what a synthetic robot writes, laid over zeros for the rest of its tree."""

from __future__ import annotations

from typing import Any

import numpy as np

from oxe_mix.synth.features import Node, blank, feature_tree, image_encoding
from oxe_mix.synth.frames import black, encode
from oxe_mix.synth.generic import SUCCESS_SHARE
from oxe_mix.synth.robots import Robot, Step, motions
from oxe_mix.synth.world import Pose, Scene, draw, sample_scene, walk


def world_episode(robot: Robot, rng: np.random.Generator, number: int) -> Node:
    """One episode as TFDS takes it, frames encoded: a scene drawn from `rng`, recorded by `robot`."""
    tree = feature_tree(robot.name)["features"]
    scene = sample_scene(rng)
    steps = robot.write(robot, motions(walk(scene)), scene.instruction)
    below = blank(tree["steps"]["feature"])
    cameras = tree["steps"]["feature"]["features"]["observation"]["features"]
    out = []
    for t, step in enumerate(steps):
        frames = _frames(robot, scene, step.pop("frame"), cameras)
        step["observation"] = {**step.get("observation", {}), **frames}
        step |= {"is_first": t == 0, "is_last": t == len(steps) - 1, "is_terminal": t == len(steps) - 1}
        step |= {"reward": np.float32(t == len(steps) - 1)}
        out.append(_overlay(below, step))
    top = blank({"kind": "dict", "features": {k: v for k, v in tree.items() if k != "steps"}})
    return {**_overlay(top, _episode_fields(robot, tree, rng, number)), "steps": out}


def _frames(robot: Robot, scene: Scene, pose: Pose, cameras: dict[str, Node]) -> dict[str, bytes]:
    frames = {}
    for name, shows in robot.cameras.items():
        height, width, _ = cameras[name]["shape"]
        encoding = image_encoding(cameras[name])
        if shows == "table":
            frames[name] = encode(draw(scene, pose, width, height, robot.table), encoding)
        else:
            frames[name] = black(width, height, encoding)
    return frames


def _episode_fields(robot: Robot, tree: Node, rng: np.random.Generator, number: int) -> Step:
    fields: Step = {}
    if "success" in tree:
        fields["success"] = bool(rng.random() < SUCCESS_SHARE)
    if "episode_id" in tree:
        fields["episode_id"] = f"{robot.name}_{number}"
    if robot.name == "bridge_orig":
        fields["episode_metadata"] = {"episode_id": number, "has_image_0": True, "has_language": True}
    return fields


def _overlay(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`above` laid over `below`. Raises: KeyError for a key that the tree does not have."""
    merged = dict(below)
    for key, value in above.items():
        merged[key] = _overlay(below[key], value) if isinstance(below[key], dict) else value
    return merged
