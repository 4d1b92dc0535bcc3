"""Actions to tokens and back, in one file: the converter, the trainer, the decoder and the server all import
this one.

Movements (masked dimensions) are scaled by their dataset's 1 % and 99 % quantiles to [-1, 1]; the gripper
stays in [0, 1]. Both fall into the same 256 bins over [-1, 1], and bin i is the token <ACTION_i>.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator

from convert.prompt import Asking, CameraRole
from oxe_mix.errors import UserError, did_you_mean
from oxe_mix.files import read_model, write_json

CODEC_FILE = "action_codec.json"
NUM_BINS = 256
# OpenVLA's guard against a zero range; with it, its statistics and ours give the same normalised values.
_EPSILON = 1e-8
_TOKEN = re.compile(r"<ACTION_(\d+)>")

Floats = NDArray[np.floating]
Bins = NDArray[np.int64]
# openvla255: 256 edges from -1 to 1, so 255 intervals, and the value 1 itself in a 256th bin that decodes as
# the last interval. For those who load OpenVLA's data or checkpoints.
Binning = Literal["uniform256", "openvla255"]
_OPENVLA_EDGES = np.linspace(-1, 1, NUM_BINS)


class ActionStats(BaseModel):
    """One dataset's action statistics over every step on disk, [A] each, in robot units; mask true: a
    movement.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    q01: tuple[FiniteFloat, ...]
    q99: tuple[FiniteFloat, ...]
    mean: tuple[FiniteFloat, ...]
    std: tuple[FiniteFloat, ...]
    min: tuple[FiniteFloat, ...]
    max: tuple[FiniteFloat, ...]
    mask: tuple[bool, ...]
    num_transitions: int
    num_trajectories: int

    @model_validator(mode="after")
    def _widths_agree(self) -> ActionStats:
        columns = (self.q01, self.q99, self.mean, self.std, self.min, self.max, self.mask)
        if len({len(column) for column in columns}) > 1:
            raise ValueError("q01, q99, mean, std, min, max and mask differ in length")
        return self

    @property
    def constant(self) -> NDArray[np.bool_]:
        """Dimensions that never change in the whole dataset, [A]."""
        return np.equal(self.min, self.max)

    def possible_bins(self, binning: Binning) -> NDArray[np.bool_]:
        """The bins that mean something, [A, NUM_BINS]: all for a movement, the upper half for a gripper."""
        upper = np.arange(NUM_BINS) >= _first_gripper_bin(binning)
        return np.array(self.mask)[:, None] | upper

    @property
    def moving(self) -> NDArray[np.bool_]:
        """Dimensions worth measuring, [A]: a model gets the others right without looking."""
        return ~self.constant


def action_tokens() -> list[str]:
    """The 256 tokens, in order of their bins."""
    return [f"<ACTION_{i}>" for i in range(NUM_BINS)]


def normalize(actions: Floats, stats: ActionStats) -> NDArray[np.float64]:
    """Robot units to the codec's range.

    Args:
        actions: [T, A], robot units, gripper last with 0 closed and 1 open.

    Returns: float64 [T, A]; movements in [-1, 1], a constant one 0; the gripper as it is, limited to [0, 1].
    Raises: ValueError when a value is not finite or the width is not the dataset's.
    Source: OpenVLA's bounds_q99, but a constant gripper keeps its value: zeroed, an always-open one would
    read closed.
    """
    _check(actions, len(stats.mask))
    x = actions.astype(np.float64)
    q01, q99 = np.array(stats.q01), np.array(stats.q99)
    scaled = np.clip(2 * (x - q01) / (q99 - q01 + _EPSILON) - 1, -1, 1)
    scaled = np.where(stats.constant, 0.0, scaled)
    return np.where(np.array(stats.mask), scaled, np.clip(x, 0, 1))


