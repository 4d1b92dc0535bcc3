"""Models from where they are to where training starts, and from a run to where they act."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import LlavaOnevisionConfig
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)
from transformers.utils import logging as transformers_logging

from oxe_mix.errors import UserError
from train_llava.action_tokens import ActionTokens, add_action_tokens, rows_of
from train_llava.config import Bits, ModelConfig, Precision
from train_llava.model import OneViewLlava
from train_llava.original_config import is_original
from train_llava.original_layout import Form, load_original, original_config, weight_files
from train_llava.processor import OneViewProcessor
from train_llava.quantize import in_bits
from train_llava.tiny import build_tiny

DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
_ADAPTERS = "adapter_config.json"
# Of a model on the hub; never a pickle (.bin, .pt), nor its code (.py).
_HUB_FILES = ["*.json", "*.txt", "*.jinja", "*.model", "*.safetensors"]


def load_or_build(
    config: ModelConfig, questions: list[str], seed: int, precision: Precision = "fp32", num_slots: int = 0
) -> tuple[OneViewLlava, OneViewProcessor, ActionTokens]:
    """The model and processor that training starts from, with the action tokens in both, and what became of
    these.

    Args:
        questions: what a tiny model's tokenizer is trained on.
        precision: what the weights are held in.
        num_slots: for parallel decoding, one for each token of an answer.

    Raises: UserError when there is no such model, it cannot be used as it is meant to be, or the action
        tokens do not survive its tokenizer.
    """
    torch.manual_seed(seed)
    form = _form(config, DTYPES[precision])
    if config.tiny is not None:
        model, processor = build_tiny(config.tiny, questions)
        model.set_attn_implementation(config.attention)
        for weight in model.parameters():  # not the buffers: a loaded model has its frequencies in fp32
            weight.data = weight.data.to(form.dtype)
    else:
        assert config.path is not None
        folder = find_folder(config.path)
        if (folder / _ADAPTERS).exists():
            raise UserError(
                f"{config.path}: holds adapters, not a whole model; make one of them with oxe-mix export"
            )
        model, processor = load_original(folder, form) if is_original(folder) else _load_stock(folder, form)
    processor.image_mode = config.image_mode
    return model, processor, add_action_tokens(model, processor.tokenizer, num_slots)


def load_checkpoint(
    path: str | Path, dtype: torch.dtype = torch.float32, bits: Bits | None = None
) -> tuple[OneViewLlava, OneViewProcessor]:
    """What a run left in a folder: a whole model in transformers' layout, or adapters with their base.

    Args:
        bits: the language model's linear layers in so many; only of a whole model.

    Raises: UserError when it is not there, is another kind of model, or weights are missing from its files.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"{path}: no such folder; give the one that training wrote")
    if (folder / _ADAPTERS).exists():
        from train_llava.lora import load_adapter_run

        if bits is not None:
            raise UserError(
                f"{path}: holds adapters, whose base can only have the bits that it was trained with; merge "
                "them first: oxe-mix export"
            )
        return load_adapter_run(folder, dtype)
    quantization = None if bits is None else in_bits(bits, dtype, f"{bits} weights")
    return _load_stock(folder, Form(dtype, quantization=quantization))


def proved_device(name: str | None) -> torch.device:
    """A device that can be used; None: a GPU if there is one. Raises: UserError for one that is not there."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        # torch says "not compiled with CUDA" with an AssertionError.
        raise UserError(f"--device {name}: {first_line(error)}") from error
    return torch.device(name)


def save_checkpoint(
    folder: Path,
    model: OneViewLlava,
    processor: OneViewProcessor,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write weights, config, tokenizer and processor so that the stock classes load them.

    Args:
        weights: the model's, where they are split over ranks and were gathered; else its own.
    """
    _take_names_as_the_stock_class()
    model.save_pretrained(folder, state_dict=None if weights is None else dict(weights))
    # The subclass adds no weight: the file names the class that everybody has.
    config = model.config.to_dict() | {"architectures": ["LlavaOnevisionForConditionalGeneration"]}
    LlavaOnevisionConfig.from_dict(config).save_pretrained(folder)
    processor.save_pretrained(folder)


