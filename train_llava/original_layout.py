"""Checkpoints in the layout of LLaVA-OneVision's own authors (`lmms-lab/…`, written by LLaVA-NeXT): their
names for the weights, and their config.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import (
    AutoTokenizer,
    BitsAndBytesConfig,
    LlavaOnevisionConfig,
    PreTrainedTokenizerBase,
    Qwen2Config,
)
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
    LlavaOnevisionImageProcessorPil,
)

from convert.prompt import IMAGE
from oxe_mix.errors import UserError
from oxe_mix.files import read_model
from train_llava.action_tokens import begin_rows, rows_of
from train_llava.model import OneViewLlava
from train_llava.original_config import OriginalConfig, read_original_config, text_config, vision_config
from train_llava.processor import OneViewProcessor
from train_llava.tiny import CHAT_TEMPLATE, token_id

_LOG = logging.getLogger(__name__)
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_HEAD, _EMBEDDING = "lm_head.weight", "model.language_model.embed_tokens.weight"
_START_OF_TURN, _END_OF_TURN, _PADDING, _VIDEO = "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<video>"
# Qwen2's template, under which these weights were trained, opens every conversation with this turn. The rest
# of it takes a turn's content as a string, with no place for an image.
_OPENING = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
)

_VISION = "model.vision_tower.vision_tower.vision_model."
_RULES = (
    (_VISION, "model.vision_tower."),
    ("model.mm_projector.0.", "model.multi_modal_projector.linear_1."),
    ("model.mm_projector.2.", "model.multi_modal_projector.linear_2."),
    ("model.embed_tokens.", "model.language_model.embed_tokens."),
    ("model.layers.", "model.language_model.layers."),
    ("model.norm.", "model.language_model.norm."),
)


class _Index(BaseModel):
    """The files of a checkpoint in several parts, each under the names of the weights it has."""

    weight_map: dict[str, str]


@dataclass(frozen=True, slots=True)
class Form:
    """What weights of a checkpoint, in either layout, are loaded as."""

    dtype: torch.dtype = torch.float32
    attention: str = "sdpa"
    quantization: BitsAndBytesConfig | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        """For the library's `from_pretrained`."""
        quantized = {} if self.quantization is None else {"quantization_config": self.quantization}
        return {"dtype": self.dtype, "attn_implementation": self.attention} | quantized


@dataclass(frozen=True, slots=True)
class _Original:
    """A folder in LLaVA-NeXT's layout, of whose weights only names and shapes were read."""

    folder: Path
    stored: dict[str, _Stored]
    config: LlavaOnevisionConfig
    tokenizer: PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class _Stored:
    """Where a weight lies, and its shape."""

    file: Path
    shape: tuple[int, ...]


def to_transformers_key(name: str) -> str:
    """LLaVA-NeXT's name of a weight as transformers has it; the newline and the head have the same in both.

    A name that no rule knows comes back as it is, and then fits no weight of the model.
    """
    for old, new in _RULES:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def load_original(folder: Path, form: Form | None = None) -> tuple[OneViewLlava, OneViewProcessor]:
    """Load LLaVA-NeXT's weights, tokenizer and config.

    <image>, which is a mere marker there, becomes a token, in one of the embedding's spare rows if there are
    any. Dropped, where a file has them: the vision layer after the last one used, and the vision head.

    Args:
        form: what the weights are loaded as; float32 when not given.

    Raises: UserError when the vision tower is none we know; when weights are pickled, missing, unexpected or
        of another shape; when a head that should be the embedding differs from it.
    """
    found = _read(folder)
    _check(found)
    model = _load(found, form or Form())
    new, num_old = len(found.tokenizer), len(rows_of(model.get_input_embeddings()))
    begin_rows(model, range(num_old, new), range(num_old))
    return model, _processor(found.config, found.tokenizer)


def original_config(folder: Path) -> LlavaOnevisionConfig:
    """The config in transformers' terms; no weight is read.

    Raises: UserError as `load_original`, but for the weights' own misfits.
    """
    return _read(folder).config


def _read(folder: Path) -> _Original:
    file = folder / "config.json"
    original = read_original_config(file)
    vision = vision_config(original, file)
    stored = _without_unused(_stored(folder), vision.num_hidden_layers)
    text = text_config(original, tied=_is_tied(original, stored, file))
    tokenizer = _tokenizer(folder, text)
    pinpoints = original.image_grid_pinpoints
    config = LlavaOnevisionConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=token_id(tokenizer, IMAGE),
        video_token_index=token_id(tokenizer, _VIDEO),
        image_grid_pinpoints=pinpoints if isinstance(pinpoints, list) else None,
        tie_word_embeddings=text.tie_word_embeddings,
    )
    return _Original(folder, stored, config, tokenizer)


def _is_tied(original: OriginalConfig, stored: dict[str, _Stored], file: Path) -> bool:
    """Whether head and embedding are one table; where the config is silent, the weights tell."""
    if original.tie_word_embeddings is False and _HEAD not in stored:
        raise UserError(
            f"{file}: the head is not tied to the embedding, but the weights have no {_HEAD}; "
            "if it is tied, as in Qwen2-0.5B, set tie_word_embeddings to true"
        )
    return _HEAD not in stored if original.tie_word_embeddings is None else original.tie_word_embeddings


