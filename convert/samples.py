"""One episode to its samples: what is asked, what is answered, and the frames that go with it. Nothing is
read or written here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from convert.action_codec import Bins, clipped, encode
from convert.episodes import Trajectory, read_trajectory
from convert.options import Rules
from convert.prompt import CameraRole
from convert.recipe import zero_action
from convert.statistics import DatasetStats
from convert.steps import CHUNK_END, IDLE, ZERO_ACTION, ChunkEnd, choose, chunks, idle
from oxe_mix.cards import Card
from oxe_mix.images import check_frame, reencode
from oxe_mix.rlds import Episode, Feature, Key

NO_INSTRUCTION, TOO_SHORT, RECIPE, FILTERED = "no_instruction", "too_short", "recipe", "filtered_by_mods"
BAD_RECORD = "bad_record"


@dataclass(frozen=True, slots=True)
class Camera:
    """One camera of a dataset that a user asked for."""

    role: CameraRole
    key: Key
    feature: Feature


@dataclass(frozen=True, slots=True)
class EpisodeSamples:
    """What becomes of an episode: N samples, or none, and why steps were dropped."""

    num_steps: int  # of the source
    dropped: Counter[str]
    reason: str | None = None  # why nothing is left of the whole episode
    steps: list[int] = field(default_factory=list)  # source steps of the samples, [N]
    questions: list[str] = field(default_factory=list)  # [N]
    bins: Bins = field(default_factory=lambda: np.zeros((0, 1, 1), np.int64))  # [N, H, A]
    clipped: NDArray[np.bool_] = field(
        default_factory=lambda: np.zeros((0, 1), np.bool_)
    )  # [N, A], first action
    frames: list[list[tuple[str, bytes]]] = field(default_factory=list)  # [camera][N]: suffix and bytes
    instruction: str = ""  # the episode's first
    num_unlabelled: int = 0  # samples that were told the episode's first instruction for want of their own


@dataclass(frozen=True, slots=True)
class SampleRecipe:
    """How the episodes of one dataset become samples."""

    card: Card  # with the recipe that the mix asks for
    rules: Rules  # what the user asked for
    stats: DatasetStats
    cameras: tuple[Camera, ...]  # those that the dataset has of the ones asked for


def samples_of(episode: Episode, recipe: SampleRecipe, rank: Callable[[int], float]) -> EpisodeSamples:
    """The samples of an episode.

    Args:
        episode: one record.
        recipe: its dataset's.
        rank: of a source step, in [0, 1), for `--steps-per-episode`.

    Raises: ValueError for an action, a state or a frame that is broken, with its step.
    """
    trajectory = read_trajectory(episode, recipe.card, state=recipe.rules.asking.state)
    kept = len(trajectory.actions)
    outside = Counter({RECIPE: episode.num_steps - kept})
    if kept == 0:
        return EpisodeSamples(episode.num_steps, +outside, TOO_SHORT)
    if not trajectory.first_instruction:
        return EpisodeSamples(episode.num_steps, +(outside + Counter({NO_INSTRUCTION: kept})), NO_INSTRUCTION)
    chosen, dropped = _chosen(trajectory, recipe, rank)
    if not chosen:
        reason = max(dropped, key=lambda why: dropped[why])
        return EpisodeSamples(episode.num_steps, +(outside + dropped), reason)
    steps = [trajectory.first_step + t for t in chosen]
    return EpisodeSamples(
        num_steps=episode.num_steps,
        dropped=+(outside + dropped),
        steps=steps,
        questions=_questions(trajectory, recipe, chosen),
        bins=_bins(trajectory, recipe)[chosen],
        clipped=clipped(trajectory.actions[chosen], recipe.stats.actions),
        frames=[_frames(episode, camera, recipe.rules, steps) for camera in recipe.cameras],
        instruction=trajectory.first_instruction,
        num_unlabelled=sum(not trajectory.instructions[t] for t in chosen),
    )


def _chunk_end(recipe: SampleRecipe) -> ChunkEnd:
    # Right for deltas is no movement; a pose stays where it is by being told again.
    return recipe.rules.steps.chunk_end or ("neutral" if recipe.card.action_kind == "delta" else "repeat")


def _chosen(
    trajectory: Trajectory, recipe: SampleRecipe, rank: Callable[[int], float]
) -> tuple[list[int], Counter[str]]:
    actions, rules = trajectory.actions, recipe.rules
    late = np.zeros(len(actions), np.bool_)
    if _chunk_end(recipe) == "drop":
        late = np.arange(len(actions)) > len(actions) - rules.steps.chunk
    dropped = [(ZERO_ACTION, zero_action(actions, recipe.card)), (CHUNK_END, late)]
    if rules.steps.drop_idle:
        delta = recipe.card.action_kind == "delta"
        dropped.append((IDLE, idle(actions, recipe.stats.actions, delta=delta)))
    return choose(dropped, rules.steps, lambda t: rank(trajectory.first_step + t))


def _bins(trajectory: Trajectory, recipe: SampleRecipe) -> Bins:
    """[T', H, A]."""
    movement = np.array(recipe.card.normalise_mask)
    ahead = chunks(trajectory.actions, movement, recipe.rules.steps.chunk, _chunk_end(recipe))
    flat = encode(ahead.reshape(-1, ahead.shape[-1]), recipe.stats.actions, recipe.rules.binning)
    return flat.reshape(ahead.shape)


def _questions(trajectory: Trajectory, recipe: SampleRecipe, chosen: list[int]) -> list[str]:
    states: list[list[int]] | None = None
    if recipe.rules.asking.state and recipe.stats.states is not None:
        states = encode(trajectory.states[chosen], recipe.stats.states, recipe.rules.binning).tolist()
    return [
        recipe.rules.asking.question(
            trajectory.instructions[t] or trajectory.first_instruction,
            len(recipe.cameras),
            states[i] if states is not None else None,
        )
        for i, t in enumerate(chosen)
    ]


def _frames(episode: Episode, camera: Camera, rules: Rules, steps: list[int]) -> list[tuple[str, bytes]]:
    """The frames of some source steps with their suffixes, proved whole and changed as asked for."""
    values = episode.slices(camera.key)
    frames = []
    for step in steps:
        frame = bytes(values[step])
        try:
            suffix = check_frame(frame, camera.feature.shape)
            changed = reencode(frame, rules.images)
            frames.append((suffix if changed is frame else check_frame(changed, ()), changed))
        except ValueError as error:
            raise ValueError(f"step {step}, {'/'.join(camera.key)}: {error}") from error
    return frames
