"""bitsandbytes' 4 and 8 bits, for the language model's linear layers and nothing else."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from transformers import BitsAndBytesConfig

from oxe_mix.errors import UserError
from train_llava.config import Bits

_AS_THEY_ARE = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]


def in_bits(bits: Bits, compute: torch.dtype, asked_by: str) -> BitsAndBytesConfig:
    """How weights are quantised while they are loaded: `from_pretrained(…, quantization_config=…)`.

    Args:
        bits: 4bit is nf4 with quantised scales, as QLoRA (arXiv:2305.14314) has it; 8bit is LLM.int8().
        compute: in what 4-bit layers calculate; the dtype that the others are loaded in.
        asked_by: the option or key, for the error.

    Raises: UserError when bitsandbytes is not there.
    """
    if find_spec("bitsandbytes") is None:
        raise UserError(f"{asked_by} needs bitsandbytes, which is not there; pip install 'oxe-mix[qlora]'")
    if bits == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=_AS_THEY_ARE)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
        llm_int8_skip_modules=_AS_THEY_ARE,
    )
