"""Tokens to actions: one pass over the prompt, then exactly A x H tokens among the 256 action ids, or all of
them from that one pass where the model was trained with slots; batched, with a static cache.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from transformers import StaticCache

from convert.action_codec import NUM_BINS, ActionCodec, Bins
from convert.prompt import IMAGE
from train_llava.action_tokens import prove_action_tokens
from train_llava.attention import masked, unpadded, visible
from train_llava.cuda_graph import GraphedStep
from train_llava.last_layer import ends_only
from train_llava.model import OneViewLlava
from train_llava.processor import OneViewProcessor, View
from train_llava.prompt_cache import PromptCache
from train_llava.slots import check_slots, slot_ids


@dataclass(frozen=True, slots=True)
class Sampling:
    """Draw bins instead of taking the most likely: softmax of logits / temperature.

    seeds: of each question, so that its draw does not depend on what it is batched with.
    """

    temperature: float
    seeds: Sequence[int]


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the model answers for a batch.

    bins: int64 [B, H, A]. probabilities: float32 [B, H, A], the model's own, of each bin among those
    possible. entropies: float32 [B, H, A], nats, of that distribution. prepare_ms, prefill_ms, decode_ms: of
    ids and pixels, of the pass over the prompt, and of all passes after it. reused: prompt tokens that were
    in the cache already.
    """

    bins: Bins
    probabilities: NDArray[np.float32]
    entropies: NDArray[np.float32]
    prepare_ms: float
    prefill_ms: float
    decode_ms: float
    reused: int


@dataclass(frozen=True, slots=True)
class _Batch:
    """A batch on the model's device.

    ids: [B, L], padded on the left. first: [B], where each row begins. is_padded: whether any row is.
    possible: bool [B, A x H, 256].
    noise: float32 [B, A x H, 256], where bins are drawn.
    """

    ids: Tensor
    first: Tensor
    is_padded: bool
    frames: dict[str, Tensor]
    possible: Tensor
    noise: Tensor | None


@dataclass(frozen=True, slots=True)
class _Picked:
    """[B, n] each, on the device."""

    bins: Tensor
    probabilities: Tensor
    entropies: Tensor


