"""Which steps of an episode become samples, and how far each answer looks ahead. Pure functions of one
episode.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from convert.action_codec import NUM_BINS, ActionStats, normalize

ChunkEnd = Literal["repeat", "neutral", "drop"]
ZERO_ACTION, CHUNK_END, IDLE, STRIDE, SAMPLED = "zero_action", "past_the_end", "idle", "stride", "not_sampled"


@dataclass(frozen=True, slots=True)
class StepRules:
    """What a user asked of the steps; `chunk_end` None: as the dataset's actions ask for."""

    chunk: int = 1
    chunk_end: ChunkEnd | None = None
    stride: int = 1
    per_episode: int | None = None
    drop_idle: bool = False


def chunks(
    actions: NDArray[np.float32], movement: NDArray[np.bool_], chunk: int, end: ChunkEnd
) -> NDArray[np.float32]:
    """The actions of steps t … t + H - 1, for every t.

    Args:
        actions: [T, A], robot units.
        movement: [A], true for movements, false for grippers.
        chunk: H.
        end: what stands past the last step: its action again, or no movement with the gripper kept. With
            `drop` steps that have too few successors are left out.

    Returns: float32 [T', H, A]; T' is T, or T - H + 1 (at least 0) with `drop`.
    """
    num_steps = len(actions)
    starts = num_steps if end != "drop" else max(0, num_steps - chunk + 1)
    filler = actions[-1:] if end == "repeat" else np.where(movement, np.float32(0), actions[-1:])
    padded = np.concatenate([actions, np.repeat(filler, chunk - 1, axis=0)])
    ahead: NDArray[np.float32] = padded[np.arange(starts)[:, None] + np.arange(chunk)]
    return ahead


def idle(actions: NDArray[np.float32], stats: ActionStats, *, delta: bool) -> NDArray[np.bool_]:
    """Steps that tell the robot to stay as it is, [T]: nothing in them is half a bin away from that.

    Args:
        actions: [T, A], robot units.
        stats: the dataset's.
        delta: to stay is zero in every movement; else it is the action of the step before. A gripper stays
            when it is told what it was told before.

    Never all of an episode: one that is idle throughout shows a task of its own, to wait, and stays whole.
    """
    same = still(actions, stats, delta=delta)
    return np.asarray(same & ~same.all())


def still(
    actions: NDArray[np.float32], stats: ActionStats, *, delta: bool, tolerance: float = 1 / NUM_BINS
) -> NDArray[np.bool_]:
    """The same, all of an episode included; `tolerance` in the codec's range: in decoded actions a zero
    stands at the centre of its bin, up to half a bin away.
    """
    x = normalize(actions, stats)
    before = np.concatenate([x[:1], x[:-1]])
    stay = normalize(np.zeros_like(actions[:1]), stats) if delta else before
    movement = np.array(stats.mask)
    near = np.abs(x - np.where(movement, stay, before)) < tolerance
    same: NDArray[np.bool_] = np.asarray(near.all(axis=1))
    # Nothing stands before the first of absolute poses that it could be equal to.
    same[:1] &= delta
    return same


def choose(
    dropped: list[tuple[str, NDArray[np.bool_]]], rules: StepRules, rank: Callable[[int], float]
) -> tuple[list[int], Counter[str]]:
    """The steps that become samples, in order, and how many others fell to which reason.

    Args:
        dropped: reasons with the steps that they take, [T] each; the first one counts.
        rules: stride and sample, in this order, apply to the steps that are left.
        rank: of a step, in [0, 1); the lowest ranks are sampled, so that a larger sample holds a smaller one.
    """
    left = np.ones(len(dropped[0][1]), np.bool_)
    counts: Counter[str] = Counter()
    for reason, taken in dropped:
        counts[reason] = int((left & taken).sum())
        left &= ~taken
    steps: list[int] = np.flatnonzero(left).tolist()
    strided = steps[:: rules.stride]
    counts[STRIDE] = len(steps) - len(strided)
    sampled = strided
    if rules.per_episode is not None and len(strided) > rules.per_episode:
        sampled = sorted(sorted(strided, key=rank)[: rules.per_episode])
    counts[SAMPLED] = len(strided) - len(sampled)
    return sampled, +counts