def unnormalize(normalized: Floats, stats: ActionStats) -> NDArray[np.float64]:
    """The codec's range to robot units: the inverse of `normalize` for values inside [q01, q99].

    Args:
        normalized: [T, A], movements in [-1, 1], gripper in [0, 1].

    Returns: float64 [T, A], robot units; a constant movement gets its constant.
    Raises: ValueError when a value is not finite or the width is not the dataset's.
    """
    _check(normalized, len(stats.mask))
    x = normalized.astype(np.float64)
    q01, q99 = np.array(stats.q01), np.array(stats.q99)
    movement = np.where(stats.constant, q01, (x + 1) / 2 * (q99 - q01 + _EPSILON) + q01)
    return np.where(np.array(stats.mask), movement, x)


def normalized_to_bins(normalized: Floats, binning: Binning = "uniform256") -> Bins:
    """Quantize into NUM_BINS bins over [-1, 1].

    Args:
        normalized: [T, A], dimensionless.
        binning: `uniform256`: equal bins; `openvla255`: OpenVLA's.

    Returns: int64 [T, A] in [0, NUM_BINS - 1]; values outside [-1, 1] go to the end bins.
    Raises: ValueError if a value is not finite, naming the first step and dimension.
    Source: RT-2 (arXiv:2307.15818), 256 uniform bins; OpenVLA's ActionTokenizer, 256 edges.
    """
    _check(normalized, normalized.shape[-1])
    if binning == "openvla255":
        return np.digitize(np.clip(normalized, -1, 1), _OPENVLA_EDGES).astype(np.int64) - 1
    # +1 itself belongs to the last bin, not to a 257th.
    return np.clip(np.floor((normalized + 1) / 2 * NUM_BINS), 0, NUM_BINS - 1).astype(np.int64)


def bins_to_normalized(bins: Bins, binning: Binning = "uniform256") -> NDArray[np.float64]:
    """Bin centres, dimensionless, in (-1, 1). Raises: ValueError for a bin outside [0, NUM_BINS - 1]."""
    if ((bins < 0) | (bins >= NUM_BINS)).any():
        raise ValueError(f"bin {bins[(bins < 0) | (bins >= NUM_BINS)][0]} is not in [0, {NUM_BINS - 1}]")
    if binning == "openvla255":
        low = np.minimum(bins, NUM_BINS - 2)
        return np.asarray((_OPENVLA_EDGES[low] + _OPENVLA_EDGES[low + 1]) / 2)
    return (bins + 0.5) / NUM_BINS * 2 - 1


def encode(actions: Floats, stats: ActionStats, binning: Binning = "uniform256") -> Bins:
    """Robot units [T, A] to bins [T, A]. Raises: as `normalize`."""
    return normalized_to_bins(normalize(actions, stats), binning)


def decode(bins: Bins, stats: ActionStats, binning: Binning = "uniform256") -> NDArray[np.float64]:
    """Bins [T, A] to robot units [T, A].

    Raises: ValueError for wrong widths, unknown bins, and a gripper in the lower half, which no recording
        has.
    """
    normalized = bins_to_normalized(bins, binning)
    _check(normalized, len(stats.mask))
    low = ~np.array(stats.mask) & (bins < _first_gripper_bin(binning))
    if low.any():
        t, a = np.argwhere(low)[0]
        raise ValueError(f"step {t}, dimension {a}: bin {bins[t, a]} is below a gripper's range")
    return unnormalize(normalized, stats)


def _first_gripper_bin(binning: Binning) -> int:
    """The bin of gripper 0; with OpenVLA's edges it is the one around 0."""
    return NUM_BINS // 2 - (binning == "openvla255")


def clipped(actions: Floats, stats: ActionStats) -> NDArray[np.bool_]:
    """Where encoding loses range, [T, A]: movements outside [q01, q99], grippers outside [0, 1]."""
    low = np.where(np.array(stats.mask), np.array(stats.q01), 0.0)
    high = np.where(np.array(stats.mask), np.array(stats.q99), 1.0)
    return (actions < low) | (actions > high)


