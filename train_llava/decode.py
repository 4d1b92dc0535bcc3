"""Tokens to actions: prefill once, then exactly A x H greedy tokens among the 256 action ids, batched, with a
KV cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from convert import action_codec
from convert.action_codec import ActionCodec, Bins
from convert.prompt import IMAGE
from train_llava.action_tokens import prove_action_tokens
from train_llava.model import OneViewLlava
from train_llava.processor import OneViewProcessor, View


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the model answers for a batch.

    bins: int64 [B, H, A]; probabilities: float32 [B, H, A], the model's own, of each bin among those
        possible.
    """

    bins: Bins
    probabilities: NDArray[np.float32]


class ActionDecoder:
    """A trained model with its processor and codec, ready to act."""

    def __init__(self, model: OneViewLlava, processor: OneViewProcessor, codec: ActionCodec) -> None:
        """Raises: UserError when the tokenizer does not hold the 256 action tokens."""
        self._model, self._processor, self._codec = model, processor, codec
        self._action_ids = torch.tensor(prove_action_tokens(processor.tokenizer), device=model.device)

    def predict(self, questions: list[str], views: Sequence[View], unnorm_keys: list[str]) -> Prediction:
        """Answer a batch of questions.

        Args:
            questions: human turns, each with its <image> markers.
            views: all frames in order of the questions.
            unnorm_keys: the dataset of each question: bins that its actions cannot have are not picked.

        Returns: greedy bins and their probabilities. Same bins alone as in a batch: prompts are padded on the
        left.
        """
        left = iter(self._processor.num_view_tokens(view.size) for view in views)
        prompts = [
            self._processor.prompt_ids(question, list(islice(left, question.count(IMAGE))))
            for question in questions
        ]
        ids, mask = self._left_padded(prompts)
        frames = {
            name: torch.from_numpy(value).to(self._model.device)
            for name, value in self._processor.frames(views).items()
        }
        was_training = self._model.training
        self._model.eval()
        with torch.inference_mode():
            picked, probabilities = self._greedy(ids, mask, frames, self._possible(unnorm_keys))
        self._model.train(was_training)
        shape = (len(questions), self._codec.chunk, self._codec.action_dim)
        return Prediction(
            picked.numpy(force=True).reshape(shape), probabilities.numpy(force=True).reshape(shape)
        )

    def _possible(self, unnorm_keys: list[str]) -> Tensor:
        """Which bins may follow, [B, A x H, 256]."""
        steps = [
            np.tile(self._codec.stats(key)[1].possible_bins(self._codec.binning), (self._codec.chunk, 1))
            for key in unnorm_keys
        ]
        return torch.from_numpy(np.stack(steps)).to(self._model.device)

    def _greedy(
        self, ids: Tensor, mask: Tensor, frames: dict[str, Tensor], possible: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Bins and probabilities, [B, A x H] each: one pass over the prompt, then one per further token."""
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        out = self._model.hidden_states(
            ids, **frames, attention_mask=mask, position_ids=positions, use_cache=True
        )
        bins: list[Tensor] = []
        probabilities: list[Tensor] = []
        for i in range(self._codec.tokens_per_answer):
            if bins:
                mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
                out = self._model.hidden_states(
                    self._action_ids[bins[-1]][:, None],
                    attention_mask=mask,
                    position_ids=mask.sum(dim=1, keepdim=True) - 1,
                    past_key_values=out.past_key_values,
                    use_cache=True,
                )
            logits = self._model.lm_head(out.last_hidden_state[:, -1]).float()[:, self._action_ids]
            best = logits.masked_fill(~possible[:, i], -torch.inf).softmax(dim=-1).max(dim=-1)
            bins.append(best.indices)
            probabilities.append(best.values)
        return torch.stack(bins, dim=1), torch.stack(probabilities, dim=1)

    def _left_padded(self, prompts: list[list[int]]) -> tuple[Tensor, Tensor]:
        length = max(map(len, prompts))
        pad = int(self._processor.tokenizer.pad_token_id)
        ids = [[pad] * (length - len(prompt)) + prompt for prompt in prompts]
        mask = [[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        return torch.tensor(ids, device=self._model.device), torch.tensor(mask, device=self._model.device)


def action_record(codec: ActionCodec, prediction: Prediction, unnorm_key: str | None) -> dict[str, Any]:
    """The first prediction of a batch as JSON: actions [H, A] in robot units, bins and probabilities beside
    them.

    Raises: UserError for an unnorm_key that is missing or unknown.
    """
    key, stats = codec.stats(unnorm_key)
    return {
        "unnorm_key": key,
        "actions": action_codec.decode(prediction.bins[0], stats, codec.binning).tolist(),
        "bins": prediction.bins[0].tolist(),
        "probabilities": [[round(float(p), 4) for p in row] for row in prediction.probabilities[0]],
    }
