"""LLaVA-OneVision in its true shapes with random weights, LoRA in a few lines, and the one-view loss.

What `train_llava/model.py` trains, restated for a GPU machine that has torch and transformers alone. Some
things differ, each exact: image features and supervised positions are placed by indices that the collator
made (a mask makes the GPU wait for the CPU), and attention without a mask is offered, because a causal model
never looks at the padding behind a sample.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoModelForImageTextToText,
    LlavaOnevisionConfig,
    Qwen2Config,
    SiglipVisionConfig,
)
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer

IGNORE, NUM_ACTION_TOKENS = -100, 256
Batch = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Tower:
    """SigLIP: widths and depth; the pictures' side and a patch's, pixels."""

    hidden: int = 1152
    layers: int = 26
    heads: int = 16
    intermediate: int = 4304
    image: int = 384
    patch: int = 14

    @property
    def side(self) -> int:
        """Patches along one side of a view; 384 is no multiple of 14, and the rest is cut off."""
        return self.image // self.patch


@dataclass(frozen=True, slots=True)
class Shape:
    """One model and how it is trained: LoRA of that rank, or every weight when it is 0."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int  # without the action tokens
    tied: bool
    lora_rank: int
    tower: Tower = Tower()

    @property
    def image_token(self) -> int:
        """An id that no text of these samples has."""
        return self.vocabulary - 2


SHAPES = {
    "ov-0.5b": Shape("ov-0.5b", 896, 24, 14, 2, 4864, 151_936, tied=True, lora_rank=0),
    "ov-7b": Shape("ov-7b", 3584, 28, 28, 4, 18_944, 152_064, tied=False, lora_rank=32),
}


def tiny(shape: Shape) -> Shape:
    """The same model at a size for CPUs: every path of it, none of its speed."""
    tower = Tower(hidden=32, layers=2, heads=2, intermediate=64, image=58, patch=14)
    rank = 4 if shape.lora_rank else 0
    small = Shape(shape.name, 64, 2, 4, 2, 96, 512, tied=shape.tied, lora_rank=rank)
    return replace(small, tower=tower)


def build(shape: Shape, device: torch.device | str, attention: str = "sdpa") -> Any:
    """A model of random bf16 weights, made on the device and set up to be trained as the shape says.

    Args:
        attention: transformers' attn_implementation.
    """
    config = config_of(shape)
    torch.manual_seed(0)
    with torch.device(device):
        model: Any = AutoModelForImageTextToText.from_config(
            config, dtype=torch.bfloat16, attn_implementation=attention
        )
    if shape.lora_rank:
        add_lora(model, shape)
    return model.train()


def config_of(shape: Shape) -> LlavaOnevisionConfig:
    """The library's config of a shape."""
    tower = shape.tower
    return LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(
            hidden_size=tower.hidden,
            intermediate_size=tower.intermediate,
            num_hidden_layers=tower.layers,
            num_attention_heads=tower.heads,
            image_size=tower.image,
            patch_size=tower.patch,
            vision_use_head=False,
        ),
        text_config=Qwen2Config(
            vocab_size=shape.vocabulary + NUM_ACTION_TOKENS,
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            max_position_embeddings=32_768,
            tie_word_embeddings=shape.tied,
        ),
        tie_word_embeddings=shape.tied,
        image_token_index=shape.image_token,
        video_token_index=shape.image_token + 1,
        # All that a square frame can pick of anyres_max_9's grid: one tile beside the base view.
        image_grid_pinpoints=[[tower.image, tower.image]],
    )


class LoraLinear(nn.Module):
    """A frozen linear layer and a trained correction of low rank, that starts at zero."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        """Wrap a layer; scale is 1 (alpha = rank)."""
        super().__init__()
        self.base = base
        weight = base.weight
        self.down = nn.Parameter(weight.new_empty(rank, base.in_features).normal_(std=base.in_features**-0.5))
        self.up = nn.Parameter(weight.new_zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output plus up(down(x)), added in place: the wide output is written once."""
        flat = x.flatten(0, -2)
        out: Tensor = self.base(flat).addmm_(functional.linear(flat, self.down), self.up.t())
        return out.view(*x.shape[:-1], -1)


class NewRowsEmbedding(nn.Module):
    """A frozen table and trained rows for the ids behind its end."""

    def __init__(self, table: Tensor, rows: Tensor) -> None:
        """Take the old rows as they are, and the new ones to train."""
        super().__init__()
        self.table = nn.Parameter(table, requires_grad=False)
        self.rows = nn.Parameter(rows)

    def forward(self, ids: Tensor) -> Tensor:
        """Rows of either table, [..., hidden]."""
        first = len(self.table)
        old = functional.embedding(ids.clamp(max=first - 1), self.table)
        new = functional.embedding((ids - first).clamp(min=0), self.rows)
        return torch.where((ids >= first).unsqueeze(-1), new, old)


