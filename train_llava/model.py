"""The model: stock LLaVA-OneVision weights and layers, with one view per frame or the stock tiles."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import LlavaOnevisionForConditionalGeneration
from transformers.modeling_outputs import CausalLMOutputWithPast

from train_llava.attention import reach_of_slots, visible


class OneViewLlava(LlavaOnevisionForConditionalGeneration):
    """LLaVA-OneVision that takes one view per frame; weights, names and files are the stock class's.

    The stock class knows a single view only beside other images, and fails with it for a batch of one.
    """

    def enable_input_require_grads(self) -> None:
        """Nothing: checkpointing that is not reentrant needs none, and a frozen tower would run backwards."""

    def frame_features(self, pixel_values: Tensor, image_sizes: Tensor | None = None) -> Tensor:
        """Patches [P, 3, S, S] to what stands in for the frames' tokens, [tokens, hidden], newlines included.

        Args:
            image_sizes: [N, 2] height and width of the frames where they are tiled (anyres); without, each
                patch is a frame.
        """
        with self._newline_at_hand():
            if image_sizes is not None:
                return self._tiled(pixel_values.to(self.dtype), image_sizes)
            return self._whole(pixel_values.to(self.dtype))

    def _whole(self, pixel_values: Tensor) -> Tensor:
        layer = self.config.vision_feature_layer
        states = self.model.vision_tower(pixel_values, output_hidden_states=True).hidden_states
        picked = states[layer] if isinstance(layer, int) else torch.cat([states[i] for i in layer], dim=-1)
        if self.config.vision_feature_select_strategy == "default":
            picked = picked[:, 1:]
        features = self.model.multi_modal_projector(picked)
        newline = self.model.image_newline.to(features).expand(len(features), 1, -1)
        return torch.cat([features, newline], dim=1).flatten(0, 1)

    def _tiled(self, pixel_values: Tensor, image_sizes: Tensor) -> Tensor:
        packed: Any = self.model.get_image_features(
            pixel_values,
            image_sizes,
            vision_feature_layer=self.config.vision_feature_layer,
            vision_feature_select_strategy=self.config.vision_feature_select_strategy,
            vision_aspect_ratio="anyres_max_9",
            return_dict=True,
        )
        return torch.cat(list(packed.pooler_output))

    def _newline_at_hand(self) -> AbstractContextManager[Any]:
        """ZeRO stage 3 leaves each rank a part of a weight, and while acting gathers only those of layers."""
        if self.model.image_newline.numel() or torch.is_grad_enabled():
            return nullcontext()
        import deepspeed

        gathered: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters([self.model.image_newline])
        return gathered

    def hidden_states(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | None = None,
        seen: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The language model's output over a batch, not padded but for what `seen` leaves out.

        Args:
            seen: bool [B, 1, Q, K], which keys each query sees; None: all up to itself.

        Raises: ValueError when the ids have not as many image tokens as the frames need.
        """
        embedded = self.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            features = self.frame_features(pixel_values, image_sizes).to(embedded)
            is_frame = input_ids == self.config.image_token_id
            if int(is_frame.sum()) != len(features):
                raise ValueError(f"{int(is_frame.sum())} image tokens, but frames for {len(features)}")
            embedded = embedded.masked_scatter(is_frame[..., None], features)
        return self.model.language_model(
            inputs_embeds=embedded, attention_mask=self._mask(seen, embedded.dtype, kwargs), **kwargs
        )

    def _mask(self, seen: Tensor | None, dtype: torch.dtype, kwargs: dict[str, Any]) -> Any:
        """As the attention kernel takes it; the library takes what has four dimensions as it is."""
        if "num_keys" in kwargs:  # no mask at all, by kind of layer: so the library makes none
            text: Any = self.config.text_config
            return dict.fromkeys(text.layer_types)
        if seen is None or self.model.language_model.config._attn_implementation != "eager":  # noqa: SLF001
            return seen
        hidden = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
        return hidden.masked_fill(~seen, torch.finfo(dtype).min)

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | None = None,
        logits_at: Tensor | None = None,
        slots: Tensor | None = None,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of every position, [B, L, V], or of some alone, [K, V].

        Args:
            input_ids: [B, L], padded at the end, where no token before it ever sees the padding;
                pixel_values: [P, 3, S, S] in order of the image tokens.
            slots: [B, 2], where each row's action slots begin and end; they see one another.
            logits_at: [K] positions in the flattened batch. Over a whole prompt logits would be most of the
                memory.
        """
        seen = None
        if slots is not None:
            length = input_ids.shape[1]
            seen = visible(torch.zeros_like(slots[:, 0]), reach_of_slots(slots, length), length)
        hidden = self.hidden_states(
            input_ids, pixel_values, image_sizes, seen, use_cache=False
        ).last_hidden_state
        if logits_at is not None:
            hidden = hidden.flatten(0, 1)[logits_at]
        if self.training and pixel_values is None:
            # The ranks reduce their gradients together: one that met only text must have some for the frames'
            # weights too, and they are zero.
            hidden = hidden + 0 * self.frame_features(self._blank(input_ids)).sum()
        return CausalLMOutputWithPast(logits=self.lm_head(hidden))

    def _blank(self, beside: Tensor) -> Tensor:
        vision: Any = self.config.vision_config
        return torch.zeros(1, 3, vision.image_size, vision.image_size, device=beside.device)
