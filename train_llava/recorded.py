"""What a converted folder recorded, in the tokens of the codec that a model acts with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from convert.action_codec import ActionCodec, ActionStats, Bins, decode, encode, text_to_bins
from convert.prompt import IMAGE
from convert.reader import Sample
from oxe_mix.errors import UserError
from train_llava.metrics import Floats


@dataclass(frozen=True, slots=True)
class Recording:
    """One sample; bins are those of the model's codec."""

    question: str
    actions: Floats  # [H, A], robot units
    target: Bins  # [H, A]
    last: Bins | None  # [A], the action recorded before the first one; None at an episode's first sample


class Translation:
    """From one dataset of a converted folder to a model's codec.

    Where both have the same statistics every bin stays as it is. Where not, what counts is the action in
    robot units: the same one gets another bin.
    """

    def __init__(self, data: ActionCodec, name: str, codec: ActionCodec, key: str) -> None:
        """`key`: what the model calls the dataset `name`. Raises: UserError when it knows no such one."""
        self.measured: ActionStats = data.datasets[name]
        self.key, self.own = codec.stats(key)
        self.asking = codec.asking_of(key)
        self._binning, self._shape = codec.binning, (codec.chunk, codec.action_dim)
        self._states = (data.states[name], codec.states[key]) if self.asking.state else None

    def recording(self, sample: Sample, before: Sample | None) -> Recording:
        """A sample, with the one that stands before it in the folder.

        Raises: UserError for a sample that is no question and answer of this codec.
        """
        try:
            recorded = self._bins(sample)
            return Recording(
                question=self._question(sample.question),
                actions=decode(recorded, self.measured, self._binning),
                target=self._translated(recorded, self.measured, self.own),
                last=self._last(sample, before),
            )
        except ValueError as error:
            raise UserError(f"{sample.id}: {error}") from error

    def instruction(self, sample: Sample) -> str:
        """What the robot was told to do."""
        return self.asking.instruction(sample.question)

    def state(self, sample: Sample) -> Floats | None:
        """The robot's own state, [S], robot units: the centres of its bins; None where a model is not told
        of it.
        """
        if self._states is None:
            return None
        state: Floats = decode(self._state(sample.question), self._states[0], self._binning)[0]
        return state

    def _bins(self, sample: Sample) -> Bins:
        bins = text_to_bins(sample.answer, self._shape[1])
        if bins.shape != self._shape:
            raise ValueError(f"an answer of {len(bins)} actions, not of {self._shape[0]}")
        return bins

    def _translated(self, bins: Bins, measured: ActionStats, own: ActionStats) -> Bins:
        """Bins [T, W] of the folder's codec in the model's."""
        # Not by way of robot units where both are the same: not every bin would come back as itself.
        return bins if measured == own else encode(decode(bins, measured, self._binning), own, self._binning)

    def _last(self, sample: Sample, before: Sample | None) -> Bins | None:
        """The action right before a sample's first, as far as the sample before it tells."""
        if before is None or before.episode != sample.episode:
            return None
        # A chunk goes on step by step, whatever the steps at which samples were taken.
        reached = min(sample.step - before.step, self._shape[0])
        last: Bins = self._translated(self._bins(before)[reached - 1 : reached], self.measured, self.own)[0]
        return last

    def _question(self, question: str) -> str:
        """The question with the robot's state, where it holds one, in the bins that the model knows."""
        if self._states is None or self._states[0] == self._states[1]:
            return question
        state = self._translated(self._state(question), *self._states)[0]
        return self.asking.question(self.asking.instruction(question), question.count(IMAGE), state.tolist())

    def _state(self, question: str) -> Bins:
        """[1, S], from a question that holds them."""
        return np.array([self.asking.state_bins(question)], np.int64)


def refuse_other_tokens(data: tuple[Path, ActionCodec], checkpoint: tuple[Path, ActionCodec]) -> None:
    """A model can be asked only as it was trained to be, and answers only as it was.

    Args:
        data: a converted folder and its codec. checkpoint: a model's, and its own.

    Raises: UserError that names what the data has otherwise.
    """
    theirs = _tokens(data[1])
    for what, wanted in _tokens(checkpoint[1]).items():
        if theirs[what] != wanted:
            raise UserError(
                f"{data[0]}: {what} {theirs[what]}, but {checkpoint[0]} was trained with {wanted}; "
                "convert the data as it was converted for training"
            )


def refuse_other_dataset(data: ActionCodec, name: str, codec: ActionCodec, key: str) -> None:
    """Raises: UserError when a dataset's movements and grippers are not where the model has them, or it has
    other cameras or no state.
    """
    if data.datasets[name].mask != codec.datasets[key].mask:
        raise UserError(f"{name}: movements and gripper are not the dimensions that they are in {key}")
    if (theirs := data.asking_of(name)) != (own := codec.asking_of(key)):
        shown, known = (
            f"{', '.join(one.cameras)}{' and the state' if one.state else ''}" for one in (theirs, own)
        )
        raise UserError(f"{name}: is asked about with {shown}, but the checkpoint's {key} with {known}")


def other_statistics(data: ActionCodec, name: str, codec: ActionCodec, key: str) -> str:
    """A warning where a dataset was measured otherwise than the model acts; empty where it was not."""
    if data.datasets[name] == codec.datasets[key]:
        return ""
    return (
        f"{name}: the data's statistics are not those that the checkpoint acts with; actions outside its "
        "range count as errors in robot units"
    )


def _tokens(codec: ActionCodec) -> dict[str, str]:
    """What questions and answers look like, in words."""
    asking = codec.asking
    return {
        "actions of width": str(codec.action_dim),
        "chunks of": str(codec.chunk),
        "binning": codec.binning,
        "cameras": ", ".join(asking.cameras),
        "the robot's state in the prompt:": "yes" if asking.state else "no",
        "prompt": repr(asking.template),
    }