class NewRowsHead(NewRowsEmbedding):
    """The same two tables as an output layer."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits of old and new tokens, [..., vocabulary]."""
        return torch.cat(
            [functional.linear(hidden, self.table), functional.linear(hidden, self.rows)], dim=-1
        )


def add_lora(model: Any, shape: Shape) -> None:
    """Freeze everything; train LoRA on the language model's linear layers and the new tokens' rows."""
    model.requires_grad_(False)
    for layer in decoder_layers(model):
        for parent in list(layer.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear) and not isinstance(parent, LoraLinear):
                    setattr(parent, name, LoraLinear(child, shape.lora_rank))
    embedding = model.get_input_embeddings().weight.detach()
    head = model.lm_head.weight.detach()
    first = shape.vocabulary
    model.set_input_embeddings(NewRowsEmbedding(embedding[:first], embedding[first:].clone()))
    model.lm_head = NewRowsHead(head[:first], head[first:].clone())


def decoder_layers(model: Any) -> list[nn.Module]:
    """The language model's layers."""
    return [module for module in model.modules() if isinstance(module, Qwen2DecoderLayer)]


def encoder_layers(model: Any) -> list[nn.Module]:
    """The vision tower's layers."""
    return [module for module in model.modules() if isinstance(module, SiglipEncoderLayer)]


def checkpoint_layers(model: Any) -> None:
    """Recompute every layer's activations in the backward pass, in ours; the Trainer has its own switch."""
    for layer in (*decoder_layers(model), *encoder_layers(model)):
        layer.forward = _Checkpointed(layer.forward)


class _Checkpointed:
    def __init__(self, forward: Any) -> None:
        self._forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(self._forward, *args, use_reentrant=False, **kwargs)


def compile_layers(model: Any, backend: str) -> None:
    """Compile layer by layer: all layers of a kind share one graph, so it takes seconds, not minutes."""
    for layer in (*decoder_layers(model), *encoder_layers(model)):
        layer.compile(backend=backend, dynamic=False)


def one_view_loss(model: Any, batch: Batch, *, mask: bool) -> Tensor:
    """The mean loss of the supervised tokens, with logits at their positions only.

    Args:
        batch: input_ids and attention_mask [B, L], padded at the end; pixel_values [B, 3, S, S]; image_at,
            supervised: places in the flattened batch; targets: the tokens supervised there.
        mask: hand the attention mask over; without it, as train_llava does, the result is the same.
    """
    states = model.model.vision_tower(batch["pixel_values"], output_hidden_states=True).hidden_states
    features = model.model.multi_modal_projector(states[-1])
    newline = model.model.image_newline.expand(len(features), 1, -1)
    visual = torch.cat([features, newline], dim=1).flatten(0, 1)
    embedded = model.get_input_embeddings()(batch["input_ids"])
    filled = embedded.flatten(0, 1).index_copy(0, batch["image_at"], visual.to(embedded.dtype))
    hidden = model.model.language_model(
        inputs_embeds=filled.view_as(embedded),
        # With None the library looks for packed sequences first, and the GPU waits; the dict says it is made.
        attention_mask=batch["attention_mask"] if mask else {"full_attention": None},
        use_cache=False,
    ).last_hidden_state
    logits = model.lm_head(hidden.flatten(0, 1).index_select(0, batch["supervised"]))
    return functional.cross_entropy(logits.float(), batch["targets"])


class MasterAdamW:
    """Fused AdamW on fp32 copies of bf16 weights: an update below bf16's 8 bits is not lost.

    Beside the weight and its gradient that is 12 bytes a trained weight, and 4 more during a step.
    """

    def __init__(self, params: Iterable[nn.Parameter], learning_rate: float) -> None:
        """Copy the trained weights to fp32."""
        self._params = [param for param in params if param.requires_grad]
        self._masters = [param.detach().float().clone() for param in self._params]
        self._adam = torch.optim.AdamW(self._masters, lr=learning_rate, weight_decay=0.0, fused=True)

    def step(self) -> None:
        """Clip to norm 1, update, and write the weights back. A weight without a gradient stays."""
        for master, param in zip(self._masters, self._params, strict=True):
            master.grad = None if param.grad is None else param.grad.float()
            param.grad = None
        torch.nn.utils.clip_grad_norm_(self._masters, 1.0)
        self._adam.step()
        self._adam.zero_grad()
        with torch.no_grad():
            for master, param in zip(self._masters, self._params, strict=True):
                param.copy_(master)
