"""LoRA and QLoRA, in place: adapters in the language model's linear layers, beside the action tokens' own
rows of embedding and head. Saved as peft saves them, and loaded onto the base that they were trained on.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

from oxe_mix.errors import UserError
from oxe_mix.files import write_json
from train_llava.action_tokens import own_ids, rows_of
from train_llava.base_record import (
    BASE_RECORD,
    BaseRecord,
    check_base,
    fingerprint,
    read_base_record,
    read_peft_record,
)
from train_llava.config import LoraConfig, ModelConfig
from train_llava.loading import DTYPES, find_folder, load_or_build
from train_llava.model import OneViewLlava
from train_llava.processor import OneViewProcessor
from train_llava.slots import slot_ids

ADAPTERS, TRAINED_PARTS = "adapter_model.safetensors", "trained_parts.safetensors"
EMBEDDING, HEAD = "model.language_model.embed_tokens", "lm_head"
ADAPTER = "default"  # peft's name for the only one
_LINEAR = r"model\.language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
_ROWS = "trained_rows"
_PEFT_PREFIX, _PEFT_ROWS = "base_model.model.", "token_adapter.trainable_tokens_delta"


class TrainedRows(nn.Module):
    """An embedding, or a head, of which some rows are trained and the others stay as they are.

    peft's own layer for this copies the whole table in every forward pass, 1.1 GB for each of the two of a 7B
    model in bf16, and reads weights past the module that ZeRO-3 would gather them for; it holds the same
    weights.
    """

    ids: Tensor
    _place: Tensor

    def __init__(self, base_layer: nn.Embedding | nn.Linear, ids: list[int], rows: nn.Parameter) -> None:
        super().__init__()
        self.base_layer, self.trained_rows = base_layer, rows
        num_rows = (
            base_layer.num_embeddings if isinstance(base_layer, nn.Embedding) else base_layer.out_features
        )
        place = torch.full((num_rows,), -1, device=rows.device)
        place[ids] = torch.arange(len(ids), device=rows.device)
        self.register_buffer("ids", torch.tensor(ids, device=rows.device), persistent=False)
        self.register_buffer("_place", place, persistent=False)

    @property
    def weight(self) -> Tensor:
        """The whole table as it acts, [vocabulary, hidden]; a copy."""
        return rows_of(self.base_layer).index_copy(0, self.ids, self.trained_rows)

    def forward(self, x: Tensor) -> Tensor:
        """Ids to embeddings, or hidden states to logits."""
        out: Tensor = self.base_layer(x)
        if isinstance(self.base_layer, nn.Embedding):
            place = self._place[x]
            return torch.where(place[..., None] < 0, out, self.trained_rows[place.clamp(min=0)])
        return out.index_copy(-1, self.ids, functional.linear(x, self.trained_rows))


def is_adapter(name: str) -> bool:
    """Whether a parameter of that name is one of those that LoRA adds."""
    return ".lora_A." in name or ".lora_B." in name or name.endswith(f".{_ROWS}")


def add_lora(model: OneViewLlava, config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Put adapters into a model that has its action tokens, and freeze everything else.

    All linear layers of the language model get a pair of matrices that begins as no change. Of embedding and
    head the action tokens' rows are trained; where the head is tied, the same rows serve both.

    Raises: UserError when peft is not there, or the base cannot carry adapters.
    """
    assert config.lora is not None
    assert config.path is not None
    if find_spec("peft") is None:
        raise UserError("model.lora needs peft, which is not there; pip install 'oxe-mix[lora]'")
    import peft

    ids, base = own_ids(tokenizer), find_folder(config.path)
    record = BaseRecord(quantize=config.lora.quantize, files=fingerprint(base))
    embedding, head, was_training = model.get_input_embeddings(), model.lm_head, model.training
    assert isinstance(embedding, nn.Embedding)
    tied = head.weight is embedding.weight
    peft_config = peft.LoraConfig(
        r=config.lora.rank,
        lora_alpha=config.lora.alpha,  # type: ignore[arg-type]  # peft only multiplies with it
        lora_dropout=config.lora.dropout,
        target_modules=_LINEAR,
    )
    model.add_adapter(peft_config, ADAPTER)  # freezes everything else, too
    _keep_trainable(model)
    rows = _rows(embedding, ids)
    model.set_submodule(EMBEDDING, TrainedRows(embedding, ids, rows))
    model.set_submodule(HEAD, TrainedRows(head, ids, rows if tied else _rows(head, ids)))
    # For who loads the files with peft alone: it trains no rows here, but has a name for them.
    peft_config.trainable_token_indices = {"embed_tokens": ids} | ({} if tied else {HEAD: ids})
    peft_config.base_model_name_or_path = str(base.resolve()) if Path(config.path).is_dir() else config.path
    owner: Any = model
    owner.base_record = record
    model.train(was_training)  # a fresh dropout is in training mode, whatever its model is in


