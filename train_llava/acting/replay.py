"""One recorded episode, answered by the path that a robot is served by, beside what was recorded.

Open loop: whatever the policy answers, the next frames are the recorded ones. Of a policy that answers
chunks of H actions all H are executed before it is asked again, at the first sample from there on; an answer
ends with the episode's last sample, since what a conversion writes past it nobody recorded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from convert.action_codec import Binning, Bins
from convert.reader import Sample
from oxe_mix.errors import UserError
from oxe_mix.progress import Goal, progress
from oxe_mix.progress import Sample as Done
from train_llava.acting.observation import Observation
from train_llava.acting.policy import Answer, Policy
from train_llava.acting.validator import ActionValidator, Checked, Clamped
from train_llava.metrics import CLOSED_BELOW, Floats, Scored, score
from train_llava.processor import open_frame
from train_llava.recorded import Recording, Translation


@dataclass(frozen=True, slots=True)
class Answered:
    """One question of an episode; of its answer the first K <= H actions were executed.

    recording: of the sample, all H actions. checked: what the validator made of the K executed ones.
    """

    sample: Sample
    recording: Recording
    answer: Answer
    checked: Checked

    def __len__(self) -> int:
        """K."""
        return len(self.checked.actions)


@dataclass(frozen=True, slots=True)
class Replayed:
    """An episode of T executed steps, in order."""

    translation: Translation
    answered: tuple[Answered, ...]

    @property
    def steps(self) -> NDArray[np.int64]:
        """Where each stands in the source episode, [T]."""
        return np.concatenate([one.sample.step + np.arange(len(one)) for one in self.answered])

    @property
    def asked(self) -> NDArray[np.int64]:
        """The step whose frames each is the answer to, [T]."""
        return np.concatenate([np.full(len(one), one.sample.step) for one in self.answered])

    @property
    def recorded(self) -> Floats:
        """[T, A], robot units."""
        return np.concatenate([one.recording.actions[: len(one)] for one in self.answered])

    @property
    def predicted(self) -> Floats:
        """What the model said, [T, A], robot units."""
        return np.concatenate([one.answer.actions[: len(one)] for one in self.answered])

    @property
    def sent(self) -> Floats:
        """What a robot would have been sent, [T, A], robot units."""
        return np.concatenate([one.checked.actions for one in self.answered])

    @property
    def target(self) -> Bins:
        """The recorded actions in the model's bins, [T, A]."""
        return np.concatenate([one.recording.target[: len(one)] for one in self.answered])

    @property
    def bins(self) -> Bins:
        """What the model said, [T, A]."""
        return np.concatenate([one.answer.bins[: len(one)] for one in self.answered])

    @property
    def clamped(self) -> list[Clamped]:
        """Values that are not sent as they were said, by their step in the source episode."""
        return [
            replace(clamped, step=clamped.step + one.sample.step)
            for one in self.answered
            for clamped in one.checked.clamped
        ]


def replay(
    policy: Policy, validator: ActionValidator, translation: Translation, samples: Sequence[Sample]
) -> Replayed:
    """Ask a policy through an episode, one question at a time, as a robot does.

    Raises: UserError for a sample or frame that cannot be read or that does not hold what the policy asks
        for.
    """
    answered: list[Answered] = []
    due, end = samples[0].step, samples[-1].step + 1
    with progress(Goal("replay", "step", end - due), lambda: Done(sum(map(len, answered)))):
        for i, sample in enumerate(samples):
            if sample.step < due:
                continue
            recording = translation.recording(sample, samples[i - 1] if i else None)
            answer = ask(policy, translation, sample)
            kept = answer.actions[: end - sample.step]
            previous = answered[-1].checked.actions[-1] if answered else None
            checked = validator.check(translation.key, kept, previous)
            answered.append(Answered(sample, recording, answer, checked))
            due = sample.step + len(kept)
    return Replayed(translation, tuple(answered))


def ask(policy: Policy, translation: Translation, sample: Sample) -> Answer:
    """What a policy answers to a recorded sample. Raises: UserError as `replay`."""
    observation = Observation(
        images=_images(translation.asking.cameras, sample),
        instruction=translation.instruction(sample),
        unnorm_key=translation.key,
        state=translation.state(sample),
    )
    try:
        return policy.answer([policy.question(observation)])[0]
    except UserError as error:
        raise UserError(f"{sample.id}: {error}") from error


def _images(cameras: Sequence[str], sample: Sample) -> dict[str, NDArray[np.uint8]]:
    if len(cameras) != len(sample.frames):
        raise UserError(
            f"{sample.id}: has {len(sample.frames)} frames, not one of each of {', '.join(cameras)}"
        )
    return {
        camera: np.asarray(open_frame(frame)) for camera, frame in zip(cameras, sample.frames, strict=True)
    }


def figures(replayed: Replayed, name: str, binning: Binning) -> dict[str, Any]:
    """How good the answers are, as `oxe-mix eval` reports them, for the steps of one episode.

    Beside the model stand the two policies without eyes: the data's mean, and the action recorded right
    before each question. `gripper_agreement` is the share of steps at which the gripper is said to be as open
    as it was, by halves; None without a gripper. All of it is of what the model said, before the validator.
    """
    one, answered = replayed.translation, replayed.answered
    lasts = [
        own.recording.target[0] if own.recording.last is None else own.recording.last for own in answered
    ]
    lengths = [len(own) for own in answered]
    scored = Scored(
        dataset=name,
        stats=one.own,
        measured=one.measured,
        recorded=replayed.recorded[:, None],
        target=replayed.target[:, None],
        predicted=replayed.bins[:, None],
        shuffled=None,
        last=np.repeat(lasts, lengths, axis=0),
        first=np.repeat([own.recording.last is None for own in answered], lengths),
    )
    agreement = None
    if not one.own.mask[-1]:
        closed = [actions[:, -1] < CLOSED_BELOW for actions in (replayed.predicted, replayed.recorded)]
        agreement = float((closed[0] == closed[1]).mean())
    return score(binning, [scored]) | {"gripper_agreement": agreement}


def records(replayed: Replayed) -> list[dict[str, Any]]:
    """Each executed step as plain values: [A] each, actions in robot units."""
    parts = {
        "recorded": replayed.recorded,
        "predicted": replayed.predicted,
        "sent": replayed.sent,
        "recorded_bins": replayed.target,
        "bins": replayed.bins,
        "probabilities": np.concatenate([one.answer.probabilities[: len(one)] for one in replayed.answered]),
        "entropies": np.concatenate([one.answer.entropies[: len(one)] for one in replayed.answered]),
    }
    steps, asked = replayed.steps.tolist(), replayed.asked.tolist()
    return [
        {"step": steps[t], "asked_at": asked[t]} | {name: own[t].tolist() for name, own in parts.items()}
        for t in range(len(steps))
    ]
