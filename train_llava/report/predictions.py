"""What a run's model says to some held-out samples, by the path that a robot is served by."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from convert.action_codec import ActionStats, read_codec
from convert.finish import CARDS
from convert.reader import ConversationReader, Sample
from oxe_mix.cards import Card, load_card
from oxe_mix.errors import UserError
from oxe_mix.progress import Goal, progress
from oxe_mix.progress import Sample as Done
from train_llava.acting.load import Loading, codec_of, load_policy
from train_llava.acting.policy import Policy
from train_llava.acting.replay import ask
from train_llava.dimensions import dimension_names
from train_llava.evaluate import pick
from train_llava.recorded import Translation, refuse_other_dataset, refuse_other_tokens
from train_llava.report.facts import motion_of
from train_llava.report.figures import distances
from train_llava.report.pictures import jpeg
from train_llava.report.run_values import Guess
from train_llava.report.values import Counts, Floats, Motion, Share

_EDGES = (0, 1, 5, 20, 80)
_LABELS = ("the recorded bin", "1 away", "2 to 5", "6 to 20", "21 to 80", "further")
_SIDE, _QUALITY = 256, 75
_NO_ARROW = {
    "change": "no arrow: these actions are poses, and how far one moves is not said by one answer",
    "none": "no arrow: these dimensions are no directions in space",
}


@dataclass(frozen=True, slots=True)
class Predicted:
    """The model's answers to some samples."""

    guesses: tuple[Guess, ...]
    near: tuple[Share, ...]  # bins of the dimensions that move, by their distance
    words: str


def predict(checkpoint: Path, data: Path, most: int, device: str | None) -> Predicted:
    """Ask a checkpoint about at most so many held-out samples, evenly spread over the data.

    Raises: UserError when checkpoint and data do not go together, or nothing is held out.
    """
    samples, translations = _samples(checkpoint, data, most)
    policy = load_policy(checkpoint, Loading(device=device))
    guesses, off = list[Guess](), np.zeros(len(_LABELS), np.int64)
    with progress(Goal("report", "prediction", len(samples)), lambda: Done(len(guesses))):
        for sample in samples:
            guess, near = _guess(policy, translations[sample.dataset], sample, _card(data, sample.dataset))
            guesses.append(guess)
            off += near
    total = max(1, int(off.sum()))
    return Predicted(
        guesses=tuple(guesses),
        near=tuple(
            Share(label, number / total, f"{number / total:.1%}")
            for label, number in zip(_LABELS, off.tolist(), strict=True)
        ),
        words=f"{len(guesses):,} held-out samples of {data.resolve().name}, evenly spread over its datasets, "
        "answered as a robot would be; of a chunk the first action. What was recorded is shown as its tokens "
        "say it: the centre of its bin. Arrows are x and y in the robot's own frame, not in the picture.",
    )


def _samples(checkpoint: Path, data: Path, most: int) -> tuple[list[Sample], dict[str, Translation]]:
    """Proved to go together, before the weights are read."""
    codec, measured = codec_of(checkpoint), read_codec(data)
    refuse_other_tokens((data, measured), (checkpoint, codec))
    reader = ConversationReader(data, "val")
    ranges = {name: own for name, own in reader.ranges.items() if own and name in codec.datasets}
    if not ranges:
        raise UserError(
            f"--data {data}: holds no held-out sample of the run's datasets; convert with --val-fraction"
        )
    for name in ranges:
        refuse_other_dataset(measured, name, codec, name)
    samples = [reader[index] for own in pick(ranges, most).values() for index in own.tolist()]
    return samples, {name: Translation(measured, name, codec, name) for name in ranges}


def _guess(
    policy: Policy, translation: Translation, sample: Sample, card: Card | None
) -> tuple[Guess, Counts]:
    recording, answer = translation.recording(sample, None), ask(policy, translation, sample)
    moving = translation.measured.moving & (translation.own.moving | ~np.array(translation.own.mask))
    target, said = recording.target[0], answer.bins[0]
    motion = motion_of(card, len(target))
    drawn, words = movements(recording.actions[0], answer.actions[0], translation.measured, motion)
    guess = Guess(
        id=sample.id,
        instruction=translation.instruction(sample),
        frame=_frame(sample),
        names=dimension_names(card, len(target)),
        recorded=recording.actions[0],
        predicted=answer.actions[0],
        arrows=drawn,
        arrow_words=words,
        off=int(np.abs(said - target).max()),
    )
    return guess, distances(target[moving], said[moving], _EDGES)


def movements(
    recorded: Floats, predicted: Floats, stats: ActionStats, motion: Motion
) -> tuple[tuple[tuple[float, float], ...], str]:
    """Two actions, [A] in robot units, as arrows in the plane within 1, and how long a full one is; or no
    arrow, and why: of poses the step before would be needed, which is not asked about.
    """
    if motion != "delta":
        return (), _NO_ARROW[motion]
    # The corner of the quantiles: no recorded action in bins lies further.
    full = float(np.hypot(*np.maximum(np.abs(stats.q01[:2]), np.abs(stats.q99[:2])))) or 1.0
    return tuple(
        _within(action[:2] / full) for action in (recorded, predicted)
    ), f"a full arrow is {full:.3g}"


def _within(moved: Floats) -> tuple[float, float]:
    """A model that acts with other statistics may say more."""
    x, y = (moved / max(1.0, float(np.hypot(*moved)))).tolist()
    return x, y


def _frame(sample: Sample) -> bytes:
    try:
        return jpeg([frame.read() for frame in sample.frames], _SIDE, _QUALITY)
    except ValueError as error:
        raise UserError(f"{sample.id}: {error}; run oxe-mix check on the folder") from error


def _card(data: Path, name: str) -> Card | None:
    file = data / CARDS / f"{name}.yaml"
    return load_card(file) if file.exists() else None
