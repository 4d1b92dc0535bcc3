"""A model's shapes, and how many weights follow from them: arithmetic over its config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import LlavaOnevisionConfig

from convert.action_codec import NUM_BINS
from train_llava.config import Part, TinyModel


@dataclass(frozen=True, slots=True)
class Vision:
    """SigLIP's."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    image_size: int
    patch_size: int

    @property
    def num_patches(self) -> int:
        """Tokens of a view."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_weights(self) -> int:
        """All of the tower, its unused last norm included."""
        h, m = self.hidden, self.intermediate
        patches = 3 * self.patch_size**2 * h + h + self.num_patches * h
        layer = 4 * (h * h + h) + (h * m + m) + (m * h + h) + 4 * h
        return patches + self.layers * layer + 2 * h


@dataclass(frozen=True, slots=True)
class Text:
    """Qwen2's."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int  # rows of the embedding, spare ones included
    tied: bool

    @property
    def kv_hidden(self) -> int:
        """Width of keys, and of values."""
        return self.hidden // self.heads * self.kv_heads

    @property
    def linears(self) -> tuple[tuple[int, int], ...]:
        """Inputs and outputs of a layer's matrices."""
        h, kv, m = self.hidden, self.kv_hidden, self.intermediate
        return ((h, h), (h, kv), (h, kv), (h, h), (h, m), (h, m), (m, h))


@dataclass(frozen=True, slots=True)
class Shapes:
    """Of a LLaVA-OneVision."""

    vision: Vision
    text: Text

    @classmethod
    def of(cls, config: LlavaOnevisionConfig) -> Shapes:
        """From the config of a checkpoint in transformers' terms."""
        vision: Any = config.vision_config
        text: Any = config.text_config
        return cls(
            Vision(
                vision.hidden_size,
                vision.intermediate_size,
                vision.num_hidden_layers,
                vision.num_attention_heads,
                vision.image_size,
                vision.patch_size,
            ),
            Text(
                text.hidden_size,
                text.intermediate_size,
                text.num_hidden_layers,
                text.num_attention_heads,
                text.num_key_value_heads,
                text.vocab_size,
                bool(config.tie_word_embeddings),
            ),
        )

    @classmethod
    def of_tiny(cls, tiny: TinyModel) -> Shapes:
        """Of a model yet to be built; its tokenizer may turn out smaller than asked for."""
        h, rows = tiny.hidden_size, tiny.vocabulary + NUM_BINS
        return cls(
            Vision(h, 4 * h, tiny.vision_layers, tiny.heads, tiny.image_size, tiny.patch_size),
            Text(h, 4 * h, tiny.text_layers, tiny.heads, tiny.heads, rows, tied=False),
        )

    @property
    def table(self) -> int:
        """Weights of the embedding, and of a head of its own."""
        return self.text.vocabulary * self.text.hidden

    @property
    def num_linear_weights(self) -> int:
        """Of the language model's layers, those in matrices."""
        return self.text.layers * sum(n * m for n, m in self.text.linears)

    @property
    def num_weights(self) -> dict[Part, int]:
        """Weights of each part; those of a tied head once."""
        h, kv, from_vision = self.text.hidden, self.text.kv_hidden, self.vision.hidden
        biases_and_norms = self.text.layers * (h + 2 * kv + 2 * h) + h
        tables = self.table * (1 if self.text.tied else 2)
        return {
            "vision_tower": self.vision.num_weights,
            "projector": (from_vision * h + h) + (h * h + h) + h,  # the newline is the last h
            "language_model": tables + self.num_linear_weights + biases_and_norms,
        }

    def num_adapter_weights(self, rank: int) -> int:
        """What LoRA adds: two matrices beside each of a layer's, and the action tokens' own rows."""
        pairs = self.text.layers * sum(rank * (n + m) for n, m in self.text.linears)
        return pairs + NUM_BINS * self.text.hidden * (1 if self.text.tied else 2)