class ActionDecoder:
    """A trained model with its processor and codec, ready to act."""

    def __init__(
        self,
        model: OneViewLlava,
        processor: OneViewProcessor,
        codec: ActionCodec,
        *,
        reuse: bool = False,
        cuda_graph: bool = False,
    ) -> None:
        """What does not change from one answer to the next.

        Args:
            reuse: keep the prompt's keys and values up to its first frame for the next answer, while
                questions come one at a time. Not while the weights still change.
            cuda_graph: replay one recorded pass per token. Needs a CUDA device; not tried on one yet.

        Raises: UserError when the tokenizer does not hold the 256 action tokens, or not the codec's slots.
        """
        self._model, self._processor, self._codec = model, processor, codec
        self._action_ids = torch.tensor(prove_action_tokens(processor.tokenizer), device=model.device)
        self._slots = slot_ids(processor.tokenizer)
        check_slots(self._slots, codec.tokens_per_answer)
        self._kept = PromptCache(model.config, int(model.config.image_token_id), keep=reuse)
        self._graph = GraphedStep(self._pass) if cuda_graph else None

    @property
    def is_parallel(self) -> bool:
        """Whether one pass answers all tokens."""
        return bool(self._slots)

    def predict(
        self,
        questions: Sequence[str],
        views: Sequence[View],
        unnorm_keys: Sequence[str],
        sampling: Sampling | None = None,
    ) -> Prediction:
        """Answer a batch of questions.

        Args:
            questions: human turns, each with its <image> markers.
            views: all frames in order of the questions.
            unnorm_keys: the dataset of each question: bins that its actions cannot have are not picked.
            sampling: None: the most likely bins.

        Returns: the same bins alone as in a batch: prompts are padded on the left.
        """
        begun = time.perf_counter()
        prompts = self._prompts(questions, views)
        temperature = 1.0 if sampling is None else sampling.temperature
        was_training = self._model.training
        self._model.eval()
        try:
            batch = self._batch(prompts, views, unnorm_keys, sampling)
            prepared = (time.perf_counter() - begun) * 1000
            attending = masked if batch.is_padded else unpadded
            with torch.inference_mode(), attending(self._model.model.language_model):
                picked, times, reused = self._answer(prompts, batch, temperature)
        finally:
            self._model.train(was_training)
        shape = (len(questions), self._codec.chunk, self._codec.action_dim)
        return Prediction(
            picked.bins.numpy(force=True).reshape(shape),
            picked.probabilities.numpy(force=True).reshape(shape),
            picked.entropies.numpy(force=True).reshape(shape),
            prepared,
            *times,
            reused,
        )

    def _prompts(self, questions: Sequence[str], views: Sequence[View]) -> list[list[int]]:
        left = iter(self._processor.num_view_tokens(view.size) for view in views)
        return [
            self._processor.prompt_ids(question, list(islice(left, question.count(IMAGE)))) + self._slots
            for question in questions
        ]

    def _batch(
        self,
        prompts: list[list[int]],
        views: Sequence[View],
        unnorm_keys: Sequence[str],
        sampling: Sampling | None,
    ) -> _Batch:
        device, length = self._model.device, max(map(len, prompts))
        pad = int(self._processor.tokenizer.pad_token_id)
        ids = [[pad] * (length - len(prompt)) + prompt for prompt in prompts]
        frames = self._processor.frames(views)
        noise = None
        if sampling is not None:
            shape = (self._codec.tokens_per_answer, NUM_BINS)
            # The most likely of logits with Gumbel noise is a draw from their softmax.
            drawn = [np.random.default_rng(seed).gumbel(size=shape) for seed in sampling.seeds]
            noise = torch.from_numpy(np.stack(drawn).astype(np.float32)).to(device)
        return _Batch(
            torch.tensor(ids, device=device),
            torch.tensor([length - len(prompt) for prompt in prompts], device=device),
            min(map(len, prompts)) < length,
            {name: torch.from_numpy(value).to(device) for name, value in frames.items()},
            self._possible(unnorm_keys),
            noise,
        )

    def _possible(self, unnorm_keys: Sequence[str]) -> Tensor:
        """Which bins may follow, [B, A x H, 256]."""
        steps = [
            np.tile(self._codec.stats(key)[1].possible_bins(self._codec.binning), (self._codec.chunk, 1))
            for key in unnorm_keys
        ]
        return torch.from_numpy(np.stack(steps)).to(self._model.device)

    def _answer(
        self, prompts: list[list[int]], batch: _Batch, temperature: float
    ) -> tuple[_Picked, tuple[float, float], int]:
        start = self._now()
        cache, reused = self._cache(prompts)
        picked = [self._pick(self._prefill(batch, cache, reused), batch, 0, temperature)]
        if cache is not None:
            self._kept.filled(prompts, cache)
        # Asked for the time, a GPU is waited for; that costs nothing at an answer's end, and once here.
        middle = self._now()
        if not self._slots:
            assert cache is not None
            for i in range(1, self._codec.tokens_per_answer):
                hidden = self._step(picked[-1].bins, batch, batch.ids.shape[1] + i - 1, cache)
                picked.append(self._pick(hidden, batch, i, temperature))
        parts = [torch.cat([getattr(one, name) for one in picked], dim=1) for name in _Picked.__slots__]
        times = ((middle - start) * 1000, (self._now() - middle) * 1000)
        return _Picked(*parts), times, reused

    def _cache(self, prompts: list[list[int]]) -> tuple[StaticCache | None, int]:
        """The cache to fill, if one is of use, and how many tokens of the prompt it holds already."""
        if self._slots:
            return (
                self._kept.take(prompts, len(self._slots), 0) if self._kept.keeps(len(prompts)) else (None, 0)
            )
        return self._kept.take(prompts, 1, self._codec.tokens_per_answer - 1)

    def _prefill(self, batch: _Batch, cache: StaticCache | None, start: int) -> Tensor:
        """Compute the prompt from `start` on; hidden states of the slots, or of its last token, [B, n, D]."""
        rows, length = batch.ids.shape
        places = torch.arange(start, length, device=batch.ids.device)
        attending: dict[str, Any] = {"num_keys": length, "num_slots": len(self._slots)}
        if batch.is_padded:
            reach = places.clone()
            if self._slots:
                reach[-len(self._slots) :] = length - 1
            num_keys = length if cache is None else cache.get_max_length()
            attending = {"seen": visible(batch.first, reach.expand(rows, -1), num_keys, start)}
        num = max(1, len(self._slots))
        with ends_only(self._model.model.language_model, num):
            hidden: Tensor = self._model.hidden_states(
                batch.ids[:, start:],
                **batch.frames,
                **attending,
                position_ids=(places - batch.first[:, None]).clamp(min=0),
                past_key_values=cache,
                use_cache=cache is not None,
            ).last_hidden_state
        return hidden[:, -num:]

    def _step(self, bins: Tensor, batch: _Batch, place: int, cache: StaticCache) -> Tensor:
        """Hidden states [B, 1, D] of the token that was picked last, which stands at `place`."""
        reach = torch.full((len(bins), 1), place, device=bins.device)
        ids, positions = self._action_ids[bins], reach - batch.first[:, None]
        if self._graph is None and not batch.is_padded:
            return self._pass(ids, positions, None, cache, num_keys=place + 1, num_slots=0)
        seen = visible(batch.first, reach, cache.get_max_length(), place)
        if self._graph is None:
            return self._pass(ids, positions, seen, cache)
        with masked(self._model.model.language_model):  # what is recorded cannot grow with the prompt
            return self._graph(ids, positions, seen, cache)

    def _pass(
        self, ids: Tensor, positions: Tensor, seen: Tensor | None, cache: StaticCache, **attending: Any
    ) -> Tensor:
        hidden: Tensor = self._model.hidden_states(
            ids, seen=seen, position_ids=positions, past_key_values=cache, use_cache=True, **attending
        ).last_hidden_state
        return hidden

    def _pick(self, hidden: Tensor, batch: _Batch, first: int, temperature: float) -> _Picked:
        """The bins of answer tokens `first` and on, from hidden states [B, n, D]."""
        here = slice(first, first + hidden.shape[1])
        scores = self._logits(hidden).float().masked_fill(~batch.possible[:, here], -torch.inf)
        drawn = scores if batch.noise is None else scores / temperature + batch.noise[:, here]
        bins = drawn.argmax(dim=-1)
        shares = scores.softmax(dim=-1)
        own = shares.gather(-1, bins[..., None])[..., 0]
        return _Picked(bins, own, -torch.xlogy(shares, shares).sum(dim=-1))

    def _logits(self, hidden: Tensor) -> Tensor:
        """Of the 256 action ids alone, [B, n, 256]."""
        head: Any = self._model.lm_head
        # Not of a layer that is more than its weight, or whose weight is split over ranks (ZeRO-3).
        if type(head) is nn.Linear and head.weight.dim() == 2:
            return functional.linear(hidden, head.weight[self._action_ids])
        logits: Tensor = head(hidden)[..., self._action_ids]
        return logits

    def _now(self) -> float:
        if self._model.device.type == "cuda":
            torch.cuda.synchronize(self._model.device)
        return time.perf_counter()