def _tokenizer(folder: Path, text: Qwen2Config) -> PreTrainedTokenizerBase:
    """The folder's tokenizer with <image> and <video> as tokens, and Qwen2's end of turn as its end."""
    try:
        # With the config given, the library does not read the folder's own, which it does not understand.
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(folder), config=text)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder}: no tokenizer that can be loaded ({str(error).splitlines()[0]})"
        ) from error
    if lacking := {_START_OF_TURN, _END_OF_TURN, _PADDING} - tokenizer.get_vocab().keys():
        raise UserError(f"{folder}: the tokenizer has no {min(lacking)}, so it is not Qwen2's")
    tokenizer.add_tokens([IMAGE, _VIDEO], special_tokens=True)
    tokenizer.eos_token, tokenizer.pad_token = _END_OF_TURN, _PADDING
    text.eos_token_id, text.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    return tokenizer


def _processor(config: LlavaOnevisionConfig, tokenizer: PreTrainedTokenizerBase) -> OneViewProcessor:
    vision: Any = config.vision_config
    image_processor = LlavaOnevisionImageProcessorPil(
        size={"height": vision.image_size, "width": vision.image_size},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        image_grid_pinpoints=config.image_grid_pinpoints or [],
    )
    patches = (vision.image_size // vision.patch_size) ** 2
    return OneViewProcessor(image_processor, tokenizer, patches, chat_template=_OPENING + CHAT_TEMPLATE)


def weight_files(folder: Path) -> list[Path]:
    """The files of a checkpoint's weights; their names are the same in both layouts.

    Raises: UserError when there are none, or only pickled ones.
    """
    if (folder / _INDEX).exists():
        names = set(read_model(_Index, folder / _INDEX, "an index of safetensors").weight_map.values())
        if outside := [name for name in names if Path(name).name != name]:
            raise UserError(f"{folder / _INDEX}: {outside[0]} is no file beside the index")
        return [folder / name for name in sorted(names)]
    if not (folder / _SINGLE).exists():
        if any(folder.glob("*.bin")):
            raise UserError(
                f"{folder}: the weights are pickled (.bin), and reading those can run code; "
                "get them as safetensors"
            )
        raise UserError(f"{folder}: no weights; expected {_SINGLE} or {_INDEX}")
    return [folder / _SINGLE]


def _stored(folder: Path) -> dict[str, _Stored]:
    """Every weight in the files, under LLaVA-NeXT's name; only their headers are read."""
    stored: dict[str, _Stored] = {}
    for file in weight_files(folder):
        try:
            with safe_open(file, framework="pt") as stream:
                for name in stream.keys():  # noqa: SIM118 (not a dict)
                    stored[name] = _Stored(file, tuple(stream.get_slice(name).get_shape()))
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file}: not a whole safetensors file ({error}); download it again") from error
    return stored


def _without_unused(stored: dict[str, _Stored], vision_layers: int) -> dict[str, _Stored]:
    unused = (f"{_VISION}encoder.layers.{vision_layers}.", f"{_VISION}head.")
    # inv_freq is computed; older writers stored it all the same.
    dropped = sorted(name for name in stored if name.startswith(unused) or name.endswith(".inv_freq"))
    if dropped:
        _LOG.info("%d stored weights have no use here: %s", len(dropped), ", ".join(dropped))
    return {name: place for name, place in stored.items() if name not in dropped}


def _check(found: _Original) -> None:
    """Compare names and shapes with the model's before any weight is read. Raises: UserError."""
    stored, config = found.stored, found.config
    with torch.device("meta"):
        expected = {name: tuple(weight.shape) for name, weight in OneViewLlava(config).state_dict().items()}
    places = {to_transformers_key(name): place for name, place in stored.items()}
    optional = {_HEAD} if config.tie_word_embeddings else set()
    missing = sorted(expected.keys() - places.keys() - optional)[:3]
    unexpected = sorted(name for name in stored if to_transformers_key(name) not in expected)[:3]
    if missing or unexpected:
        raise UserError(
            f"{found.folder}: weights do not fit the model; missing {missing}, unexpected {unexpected}"
        )
    for name, place in places.items():
        if place.shape != expected[name]:
            raise UserError(
                f"{place.file}: {name} is {list(place.shape)}, but {list(expected[name])} by config.json"
            )


def _load(found: _Original, form: Form) -> OneViewLlava:
    weights: dict[str, Tensor] = {}
    for file in sorted({place.file for place in found.stored.values()}):
        with safe_open(file, framework="pt") as stream:
            for name in (name for name, place in found.stored.items() if place.file == file):
                # Pages of the file, not a copy: the model's own tensors are the first one.
                weights[to_transformers_key(name)] = stream.get_tensor(name)
    if found.config.tie_word_embeddings:
        head = weights.pop(_HEAD, None)
        if head is not None and not torch.equal(head, weights[_EMBEDDING]):
            raise UserError(
                f"{found.folder}: {_HEAD} is not the embedding, though tie_word_embeddings is true"
            )
    model: Any = OneViewLlava.from_pretrained(None, config=found.config, state_dict=weights, **form.arguments)
    assert isinstance(model, OneViewLlava)
    return model
