"""A small tabletop world: what the synthetic datasets show and how their robot moves.

Blocks of different colours stand on the cells of a square grid that fills the frame. The instruction names
one of them; the gripper walks to it, at most one cell along each axis per step, and closes. The action
therefore depends on where the gripper is, where the named block is and whether the gripper has arrived:
nobody can guess it without looking at the picture and reading the instruction.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

# 4 x 4 cells on a 64 x 64 view are 16 x 16 pixels, one patch of the demo's vision tower each. With positions
# that do not line up with the patches, a model of this size learnt nothing in 6 minutes.
GRID = 4
# Full colours on a table of middle grey: what a small vision tower tells apart at once.
COLORS = {"red": (235, 25, 25), "green": (25, 190, 40), "blue": (25, 50, 235), "yellow": (245, 225, 25)}
BLOCKS_PER_SCENE = 3
CLOSING_STEPS = 2
_JAW = (20, 20, 24)

Cell = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Pose:
    """Where the gripper is before a step: column and row on the grid, and whether its jaws are closed."""

    cell: Cell
    closed: bool


@dataclass(frozen=True, slots=True)
class Scene:
    """Blocks by colour, the colour that the instruction names, and the cell where the gripper starts."""

    blocks: dict[str, Cell]
    target: str
    start: Cell

    @property
    def instruction(self) -> str:
        """The task in words, as a person would type it."""
        return f"Pick up the {self.target} block"


def sample_scene(rng: np.random.Generator) -> Scene:
    """Draw a scene: distinct cells for the blocks and for the gripper's start."""
    cells = [(int(cell % GRID), int(cell // GRID)) for cell in rng.permutation(GRID * GRID)]
    colors = [list(COLORS)[i] for i in rng.permutation(len(COLORS))[:BLOCKS_PER_SCENE]]
    blocks = dict(zip(colors, cells, strict=False))
    return Scene(blocks=blocks, target=colors[0], start=cells[BLOCKS_PER_SCENE])


def walk(scene: Scene) -> list[Pose]:
    """The gripper's poses, [T]: from the start to the named block, then closed on it for CLOSING_STEPS steps.

    The last pose is where the robot ends; step t goes from pose t to pose t + 1.
    """
    cell, goal = scene.start, scene.blocks[scene.target]
    poses = [Pose(cell, closed=False)]
    while cell != goal:
        cell = (cell[0] + _sign(goal[0] - cell[0]), cell[1] + _sign(goal[1] - cell[1]))
        poses.append(Pose(cell, closed=False))
    return poses + [Pose(cell, closed=True)] * CLOSING_STEPS


def draw(scene: Scene, pose: Pose, width: int, height: int, table: tuple[int, int, int]) -> Image.Image:
    """The camera's view of a scene, RGB, `width` x `height` pixels: the grid fills the frame."""
    image = Image.new("RGB", (width, height), table)
    canvas = ImageDraw.Draw(image)
    cell_w, cell_h = width / GRID, height / GRID
    for color, (column, row) in scene.blocks.items():
        x, y = column * cell_w, row * cell_h
        canvas.rectangle(
            [x + 0.22 * cell_w, y + 0.22 * cell_h, x + 0.78 * cell_w, y + 0.78 * cell_h], fill=COLORS[color]
        )
    x, y = pose.cell[0] * cell_w, pose.cell[1] * cell_h
    # Open jaws stand at the edges of the cell, closed ones touch the block, so the block under them shows.
    inset = 0.18 if pose.closed else 0.0
    jaw = 0.12 * cell_w
    for left in (x + inset * cell_w, x + (1 - inset) * cell_w - jaw):
        canvas.rectangle([left, y, left + jaw, y + cell_h], fill=_JAW)
    canvas.rectangle([x + inset * cell_w, y, x + (1 - inset) * cell_w, y + 0.12 * cell_h], fill=_JAW)
    return image


def _sign(value: int) -> int:
    return (value > 0) - (value < 0)
