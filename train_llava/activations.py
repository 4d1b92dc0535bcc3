"""Bytes that a forward pass keeps for the backward pass, by what autograd saves in each kind of layer."""

from __future__ import annotations

from dataclasses import dataclass

from train_llava.config import RunConfig
from train_llava.shapes import Shapes

_FP32 = 4
_MASK = 1  # a dropout's, per value


@dataclass(frozen=True, slots=True)
class Longest:
    """The longest sample of a run's data."""

    tokens: int  # those of its frames included
    patches: int = 1  # views or tiles that go through the vision tower
    answer: int = 8  # supervised tokens: an action of seven dimensions, and the end of turn


def kept_by_model(config: RunConfig, shapes: Shapes, micro: int, longest: Longest) -> float:
    """Bytes kept from the frames to the last hidden states, for a micro batch."""
    checkpointed = config.train.gradient_checkpointing
    each, rates = _each(config), config.train.learning_rates
    tokens, layers = micro * longest.tokens, shapes.text.layers
    text = tokens * _text_layer(config, shapes, longest.tokens)
    if checkpointed:
        # Each layer's input, and all of the one that is calculated anew.
        text += tokens * layers * each * shapes.text.hidden
    else:
        text *= layers
    norm = tokens * (_FP32 + each) * shapes.text.hidden
    if rates["vision_tower"] is None and rates["projector"] is None:
        return text + norm
    views = micro * longest.patches * shapes.vision.num_patches
    # Of the projector: its input, what its GELU takes, and what that gives.
    seen: float = views * each * (shapes.vision.hidden + 2 * shapes.text.hidden)
    if rates["vision_tower"] is not None:
        kept: float = each * shapes.vision.hidden if checkpointed else _vision_layer(config, shapes)
        seen += views * shapes.vision.layers * kept
        seen += views * each * 3 * shapes.vision.patch_size**2
    return text + norm + seen


def peak_of_backward(config: RunConfig, shapes: Shapes, micro: int, longest: Longest) -> float:
    """Bytes of gradients on their way through a layer of the language model, where most is kept."""
    text = shapes.text
    return micro * longest.tokens * _each(config) * (3 * text.intermediate + 2 * text.hidden)


def logits_of(config: RunConfig, shapes: Shapes, micro: int, longest: Longest) -> float:
    """Bytes of the logits of supervised positions, and of their gradient, in float32."""
    each = _each(config)
    copies = 2 * _FP32 + (each if each < _FP32 else 0)
    return micro * longest.answer * shapes.text.vocabulary * copies


def _each(config: RunConfig) -> int:
    return 2 if config.train.precision == "bf16" else _FP32


def _text_layer(config: RunConfig, shapes: Shapes, tokens: int) -> float:
    """Bytes per token that a layer of Qwen2 keeps, of samples that long."""
    text, each, lora = shapes.text, _each(config), config.model.lora
    h, kv, m = text.hidden, text.kv_hidden, text.intermediate
    trained = config.train.learning_rates["language_model"] is not None and lora is None
    norms = 2 * _FP32 * h  # RMSNorm calculates in float32, and keeps what it took
    attention = each * (2 * h + 2 * kv) + _FP32 * text.heads  # queries, result, keys, values, a sum per head
    if config.model.attention == "eager":
        # Keys and values are repeated for all heads, and the weights of all pairs are kept.
        attention = each * 4 * h + text.heads * tokens * (_FP32 + (each if each < _FP32 else 0))
    mlp = 3 * each * m  # gate, SiLU of it, up
    kept = norms + attention + mlp
    if trained:
        # What goes into each matrix, and into each norm's weights.
        kept += each * (4 * h + m)
    elif lora is not None:
        kept += each * (2 * h + m) + 7 * each * lora.rank
        if lora.dropout > 0:
            # One for each of the seven matrices, in place of the input that some share.
            kept += (each + _MASK) * (6 * h + m) - each * (2 * h + m)
    return kept


def _vision_layer(config: RunConfig, shapes: Shapes) -> float:
    """Bytes per patch that a layer of SigLIP keeps."""
    h, m, each = shapes.vision.hidden, shapes.vision.intermediate, _each(config)
    kept = each * (8 * h + 2 * m) + _FP32 * (shapes.vision.heads + 4)
    if config.model.attention == "eager":
        each_pair = _FP32 + (each if each < _FP32 else 0)
        kept += shapes.vision.heads * shapes.vision.num_patches * each_pair
    return kept
