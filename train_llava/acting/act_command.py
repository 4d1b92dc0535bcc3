"""`oxe-mix act`, and `inference_action.py`: pictures and an instruction in, actions as JSON out."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from convert.action_codec import ActionCodec
from oxe_mix.errors import UserError, did_you_mean
from oxe_mix.files import atomic_write, parse_model, prove_writable
from oxe_mix.text import count, say
from train_llava.acting.load import Loading, codec_of, load_policy
from train_llava.acting.observation import Observation, ObservationError
from train_llava.acting.pictures import Picture, pictures, read_picture
from train_llava.acting.validator import ActionValidator, OnViolation, validator_of

if TYPE_CHECKING:
    from train_llava.acting.policy import Answer, Policy


@dataclass(frozen=True, slots=True)
class ActOptions:
    """What a user asked for. images: each a path, or CAMERA=PATH."""

    checkpoint: Path
    images: tuple[str, ...] = ()
    instruction: str | None = None
    unnorm_key: str | None = None
    state: str | None = None
    requests: Path | None = None
    stride: int = 1
    batch: int = 1
    seed: int = 0
    out: Path | None = None
    limits: Path | None = None
    on_violation: OnViolation = "clamp"
    loading: Loading = field(default_factory=Loading)


class _Request(BaseModel):
    """A line of a file of requests; what it leaves out is taken from the command."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    image: str | None = None
    images: dict[str, str] = {}
    instruction: str | None = None
    unnorm_key: str | None = None
    state: list[float] | None = None
    seed: int | None = Field(default=None, ge=0)


@dataclass(frozen=True, slots=True)
class _Asked:
    """An observation and what it is called in the answer."""

    name: str
    observation: Observation


def run_act(options: ActOptions) -> int:
    """Answer each observation with a line of JSON, on the screen or in a file.

    Returns: the exit code.
    Raises: UserError for what the user can mend.
    """
    codec = codec_of(options.checkpoint)
    out = None if options.out is None else prove_writable(options.out)
    asked = _asked(options, codec)
    first = next(asked, None)  # a wrong path is told before the model is loaded
    if first is None:
        raise UserError(f"{options.requests}: holds no request")
    validator = validator_of(codec, options.limits, options.on_violation)
    if options.requests is None:
        _prove(first.observation, codec, options)
    policy = load_policy(options.checkpoint, options.loading)
    totals: list[float] = []

    def lines() -> Iterator[str]:
        batch = [first]
        while batch:
            for record in _answers(policy, validator, batch):
                totals.append(record["latency_ms"]["total"])
                yield json.dumps(record, allow_nan=False)
            batch = list(islice(asked, options.batch))

    if out is None:
        for line in lines():
            say(line)
        return 0
    with atomic_write(out) as file:
        for line in lines():
            file.write(f"{line}\n".encode())
    clamped = f"{count(sum(validator.counts.values()), 'value')} clamped"
    say(f"{count(len(totals), 'answer')}, {_spread(totals)}, {clamped}\nresult: {out}")
    say(f"next: oxe-mix serve --checkpoint {shlex.quote(str(options.checkpoint))}")
    return 0


def _prove(observation: Observation, codec: ActionCodec, options: ActOptions) -> None:
    """What can be told to be wrong without the model."""
    codec.stats(observation.unnorm_key)
    if not options.instruction:
        raise UserError('--instruction: say in words what to do, as "put the carrot on the plate"')


def _answers(policy: Policy, validator: ActionValidator, batch: list[_Asked]) -> Iterator[dict[str, Any]]:
    questions = []
    for asked in batch:
        try:
            questions.append(policy.question(asked.observation))
        except ObservationError as error:
            raise UserError(f"{asked.name}: {error}") from error
    for asked, answer in zip(batch, policy.answer(questions), strict=True):
        yield _record(asked.name, answer, validator)


def _record(name: str, answer: Answer, validator: ActionValidator) -> dict[str, Any]:
    """An answer as JSON."""
    checked = validator.check(answer.unnorm_key, answer.actions, None)
    spent = answer.latency
    parts = {"preprocess": spent.preprocess, "prefill": spent.prefill, "decode": spent.decode}
    return {
        "image": name,
        "unnorm_key": answer.unnorm_key,
        "actions": checked.actions.tolist(),
        "clamped": [one.as_record() for one in checked.clamped],
        "bins": answer.bins.tolist(),
        "probabilities": _rounded(answer.probabilities),
        "entropies": _rounded(answer.entropies),
        "latency_ms": {part: round(ms, 2) for part, ms in (parts | {"total": spent.total}).items()},
    }


