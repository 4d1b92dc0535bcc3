"""A second implementation of the six recipes, in plain loops over what TFDS decodes. Only for comparison."""

from __future__ import annotations

import math
from typing import Any

Step = dict[str, Any]
Action = list[float]


def recorded_actions(name: str, steps: list[Step]) -> tuple[list[Action], list[int], list[str]]:
    """Actions, the source steps that they belong to, and the instructions, as the facts describe them."""
    return {
        "bridge_orig": _bridge,
        "fractal20220817_data": _rt1,
        "kuka": _rt1,
        "viola": _viola,
        "language_table": _language_table,
        "iamlab_cmu_pickup_insert_converted_externally_to_rlds": _iamlab,
    }[name](steps)


def _text(value: bytes) -> str:
    return value.decode()


def _bridge(steps: list[Step]) -> tuple[list[Action], list[int], list[str]]:
    steps = steps[1:]
    gripper = [float(step["action"][6]) for step in steps]
    carry = gripper[-1]
    for t in reversed(range(len(gripper))):
        if gripper[t] > 0.95:
            carry = 1.0
        elif gripper[t] < 0.05:
            carry = 0.0
        gripper[t] = carry
    actions = []
    for t in range(len(steps) - 1):
        here, there = steps[t]["observation"]["state"], steps[t + 1]["observation"]["state"]
        actions.append([float(there[i]) - float(here[i]) for i in range(6)] + [gripper[t]])
    kept = list(range(1, len(steps)))
    return actions, kept, [_text(step["language_instruction"]) for step in steps[:-1]]


def _rt1(steps: list[Step]) -> tuple[list[Action], list[int], list[str]]:
    commands = []
    for step in steps:
        value = float(step["action"]["gripper_closedness_action"][0])
        commands.append(0.0 if value > 0.1 else 1.0 if value < -0.1 else None)
    given = [command for command in commands if command is not None]
    state = 1.0 - given[0] if given else 1.0
    actions, texts = [], []
    for step, command in zip(steps, commands, strict=True):
        state = state if command is None else command
        move = [float(x) for x in step["action"]["world_vector"]]
        turn = [float(x) for x in step["action"]["rotation_delta"]]
        actions.append([*move, *turn, state])
        texts.append(_text(step["observation"]["natural_language_instruction"]))
    return actions, list(range(len(steps))), texts


def _viola(steps: list[Step]) -> tuple[list[Action], list[int], list[str]]:
    actions, texts = [], []
    for step in steps:
        move = [float(x) for x in step["action"]["world_vector"]]
        turn = [float(x) for x in step["action"]["rotation_delta"]]
        closed = min(1.0, max(0.0, float(step["action"]["gripper_closedness_action"])))
        actions.append([*move, *turn, 1.0 - closed])
        texts.append(_text(step["observation"]["natural_language_instruction"]))
    return actions, list(range(len(steps))), texts


def _language_table(steps: list[Step]) -> tuple[list[Action], list[int], list[str]]:
    actions, texts = [], []
    for step in steps:
        actions.append([float(step["action"][0]), float(step["action"][1]), 0.0, 0.0, 0.0, 0.0, 1.0])
        text = ""
        for code in step["observation"]["instruction"]:
            if code == 0:
                break
            text += chr(code)
        texts.append(text)
    return actions, list(range(len(steps))), texts


def _iamlab(steps: list[Step]) -> tuple[list[Action], list[int], list[str]]:
    actions, texts = [], []
    for step in steps:
        x, y, z, w = (float(v) for v in step["action"][3:7])
        r00, r10 = 1 - 2 * (y * y + z * z), 2 * (x * y + z * w)
        r20, r21, r22 = 2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)
        angles = [math.atan2(r21, r22), -math.asin(max(-1.0, min(1.0, r20))), math.atan2(r10, r00)]
        actions.append([*(float(v) for v in step["action"][:3]), *angles, float(step["action"][7])])
        texts.append(_text(step["language_instruction"]))
    return actions, list(range(len(steps))), texts
