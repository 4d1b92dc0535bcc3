"""The last layer of the language model, computed for the end of a prompt alone.

Nobody asks for the other tokens' outputs there; their keys and values are made, and kept, as ever. It is the
whole work of a layer but for two of its smallest products.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor
from transformers import AttentionInterface
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, eager_attention_forward, rotate_half


@contextmanager
def ends_only(language_model: Any, num: int) -> Iterator[None]:
    """Within, the language model returns the hidden states of the last `num` tokens, [B, num, D].

    A layer of another kind than Qwen2's computes all of them, as without.
    """
    layer: Any = language_model.layers[-1]
    if not isinstance(layer, Qwen2DecoderLayer):
        yield
        return
    before = vars(layer).get("forward")  # where another library has hung its own
    vars(layer)["forward"] = partial(_end_of_layer, layer, num)
    try:
        yield
    finally:
        del vars(layer)["forward"]
        if before is not None:
            vars(layer)["forward"] = before


def _end_of_layer(layer: Any, num: int, hidden: Tensor, **kwargs: Any) -> Tensor:
    """What Qwen2DecoderLayer.forward returns of [B, L, D], its last `num` rows."""
    end = hidden[:, -num:] + _attended(layer.self_attn, num, layer.input_layernorm(hidden), **kwargs)
    found: Tensor = end + layer.mlp(layer.post_attention_layernorm(end))
    return found


def _attended(  # noqa: PLR0913 (as the library calls it)
    attention: Any,
    num: int,
    hidden: Tensor,
    *,
    attention_mask: Tensor | None,
    position_embeddings: tuple[Tensor, Tensor],
    past_key_values: Any = None,
    **kwargs: Any,
) -> Tensor:
    def heads(rows: Tensor) -> Tensor:
        split: Tensor = rows.unflatten(-1, (-1, attention.head_dim))
        return split.transpose(1, 2)

    query = _rotated(heads(attention.q_proj(hidden[:, -num:])), position_embeddings)
    key = _rotated(heads(attention.k_proj(hidden)), position_embeddings)
    value = heads(attention.v_proj(hidden))
    if past_key_values is not None:
        key, value = past_key_values.update(key, value, attention.layer_idx)
    attend = AttentionInterface().get_interface(
        attention.config._attn_implementation,  # noqa: SLF001 (there is no public way to ask)
        eager_attention_forward,
    )
    seen = attention_mask if attention_mask is None else attention_mask[:, :, -num:]
    kwargs |= {"dropout": 0.0, "scaling": attention.scaling, "sliding_window": attention.sliding_window}
    found, _ = attend(attention, query, key, value, seen, **kwargs)
    projected: Tensor = attention.o_proj(found.flatten(2))
    return projected


def _rotated(rows: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
    """Queries or keys [B, heads, n, D] by the angles of the last n places."""
    cos, sin = (angles[:, None, -rows.shape[2] :] for angles in position_embeddings)
    turned: Tensor = rotate_half(rows)
    return rows * cos + turned * sin
