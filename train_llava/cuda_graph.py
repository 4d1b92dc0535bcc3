"""One decoding pass, recorded on a GPU and replayed: of a small batch most of the time is Python's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache

_WARM_UP = 3  # passes before the recording, as PyTorch asks for
Pass = Callable[[Tensor, Tensor, Tensor, StaticCache], Tensor]


@dataclass(frozen=True, slots=True)
class _Recording:
    graph: Any
    inputs: tuple[Tensor, ...]
    output: Tensor
    cache: StaticCache


class GraphedStep:
    """Calls a pass by replaying it. Shapes and the cache's place in memory must be those of the recording;
    for others there is a new one.
    """

    def __init__(self, run: Pass) -> None:
        self._run = run
        self._recording: _Recording | None = None

    def __call__(self, ids: Tensor, positions: Tensor, seen: Tensor, cache: StaticCache) -> Tensor:
        """What the pass returns for these inputs; overwritten by the next call."""
        inputs, recorded = (ids, positions, seen), self._recording
        if recorded is None or recorded.cache is not cache or recorded.inputs[2].shape != seen.shape:
            recorded = self._recording = self._record(inputs, cache)
        for own, given in zip(recorded.inputs, inputs, strict=True):
            own.copy_(given)
        recorded.graph.replay()
        return recorded.output

    def _record(self, inputs: tuple[Tensor, ...], cache: StaticCache) -> _Recording:
        held = [length.clone() for length in lengths_of(cache)]
        own = tuple(value.clone() for value in inputs)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP):
                self._run(own[0], own[1], own[2], cache)
                self._rewind(cache, held)
        torch.cuda.current_stream().wait_stream(side)
        graph: Any = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = self._run(own[0], own[1], own[2], cache)
        self._rewind(cache, held)
        return _Recording(graph, own, output, cache)

    @staticmethod
    def _rewind(cache: StaticCache, held: list[Tensor]) -> None:
        """The warm-up's tokens are written again by the replay; only where the cache ends is put back."""
        for length, before in zip(lengths_of(cache), held, strict=True):
            length.copy_(before)


def lengths_of(cache: StaticCache) -> list[Tensor]:
    """How many tokens each layer holds: a number on the device, which decides where the next ones go."""
    layers: list[Any] = list(cache.layers)
    return [layer.cumulative_length for layer in layers]