def find_folder(path: str) -> Path:
    """The folder of a model that is named by its folder or by its id on the hub; the latter is fetched once.

    Raises: UserError when it is neither, or cannot be fetched.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UserError(f"{path}: is a file; give the folder of a model")
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise UserError(
            f"{path}: no such folder; give the folder of a model, or its id on the hub (OWNER/NAME)"
        )
    return _fetch(path)


def read_shapes(path: str) -> LlavaOnevisionConfig:
    """A model's config, in either layout, without its weights.

    Raises: UserError when there is no such model.
    """
    folder = find_folder(path)
    return original_config(folder) if is_original(folder) else _stock_config(folder)


def _fetch(hub_id: str) -> Path:
    from huggingface_hub import errors, snapshot_download

    # The client's own errors and, when a connection breaks off, those of the HTTP library that it has.
    unreachable: Any = (OSError, errors.HfHubHTTPError.__mro__[1])
    try:
        return Path(snapshot_download(hub_id, allow_patterns=_HUB_FILES))
    except errors.GatedRepoError as error:
        raise UserError(f"{hub_id}: gated on the hub; accept its terms there, then: hf auth login") from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"{hub_id}: no such folder, and no such model on the hub; if it is private there: hf auth login"
        ) from error
    except errors.HFValidationError as error:
        raise UserError(f"{hub_id}: neither a folder nor an id on the hub (OWNER/NAME)") from error
    except unreachable as error:
        raise UserError(
            f"{hub_id}: no such folder, and the hub cannot be reached ({first_line(error)}); "
            "fetch the model elsewhere, and give its folder"
        ) from error


def first_line(error: Exception) -> str:
    """The first line of what an error says, or its kind when it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _form(config: ModelConfig, dtype: torch.dtype) -> Form:
    """Raises: UserError for what is not installed, or does not go together."""
    if config.attention == "flash_attention_2":
        if find_spec("flash_attn") is None:
            raise UserError(
                "model.attention: flash_attention_2 needs flash-attn, which is not installed; take sdpa"
            )
        if dtype == torch.float32:
            raise UserError("model.attention: flash_attention_2 knows no fp32; take sdpa, or train in bf16")
    if config.lora is None or config.lora.quantize == "none":
        return Form(dtype, config.attention)
    return Form(dtype, config.attention, in_bits("4bit", dtype, "model.lora.quantize: nf4"))


def _stock_config(folder: Path) -> LlavaOnevisionConfig:
    if not (folder / "config.json").exists():
        raise UserError(f"{folder}: no config.json, so no model; give the folder that training wrote")
    try:
        kind = LlavaOnevisionConfig.get_config_dict(folder)[0].get("model_type")
        if kind != LlavaOnevisionConfig.model_type:
            raise UserError(f"{folder / 'config.json'}: model_type is {kind}, not llava_onevision")
        return LlavaOnevisionConfig.from_pretrained(folder)
    except OSError as error:
        raise UserError(f"{folder / 'config.json'}: cannot be read ({first_line(error)})") from error


def _load_stock(folder: Path, form: Form) -> tuple[OneViewLlava, OneViewProcessor]:
    """A LLaVA-OneVision in transformers' layout, of today or of older versions.

    Raises: UserError when it is another kind of model, or its weights are pickled or do not fit.
    """
    config = _stock_config(folder)
    weight_files(folder)
    try:
        model, report = _from_pretrained(folder, config, form)
        # Code that a checkpoint brings along is never run; unsaid, the library would ask on the terminal.
        processor = OneViewProcessor.from_pretrained(str(folder), trust_remote_code=False)
        if not isinstance(processor.image_processor, LlavaOnevisionImageProcessorPil):
            # Where torchvision is installed, the library takes its resize, which gives other pixels.
            processor.image_processor = LlavaOnevisionImageProcessorPil.from_pretrained(str(folder))
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder}: no LLaVA-OneVision that can be loaded ({first_line(error)})") from error
    _check_fit(folder, report)
    tied = rows_of(model.get_output_embeddings()) is rows_of(model.get_input_embeddings())
    if model.config.tie_word_embeddings != tied:
        raise UserError(f"{folder}: lm_head.weight is not the embedding, though tie_word_embeddings is true")
    return model, processor


def _from_pretrained(folder: Path, config: LlavaOnevisionConfig, form: Form) -> tuple[OneViewLlava, Any]:
    _take_names_as_the_stock_class()
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # misfits are ours to report, in one line
    try:
        loaded: Any = OneViewLlava.from_pretrained(
            str(folder),
            config=config,
            output_loading_info=True,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # reported, and refused, with the other misfits
            **form.arguments,
        )
    finally:
        transformers_logging.set_verbosity(level)
    model, report = loaded
    return model, report


def _take_names_as_the_stock_class() -> None:
    """Checkpoints on the hub have the names of transformers 4; the library translates them, when it loads and
    when it saves, but for its own classes alone and such as are registered.
    """
    names = get_checkpoint_conversion_mapping(LlavaOnevisionConfig.model_type)
    register_checkpoint_conversion_mapping(OneViewLlava.__name__, names, overwrite=True)


def _check_fit(folder: Path, report: Any) -> None:
    missing, extra = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    if missing == ["lm_head.weight"] and not extra:
        raise UserError(
            f"{folder}: the weights have no lm_head.weight; if it is tied, as in Qwen2-0.5B, set "
            "tie_word_embeddings to true in config.json"
        )
    if missing or extra:
        raise UserError(
            f"{folder}: weights do not fit the model; missing {missing[:3]}, unexpected {extra[:3]}"
        )
    for name, stored, expected in sorted(report["mismatched_keys"]):
        raise UserError(f"{folder}: {name} is {list(stored)}, but {list(expected)} by config.json")