def bins_to_text(bins: Bins) -> str:
    """One step's bins [A], or a chunk's [H, A] step by step, as the answer of a conversation."""
    return "".join(f"<ACTION_{i}>" for i in bins.ravel())


def text_to_bins(text: str, width: int) -> Bins:
    """The answer of a conversation back to bins, [H, width].

    Raises: ValueError for anything but whole steps of known action tokens.
    """
    found = [int(number) for number in _TOKEN.findall(text)]
    bins = np.array([min(number, NUM_BINS) for number in found], np.int64)
    if bins_to_text(bins) != text.strip() or (bins >= NUM_BINS).any():
        raise ValueError(
            f"{text[:80]!r} is not made of the tokens <ACTION_0> to <ACTION_{NUM_BINS - 1}> alone"
        )
    if not found or len(found) % width:
        raise ValueError(f"{len(found)} action tokens are no whole number of actions of width {width}")
    return bins.reshape(-1, width)


class ActionCodec(BaseModel):
    """action_codec.json: all that is needed to turn tokens into robot units. A checkpoint carries this
    file.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    format: Literal[2] = 2
    binning: Binning = "uniform256"
    action_dim: Annotated[int, Field(gt=0)]
    chunk: Annotated[int, Field(gt=0)] = 1
    asking: Asking = Asking()
    datasets: Annotated[dict[str, ActionStats], Field(min_length=1)]
    states: dict[str, ActionStats] = {}  # of the robots' own state, [S] each, where the prompt holds it
    cameras: dict[str, tuple[CameraRole, ...]] = {}  # of each dataset that has not all of asking's

    @model_validator(mode="after")
    def _widths_agree(self) -> ActionCodec:
        for name, stats in self.datasets.items():
            if len(stats.mask) != self.action_dim:
                raise ValueError(
                    f"{name} has actions of width {len(stats.mask)}, action_dim is {self.action_dim}"
                )
        return self

    def stats(self, unnorm_key: str | None) -> tuple[str, ActionStats]:
        """The dataset whose statistics turn bins into robot units; with one dataset it need not be named.

        Raises: UserError when it must be named and is not, or is unknown, with the list.
        """
        if unnorm_key is None:
            if len(self.datasets) > 1:
                raise UserError(
                    f"name the robot with --unnorm-key, one of: {', '.join(sorted(self.datasets))}"
                )
            return next(iter(self.datasets.items()))
        if unnorm_key not in self.datasets:
            raise UserError(
                f"unknown --unnorm-key {unnorm_key!r}{did_you_mean(unnorm_key, list(self.datasets))}"
            )
        return unnorm_key, self.datasets[unnorm_key]

    def asking_of(self, name: str) -> Asking:
        """How one dataset is asked about: without the cameras and the state that it does not have."""
        own = {
            "cameras": self.cameras.get(name, self.asking.cameras),
            "state": self.asking.state and name in self.states,
        }
        return self.asking.model_copy(update=own)

    @property
    def tokens_per_answer(self) -> int:
        """Action tokens in one answer: A per step, H steps."""
        return self.action_dim * self.chunk


def read_codec(folder: Path) -> ActionCodec:
    """The codec of a converted folder or of a checkpoint. Raises: UserError when it has none or a broken
    one.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give one that oxe-mix convert or make train wrote")
    return read_model(ActionCodec, folder / CODEC_FILE, "the action codec that oxe-mix convert writes")


def write_codec(folder: Path, codec: ActionCodec) -> None:
    """Write the codec into a folder."""
    write_json(folder / CODEC_FILE, codec.model_dump(mode="json"))


def _check(values: Floats, width: int) -> None:
    if values.ndim != 2 or values.shape[1] != width:
        raise ValueError(f"actions of shape {values.shape}; expected [T, {width}]")
    if not np.isfinite(values).all():
        t, a = np.argwhere(~np.isfinite(values))[0]
        raise ValueError(f"step {t}, dimension {a}: action is {values[t, a]}; drop this episode or mend it")
