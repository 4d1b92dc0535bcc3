"""What a training step is worth: its FLOPs, the device's peak, attention kernels timed, steps timed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu_model import LoraLinear, NewRowsHead, Shape, decoder_layers

# Dense bf16 FLOP/s by the vendor's data sheets; the first name found in the device's own counts.
PEAKS = {
    "H200": 989e12,
    "GH200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}
BACKENDS = {
    "torch flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "torch efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 peak of a device, None for one that is not in the table."""
    return next((peak for name, peak in PEAKS.items() if name in device_name), None)


@dataclass(frozen=True, slots=True)
class Tokens:
    """What a sample costs on average: views of the tower, positions of the language model."""

    views: int
    patches: int  # of one view
    visual: int  # positions that a frame takes in the language model
    text: int
    supervised: int  # of the text

    @property
    def total(self) -> int:
        """Real positions of a mean sample; padding is not counted."""
        return self.visual + self.text


@dataclass(frozen=True, slots=True)
class Flops:
    """Model FLOPs of a mean sample, forward and backward; recomputation is not counted."""

    weights: float  # 2 a weight and token forward, 2 for the activation's gradient, 2 for a trained weight's
    attention: float  # its two products of activations; a causal model needs half of them


def flops_per_sample(model: Any, shape: Shape, tokens: Tokens) -> Flops:
    """Count a sample. The head counts at the supervised positions only, in both loops."""
    tower = model.model.vision_tower
    tower_is_trained = any(param.requires_grad for param in tower.parameters())
    seen = tokens.views * tokens.patches
    weights = _weights(tower, seen, backward=tower_is_trained)
    weights += _weights(model.model.multi_modal_projector, seen, backward=tower_is_trained)
    weights += sum(_weights(layer, tokens.total, backward=True) for layer in decoder_layers(model))
    weights += _weights(model.lm_head, tokens.supervised, backward=True)
    passes = 3 if tower_is_trained else 1  # a backward pass is two forward passes
    looked = 4 * tokens.patches**2 * shape.tower.hidden * shape.tower.layers * tokens.views * passes
    read = 2 * tokens.total**2 * shape.hidden * shape.layers * 3
    return Flops(weights, looked + read)


def _weights(module: nn.Module, num_tokens: int, *, backward: bool) -> float:
    """FLOPs of a module's matrices over some tokens; `backward` when its input needs a gradient."""
    total = 0.0
    for part in module.modules():
        matrices: list[Tensor] = []
        if isinstance(part, nn.Linear | nn.Conv2d):
            matrices = [part.weight]
        elif isinstance(part, LoraLinear):
            matrices = [part.down, part.up]
        elif isinstance(part, NewRowsHead):
            matrices = [part.table, part.rows]
        to_input = backward and not isinstance(part, nn.Conv2d)  # pixels need no gradient
        total += sum(m.numel() * (2 + 2 * to_input + 2 * m.requires_grad) for m in matrices)
    return total * num_tokens


def attention_times(
    shape: Shape, tokens: Tokens, batch: int, device: torch.device
) -> dict[str, float | None]:
    """Milliseconds of all attention layers of a step, forward and backward, by kernel; None: refused."""
    text = _inputs(batch, tokens.total, (shape.heads, shape.kv_heads), shape.hidden // shape.heads, device)
    heads = shape.tower.heads
    view = _inputs(batch, tokens.patches, (heads, heads), shape.tower.hidden // heads, device)

    def layers(context: Callable[[], AbstractContextManager[Any]]) -> float | None:
        def one(inputs: list[Tensor], *, causal: bool) -> float:
            return _milliseconds(lambda: _attend(inputs, causal=causal), context, device)

        try:
            return shape.layers * one(text, causal=True) + shape.tower.layers * one(view, causal=False)
        except RuntimeError:  # this kernel takes no such heads, or there is none on this device
            return None

    times = {"torch's choice": layers(nullcontext)}
    return times | {name: layers(lambda b=backend: sdpa_kernel(b)) for name, backend in BACKENDS.items()}  # type: ignore[misc]


def _inputs(batch: int, length: int, heads: tuple[int, int], dim: int, device: torch.device) -> list[Tensor]:
    """Queries, keys and values laid out as the models have them: heads behind positions in memory."""
    shapes = [(batch, length, heads[0], dim), (batch, length, heads[1], dim), (batch, length, heads[1], dim)]
    made = [torch.randn(shape, device=device, dtype=torch.bfloat16).transpose(1, 2) for shape in shapes]
    return [one.requires_grad_() for one in made]


def _attend(inputs: list[Tensor], *, causal: bool) -> None:
    query, key, value = inputs
    grouped = query.shape[1] != key.shape[1]
    out = functional.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=grouped)
    out.backward(out.detach())


def _milliseconds(
    work: Callable[[], None], context: Callable[[], AbstractContextManager[Any]], device: torch.device
) -> float:
    times = []
    with context():
        for _ in range(8 if device.type == "cuda" else 2):
            synchronize(device)
            start = time.perf_counter()
            work()
            synchronize(device)
            times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def best_kernel(times: dict[str, float | None]) -> str:
    """The kernel of the smallest time."""
    known = {name: value for name, value in times.items() if value is not None}
    return min(known, key=lambda name: known[name])


def kernel_context(name: str) -> AbstractContextManager[Any]:
    """Prefer a kernel; what it refuses goes to the others, so that no step fails for it."""
    if name not in BACKENDS:
        return nullcontext()
    others = [backend for backend in BACKENDS.values() if backend != BACKENDS[name]]
    context: AbstractContextManager[Any] = sdpa_kernel(
        [BACKENDS[name], *others, SDPBackend.MATH], set_priority=True
    )
    return context


def synchronize(device: torch.device) -> None:
    """Wait until the GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(slots=True)
class Clock:
    """Seconds of steps and of the waits for data inside them; warm-up steps are left out."""

    warmup: int
    measured: int
    until: float  # no step begins after this time.monotonic(), once three are measured
    device: torch.device
    steps: list[float] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    _last: float = 0.0
    _begun: float = 0.0

    def start(self) -> None:
        """The loop begins, and with it the first wait."""
        self._last = time.perf_counter()

    def have_data(self) -> None:
        """A batch is there."""
        self._begun = time.perf_counter()

    def done(self) -> bool:
        """A step ended on the device. Returns: whether the loop should end."""
        synchronize(self.device)
        now = time.perf_counter()
        self.steps.append(now - self._last)
        self.waits.append(self._begun - self._last)
        self._last = now
        counted = len(self.steps) - self.warmup
        return counted >= self.measured or (counted >= 3 and time.monotonic() > self.until)

    def figures(self) -> tuple[float, float, float]:
        """Median and mean seconds of a step, and the share of all time spent waiting for data.

        The share is over sums: in a median a loader that stalls at every tenth step never shows.
        """
        steps, waits = self.steps[self.warmup :], self.waits[self.warmup :]
        return statistics.median(steps), statistics.mean(steps), sum(waits) / sum(steps)
