"""How each synthetic robot would have recorded the same walk: its camera, its units and its own way to write
an action.

The six take the six true layouts of their namesakes, so everything that makes those layouts awkward is here
too: an idle first and a zero last step, relative grippers, absolute poses, text as code points, tensors
packed with zlib.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from oxe_mix.synth.world import Pose

Step = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Motion:
    """One step of a walk as the robot knows it."""

    pose: Pose  # before the step; the frame shows it
    after: Pose
    closing: bool  # the step in which the jaws begin to close


@dataclass(frozen=True, slots=True)
class Robot:
    """A synthetic dataset: share of the bucket's episodes, size of a cell, table colour, and how steps are
    written.
    """

    name: str
    share: float
    cell_m: float
    table: tuple[int, int, int]
    cameras: dict[str, str]  # feature below observation: "table" shows the scene, "black" is a missing camera
    write: Callable[[Robot, list[Motion], str], list[Step]]
    other_split: str | None = None

    def position(self, pose: Pose) -> tuple[float, float, float]:
        """Where the gripper is, metres."""
        return (0.2 + self.cell_m * pose.cell[0], -0.1 + self.cell_m * pose.cell[1], 0.05)

    def delta(self, motion: Motion) -> list[float]:
        """The step's movement, metres."""
        return [
            self.cell_m * (motion.after.cell[0] - motion.pose.cell[0]),
            self.cell_m * (motion.after.cell[1] - motion.pose.cell[1]),
            0.0,
        ]


def motions(poses: list[Pose]) -> list[Motion]:
    """The steps between the poses of a walk."""
    return [Motion(pose, after, closing=after.closed and not pose.closed) for pose, after in pairwise(poses)]


def _bridge(robot: Robot, walk: list[Motion], text: str) -> list[Step]:
    def step(pose: Pose, action: list[float]) -> Step:
        state = [*robot.position(pose), 0.0, 0.0, 0.0, 0.0 if pose.closed else 1.0]
        return {
            "frame": pose,
            "action": np.array(action, np.float32),
            "language_instruction": text,
            "observation": {"state": np.array(state, np.float32)},
        }

    # The real builder starts with an all-zero action and appends another: the recipe drops both steps.
    zero = [0.0] * 7
    moving = [step(m.pose, [*robot.delta(m), 0.0, 0.0, 0.0, 0.0 if m.after.closed else 1.0]) for m in walk]
    return [step(walk[0].pose, zero), *moving, step(walk[-1].after, zero)]


def _rt1(robot: Robot, walk: list[Motion], text: str) -> list[Step]:
    return [
        {
            "frame": m.pose,
            "action": {
                "world_vector": np.array(robot.delta(m), np.float32),
                # A relative command: +1 once, when the gripper begins to close.
                "gripper_closedness_action": np.array([1.0 if m.closing else 0.0], np.float32),
            },
            "observation": {"natural_language_instruction": text},
        }
        for m in walk
    ]


def _language_table(robot: Robot, walk: list[Motion], text: str) -> list[Step]:
    codes = np.zeros(512, np.int32)
    codes[: len(text)] = [ord(letter) for letter in text]
    return [
        {
            "frame": m.pose,
            "action": np.array(robot.delta(m)[:2], np.float32),
            "observation": {
                "instruction": codes,
                "effector_translation": np.array(robot.position(m.pose)[:2], np.float32),
            },
        }
        for m in walk
    ]


def _viola(robot: Robot, walk: list[Motion], text: str) -> list[Step]:
    return [
        {
            "frame": m.pose,
            "action": {
                "world_vector": np.array(robot.delta(m), np.float32),
                "gripper_closedness_action": np.float32(1.0 if m.after.closed else -1.0),
            },
            "observation": {"natural_language_instruction": text},
        }
        for m in walk
    ]


def _iamlab(robot: Robot, walk: list[Motion], text: str) -> list[Step]:
    return [
        {
            "frame": m.pose,
            # The pose after the step: position, quaternion w x y z (no rotation), gripper 1 open.
            "action": np.array(
                [*robot.position(m.after), 1, 0, 0, 0, 0.0 if m.after.closed else 1.0], np.float32
            ),
            "language_instruction": text,
        }
        for m in walk
    ]


# Most episodes go to the datasets with small frames, so that the bucket is quick to make.
ROBOTS = (
    Robot(
        "bridge_orig",
        share=0.40,
        cell_m=0.05,
        table=(140, 132, 122),
        cameras={"image_0": "table", "image_1": "black", "image_2": "black", "image_3": "black"},
        write=_bridge,
        other_split="val",
    ),
    Robot("fractal20220817_data", 0.24, 0.10, (150, 148, 140), {"image": "table"}, _rt1),
    Robot(
        "viola",
        share=0.26,
        cell_m=0.06,
        table=(122, 130, 138),
        cameras={"agentview_rgb": "table", "eye_in_hand_rgb": "black"},
        write=_viola,
        other_split="test",
    ),
    Robot("kuka", 0.03, 0.08, (132, 140, 128), {"image": "table"}, _rt1),
    Robot("language_table", 0.04, 0.03, (150, 136, 120), {"rgb": "table"}, _language_table),
    Robot(
        "iamlab_cmu_pickup_insert_converted_externally_to_rlds",
        share=0.03,
        cell_m=0.05,
        table=(100, 92, 116),
        cameras={"image": "table", "wrist_image": "black"},
        write=_iamlab,
    ),
)
