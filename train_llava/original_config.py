"""config.json as LLaVA-OneVision's own authors write it (`lmms-lab/…`, by LLaVA-NeXT): the language model's,
with `mm_…` fields beside it.

Sources: LLaVA-NeXT (llava_arch.py, siglip_encoder.py), and the script transformers' copies were made with
(convert_llava_onevision_weights_to_hf.py), which finds 26 layers of the vision tower and no head of it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict
from transformers import Qwen2Config, SiglipVisionConfig

from oxe_mix.errors import UserError
from oxe_mix.files import read_model

# 26 of SigLIP's 27 layers: LLaVA-NeXT cuts the last one and the pooling head off.
_TOWERS: dict[str, dict[str, Any]] = {
    "siglip-so400m-patch14-384": {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 26,
        "num_attention_heads": 16,
        "image_size": 384,
        "patch_size": 14,
    }
}


class OriginalConfig(BaseModel):
    """What is read of LLaVA-NeXT's config.json; the rest of it is for its own trainer."""

    model_config = ConfigDict(frozen=True, extra="ignore")
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: None = None  # none of the published models has one
    hidden_act: str = "silu"
    initializer_range: float = 0.02
    use_sliding_window: bool = False
    sliding_window: int | None = None
    max_window_layers: int = 28
    tie_word_embeddings: bool | None = None
    mm_vision_tower: str
    mm_projector_type: Literal["mlp2x_gelu"]
    mm_patch_merge_type: Literal["spatial_unpad"]  # the one with a newline after each view
    mm_resampler_type: None = None
    image_grid_pinpoints: list[list[int]] | str | None = None
    vision_config: dict[str, Any] | None = None  # ours, for a tower that is not in the table


def is_original(folder: Path) -> bool:
    """Whether a folder's config.json is LLaVA-NeXT's, of a Qwen model; false when it cannot be read."""
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and "LlavaQwenForCausalLM" in (config.get("architectures") or ())


def read_original_config(file: Path) -> OriginalConfig:
    """Raises: UserError when it is of a model that transformers' LLaVA-OneVision cannot be."""
    return read_model(OriginalConfig, file, "LLaVA-NeXT's config of a LLaVA-OneVision with Qwen2")


def vision_config(original: OriginalConfig, file: Path) -> SiglipVisionConfig:
    """The shape of the tower, of which the authors' config.json only has the name.

    Raises: UserError for one that we do not know.
    """
    # The name is a hub id or, in one's own checkpoints, a folder.
    fields = original.vision_config or _TOWERS.get(original.mm_vision_tower.rsplit("/", 1)[-1])
    if fields is None:
        raise UserError(
            f"{file}: mm_vision_tower: {original.mm_vision_tower} is not {' or '.join(_TOWERS)}; "
            "for another SigLIP add vision_config, with the number of layers that are used"
        )
    return SiglipVisionConfig(**(fields | {"vision_use_head": False}))


def text_config(original: OriginalConfig, *, tied: bool) -> Qwen2Config:
    """The language model in transformers' terms."""
    ours = {"rope_theta", "rope_scaling", "tie_word_embeddings", "image_grid_pinpoints", "vision_config"}
    fields = {k: v for k, v in original.model_dump().items() if k not in ours and not k.startswith("mm_")}
    rope = {"rope_type": "default", "rope_theta": original.rope_theta}
    return Qwen2Config(**fields, rope_parameters=rope, tie_word_embeddings=tied)