def adapters_of(model: OneViewLlava) -> dict[str, nn.Parameter]:
    """The parameters that LoRA added, by name; rows that embedding and head share are there once."""
    return {name: parameter for name, parameter in model.named_parameters() if is_adapter(name)}


def save_adapter(
    folder: Path,
    model: OneViewLlava,
    processor: OneViewProcessor,
    gathered: Mapping[str, Tensor] | None = None,
) -> None:
    """Write adapters, other trained weights, tokenizer and processor; the base stays where it is.

    Args:
        gathered: the model's state_dict, where its own weights are split over ranks (ZeRO-3).
    """
    owner: Any = model
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    parts = tuple(name for name in trained if not is_adapter(name))
    values: Mapping[str, Tensor] = gathered or dict(model.named_parameters())
    record: BaseRecord = owner.base_record.model_copy(update={"trained_parts": parts})
    peft_config = copy.copy(owner.peft_config[ADAPTER])
    peft_config.inference_mode = True
    folder.mkdir(parents=True, exist_ok=True)
    _write({_peft_name(name): values[name] for name in adapters_of(model)}, folder / ADAPTERS)
    if parts:
        _write({name: values[name] for name in parts}, folder / TRAINED_PARTS)
    write_json(folder / BASE_RECORD, record.model_dump(mode="json"))
    processor.save_pretrained(folder)
    peft_config.save_pretrained(str(folder))


def load_adapter(folder: Path, model: OneViewLlava) -> None:
    """Set the weights of a model that `add_lora` has prepared to those saved in a folder.

    Raises: UserError for missing or unexpected weights, or those of another shape.
    """
    record = read_base_record(folder)
    _fill({_peft_name(name): weight for name, weight in adapters_of(model).items()}, folder / ADAPTERS)
    if record.trained_parts:
        own = dict(model.named_parameters())
        _fill({name: own[name] for name in record.trained_parts if name in own}, folder / TRAINED_PARTS)


def load_adapter_run(
    folder: Path, dtype: torch.dtype, *, quantized: bool = True
) -> tuple[OneViewLlava, OneViewProcessor]:
    """The base with the adapters of a run or checkpoint, ready to act.

    Args:
        quantized: false loads the base of an nf4 run as it is, not in the 4 bits that it was trained under.

    Raises: UserError when the base is gone or is not what it was, or when weights do not fit it.
    """
    about, record = read_peft_record(folder), read_base_record(folder)
    check_base(folder, about, record)
    quantize = record.quantize if quantized else "none"
    lora = LoraConfig(rank=about.rank, alpha=about.alpha, dropout=about.dropout, quantize=quantize)
    config = ModelConfig(path=about.base_model_name_or_path, lora=lora)
    try:
        processor: OneViewProcessor = OneViewProcessor.from_pretrained(str(folder))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: no processor to load ({str(error).splitlines()[0]})") from error
    precision = next(name for name, known in DTYPES.items() if known == dtype)
    model, of_base, _ = load_or_build(
        config, [], seed=0, precision=precision, num_slots=len(slot_ids(processor.tokenizer))
    )
    add_lora(model, config, of_base.tokenizer)
    owner: Any = model
    rows = owner.peft_config[ADAPTER].trainable_token_indices
    if about.rows != rows or own_ids(processor.tokenizer) != rows["embed_tokens"]:
        raise UserError(f"{folder}: the base and the tokenizer here have the action tokens in other rows")
    load_adapter(folder, model)
    return model.eval(), processor


def _keep_trainable(model: OneViewLlava) -> None:
    """Keep 4-bit layers from being packed for inference on CPUs.

    bitsandbytes does that at the first evaluation, and a packed layer passes no gradients on ever after.
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            layer: Any = module
            layer.support_avx512bf16_for_cpu = False


def _rows(layer: nn.Module, ids: list[int]) -> nn.Parameter:
    return nn.Parameter(rows_of(layer).detach()[ids].clone())


def _peft_name(name: str) -> str:
    """Peft's name in its files of one of `adapters_of`."""
    return _PEFT_PREFIX + name.replace(f".{ADAPTER}.", ".").replace(_ROWS, _PEFT_ROWS)


def _write(weights: Mapping[str, Tensor], file: Path) -> None:
    # Copies: two names of one memory are refused by the format.
    save_file({name: w.detach().cpu().clone() for name, w in weights.items()}, file, {"format": "pt"})


def _fill(weights: Mapping[str, Tensor], file: Path) -> None:
    try:
        stored = load_file(file)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{file}: not a whole file of weights ({error}); expected what training wrote"
        ) from error
    missing, extra = sorted(weights.keys() - stored.keys())[:3], sorted(stored.keys() - weights.keys())[:3]
    if missing or extra:
        raise UserError(f"{file}: weights do not fit the model; missing {missing}, unexpected {extra}")
    with torch.no_grad():
        for name, weight in weights.items():
            if weight.shape != stored[name].shape:
                shapes = f"{list(stored[name].shape)}, but {list(weight.shape)}"
                raise UserError(f"{file}: {name} is {shapes} in the model; is the base another one?")
            weight.copy_(stored[name])
