"""A checkpoint that acts: observations in, action chunks in robot units out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from convert import action_codec
from convert.action_codec import ActionCodec, ActionStats, Bins
from convert.prompt import Asking
from oxe_mix.errors import UserError, did_you_mean
from train_llava.acting.observation import Observation, ObservationError
from train_llava.decode import ActionDecoder, Sampling
from train_llava.processor import OneViewProcessor, View


@dataclass(frozen=True, slots=True)
class Question:
    """An observation that was checked, as the model is asked about it."""

    text: str
    views: tuple[View, ...]
    unnorm_key: str
    stats: ActionStats
    seed: int
    preprocess_ms: float


@dataclass(frozen=True, slots=True)
class Latency:
    """Milliseconds of an answer; prefill and decode, and of preprocessing the last part, are those of the
    batch that it was part of.
    """

    preprocess: float
    prefill: float
    decode: float

    @property
    def total(self) -> float:
        """All three."""
        return self.preprocess + self.prefill + self.decode


@dataclass(frozen=True, slots=True)
class Answer:
    """A chunk of actions.

    actions: float64 [H, A], robot units. bins: int64 [H, A]. probabilities: float32 [H, A], the model's own,
    of the picked bins among those possible. entropies: float32 [H, A], nats, of the whole distribution.
    """

    unnorm_key: str
    actions: NDArray[np.float64]
    bins: Bins
    probabilities: NDArray[np.float32]
    entropies: NDArray[np.float32]
    latency: Latency


class Policy:
    """A trained model with its processor and codec. `question` is the CPU's work and may run in any thread;
    `answer` is the model's, one call at a time.
    """

    def __init__(
        self,
        decoder: ActionDecoder,
        processor: OneViewProcessor,
        codec: ActionCodec,
        temperature: float | None = None,
    ) -> None:
        """`temperature`: of sampling; None: the most likely bins."""
        self.codec = codec
        self._decoder, self._processor, self._temperature = decoder, processor, temperature
        # The tokenizer would read them as what they stand for: an instruction could end its own turn.
        self._marks = [mark.lower() for mark in processor.tokenizer.get_added_vocab()]

    @property
    def cameras(self) -> tuple[str, ...]:
        """Whose images an observation may have, in the model's order; a dataset can have fewer."""
        return self.codec.asking.cameras

    @property
    def is_parallel(self) -> bool:
        """Whether one pass answers all tokens of a chunk."""
        return self._decoder.is_parallel

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width that images are scaled to."""
        size = self._processor.image_processor.size
        return size["height"], size["width"]

    def question(self, observation: Observation) -> Question:
        """Check an observation and scale its images.

        Raises: ObservationError, naming the field that will not do.
        """
        start = time.perf_counter()
        key, stats = self._stats(observation.unnorm_key)
        asking = self.codec.asking_of(key)
        images = self._images(observation, asking.cameras, key)
        state = self._state(observation, asking, key)
        if not _is_unicode(observation.instruction):
            raise ObservationError("instruction", "is no Unicode text: it holds half of a surrogate pair")
        if found := [mark for mark in self._marks if mark in observation.instruction.lower()]:
            raise ObservationError("instruction", f"holds {found[0]}, which the model's prompts are made of")
        try:
            text = asking.question(observation.instruction, len(images), state)
        except ValueError as error:
            raise ObservationError("instruction", str(error)) from error
        views = tuple(self._processor.view(Image.fromarray(image)) for image in images)
        took = (time.perf_counter() - start) * 1000
        return Question(text, views, key, stats, observation.seed, took)

    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        """Ask the model; the same answers alone as in a batch.

        Raises: UserError when what the model computes is no number: of that every action would be made up.
        """
        sampling = None
        if self._temperature is not None:
            sampling = Sampling(self._temperature, [question.seed for question in questions])
        predicted = self._decoder.predict(
            [question.text for question in questions],
            [view for question in questions for view in question.views],
            [question.unnorm_key for question in questions],
            sampling,
        )
        if not np.isfinite(predicted.entropies).all():
            raise UserError(
                "the model computes no numbers (nan): its weights are damaged, or its dtype too small"
            )
        return [
            Answer(
                question.unnorm_key,
                action_codec.decode(predicted.bins[i], question.stats, self.codec.binning),
                predicted.bins[i],
                predicted.probabilities[i],
                predicted.entropies[i],
                Latency(
                    question.preprocess_ms + predicted.prepare_ms,
                    predicted.prefill_ms,
                    predicted.decode_ms,
                ),
            )
            for i, question in enumerate(questions)
        ]

    def _stats(self, key: str | None) -> tuple[str, ActionStats]:
        try:
            return self.codec.stats(key)
        except UserError as error:
            known = sorted(self.codec.datasets)
            problem = (
                f"unknown {key!r}{did_you_mean(key, known)}" if key else f"name one of {', '.join(known)}"
            )
            raise ObservationError("unnorm_key", problem) from error

    def _images(self, observation: Observation, cameras: Sequence[str], key: str) -> list[NDArray[np.uint8]]:
        """One per camera, in the model's order."""
        wanted, given = set(cameras), set(observation.images)
        if missing := sorted(wanted - given):
            raise ObservationError("images", f"no image of camera {', '.join(missing)}")
        if extra := sorted(given - wanted):
            raise ObservationError(
                "images",
                f"the checkpoint knows no camera {', '.join(extra)} of {key}; it takes {', '.join(cameras)}",
            )
        images = [observation.images[camera] for camera in cameras]
        for camera, image in zip(cameras, images, strict=True):
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
                raise ObservationError(
                    "images", f"{camera} is {image.dtype} {list(image.shape)}; give uint8 [H, W, 3]"
                )
        return images

    def _state(self, observation: Observation, asking: Asking, key: str) -> list[int] | None:
        """The robot's state in bins, where the model is told of it."""
        state = observation.state
        if not asking.state:
            if state is not None:
                raise ObservationError("state", f"the checkpoint was trained without the state of {key}")
            return None
        stats = self.codec.states[key]
        if state is None or state.shape != (len(stats.mask),):
            given = "missing" if state is None else f"of shape {list(state.shape)}"
            raise ObservationError("state", f"{given}; give [{len(stats.mask)}] in robot units")
        if not np.isfinite(state).all():
            raise ObservationError("state", "holds a value that is not finite")
        bins: list[int] = action_codec.encode(state[None], stats, self.codec.binning)[0].tolist()
        return bins


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
