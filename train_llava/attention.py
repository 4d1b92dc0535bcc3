"""Who sees whom: as a mask for any batch, and without one where no row is padded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

_UNPADDED = "oxe_mix_unpadded"


def visible(first: Tensor, reach: Tensor, num_keys: int, start: int = 0) -> Tensor:
    """Which keys each query sees, bool [B, 1, Q, num_keys].

    Args:
        first: [B], the first key of each row that is no padding.
        reach: [B, Q], the last key that each query sees.
        start: the first query's own place among the keys.

    Padding sees itself alone: a row that sees nothing would be no number, and spread.
    """
    keys = torch.arange(num_keys, device=reach.device)
    own = torch.arange(start, start + reach.shape[1], device=reach.device)
    seen = (keys <= reach[..., None]) & (keys >= first[:, None, None]) | (keys == own[:, None])
    return seen[:, None]


def reach_of_slots(slots: Tensor, length: int) -> Tensor:
    """The last key that each of `length` positions sees, [B, length]: itself, or the last of its row's slots.

    Args:
        slots: [B, 2], where each row's slots begin and end; the same number twice where it has none.
    """
    places = torch.arange(length, device=slots.device)
    start, end = slots[:, :1], slots[:, 1:]
    return torch.where((places >= start) & (places < end), end - 1, places)


def attend_unpadded(  # noqa: PLR0913 (as the library calls it)
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    num_keys: int,
    num_slots: int,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """PyTorch's attention for the last Q of `num_keys` tokens, of which the last are slots.

    Without a mask its kernels leave out what a causal row does not see, which is half of a prompt's work.

    Args:
        query: [B, heads, Q, D]; key, value: [B, kv heads, K, D], of which the first `num_keys` are filled.
    """
    assert attention_mask is None
    key, value = key[:, :, :num_keys], value[:, :, :num_keys]
    rows = query.shape[2] - num_slots
    parts = []
    if rows:
        before = num_keys - num_slots
        # Square: rows for what was computed before, so that the kernel's diagonal is ours.
        missing = before - rows if rows > 1 else 0
        square = nn.functional.pad(query[:, :, :rows], (0, 0, missing, 0))
        kept = key[:, :, :before], value[:, :, :before]
        found, _ = sdpa_attention_forward(module, square, *kept, None, is_causal=rows > 1, **kwargs)
        parts.append(found[:, missing:])
    if num_slots:
        found, _ = sdpa_attention_forward(
            module, query[:, :, rows:], key, value, None, is_causal=False, **kwargs
        )
        parts.append(found)
    return torch.cat(parts, dim=1), None


@contextmanager
def unpadded(language_model: Any) -> Iterator[None]:
    """Within, the language model attends by `attend_unpadded`."""
    AttentionInterface.register(_UNPADDED, attend_unpadded)
    with _attending(language_model, _UNPADDED):
        yield


@contextmanager
def masked(language_model: Any) -> Iterator[None]:
    """Within, the language model takes masks of our own; flash-attn knows none."""
    own = language_model.config._attn_implementation  # noqa: SLF001 (there is no public way to ask)
    with _attending(language_model, "sdpa" if own.startswith("flash") else own):
        yield


@contextmanager
def _attending(language_model: Any, name: str) -> Iterator[None]:
    config = language_model.config
    own = config._attn_implementation  # noqa: SLF001
    config._attn_implementation = name  # noqa: SLF001 (the public way looks at each module, in every answer)
    try:
        yield
    finally:
        config._attn_implementation = own  # noqa: SLF001