def _rounded(values: NDArray[np.float32]) -> list[list[float]]:
    return [[round(float(value), 4) for value in row] for row in values]


def _asked(options: ActOptions, codec: ActionCodec) -> Iterator[_Asked]:
    """The observations, one by one. Raises: UserError for what cannot be read."""
    if (options.requests is None) == (not options.images):
        raise UserError("give either --image or --requests")
    if options.requests is not None:
        yield from _of_requests(options.requests, options, codec)
        return
    state = None if options.state is None else _numbers(options.state)
    for i, seen in enumerate(_seen(options, codec)):
        images = {camera: picture.rgb for camera, picture in seen.items()}
        yield _Asked(
            next(iter(seen.values())).name,
            Observation(images, options.instruction or "", options.unnorm_key, state, options.seed + i),
        )


def _seen(options: ActOptions, codec: ActionCodec) -> Iterator[dict[str, Picture]]:
    """What the cameras saw, control step by control step."""
    cameras = _cameras(codec, options.unnorm_key)
    if len(cameras) == 1 and not any("=" in image and not Path(image).exists() for image in options.images):
        for image in options.images:
            yield from ({cameras[0]: picture} for picture in pictures(Path(image), options.stride))
        return
    streams: dict[str, Path] = {}
    for camera, path in (_camera_and_path(image, cameras) for image in options.images):
        if camera in streams:
            raise UserError(f"--image {camera}={path}: {camera} is {streams[camera]} already")
        streams[camera] = path
    if missing := [camera for camera in cameras if camera not in streams]:
        raise UserError(
            f"--image: the checkpoint was trained on {', '.join(cameras)}; missing: {missing[0]}=PATH"
        )
    for seen in zip_longest(*(pictures(path, options.stride) for path in streams.values())):
        if None in seen:
            raise UserError("--image: the cameras have not the same number of pictures")
        yield dict(zip(streams, seen, strict=True))


def _camera_and_path(image: str, cameras: tuple[str, ...]) -> tuple[str, Path]:
    camera, _, path = image.partition("=")
    if not path:
        raise UserError(
            f"--image {image}: of several cameras; write CAMERA=PATH, CAMERA one of {', '.join(cameras)}"
        )
    if camera not in cameras:
        raise UserError(f"--image {image}: no camera {camera!r}{did_you_mean(camera, list(cameras))}")
    return camera, Path(path)


def _cameras(codec: ActionCodec, key: str | None) -> tuple[str, ...]:
    """Of the dataset that is asked about; of all, while it is not known which that is."""
    if key is None and len(codec.datasets) == 1:
        key = next(iter(codec.datasets))
    return codec.asking_of(key or "").cameras


def _of_requests(file: Path, options: ActOptions, codec: ActionCodec) -> Iterator[_Asked]:
    try:
        lines = file.read_text(encoding="utf-8").split("\n")  # JSON's strings may hold other ends of lines
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: is no UTF-8 text; requests are lines of JSON") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        request = parse_model(_Request, line.encode(), f"{file}:{number}", "a request")
        if request.image and request.images:
            raise UserError(f"{file}:{number}: has image and images; give one of them")
        cameras = _cameras(codec, request.unnorm_key or options.unnorm_key)
        paths = request.images or ({cameras[0]: request.image} if request.image else {})
        images = {}
        for camera, path in paths.items():
            images[camera] = read_picture(file.parent / path).rgb
        yield _Asked(
            f"{file}:{number}",
            Observation(
                images,
                request.instruction or options.instruction or "",
                request.unnorm_key or options.unnorm_key,
                None if request.state is None else np.array(request.state),
                options.seed + number - 1 if request.seed is None else request.seed,
            ),
        )


def _numbers(text: str) -> NDArray[np.float64]:
    try:
        return np.array([float(word) for word in text.replace(",", " ").split()])
    except ValueError as error:
        raise UserError(f'--state {text!r}: give numbers, as "0.31 -0.02 0.15"') from error


def _spread(milliseconds: list[float]) -> str:
    p50, p95 = np.percentile(milliseconds, [50, 95])
    return f"p50 {p50:.0f} ms, p95 {p95:.0f} ms"
