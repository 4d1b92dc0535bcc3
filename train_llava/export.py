"""`oxe-mix export`: adapters merged into their base, a whole model that stock transformers loads, and proved
to be the same before it gets its name.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoTokenizer, LlavaOnevisionForConditionalGeneration

from convert.action_codec import CODEC_FILE, NUM_BINS, read_codec
from convert.prompt import IMAGE, question
from oxe_mix.errors import UserError
from oxe_mix.files import BUSY_FILE, folder_lock
from oxe_mix.text import complain, count, say, size
from train_llava.action_tokens import prove_action_tokens
from train_llava.base_record import ADAPTER_CONFIG, check_base, read_base_record, read_peft_record
from train_llava.config import CARD_FILE, Precision
from train_llava.loading import DTYPES, save_checkpoint
from train_llava.lora import ADAPTER, EMBEDDING, HEAD, TrainedRows, load_adapter_run
from train_llava.model import OneViewLlava
from train_llava.model_card import write_card
from train_llava.processor import OneViewProcessor
from train_llava.quiet import quiet_libraries

# Of the largest logit. In fp32 only the order of sums differs; in bf16 each weight is rounded to 8 bits.
_LIMITS: dict[Precision, float] = {"fp32": 1e-4, "bf16": 5e-2}
_TIE = 2.0**-7  # logits nearer than this share of the largest are one and the same in bf16
_OF_THE_RUN = (
    CODEC_FILE,
    "data_manifest.json",
    "cards",
    "config.yaml",
    "versions.json",
    "metrics.jsonl",
    "evaluation.json",
)


@dataclass(frozen=True, slots=True)
class Merged:
    """What merging did: linear layers, those whose weights are others in the dtype that is saved, and rows of
    embedding and head.
    """

    layers: int
    changed: int
    rows: int


@dataclass(frozen=True, slots=True)
class Agreement:
    """Two models over the same prompt and frames.

    difference: the largest of logits, as a share of the largest logit. same_token: at how many of `positions`
        the same action token is the best; apart: at how many it is not, though it leads by more than a tie.
    """

    difference: float
    positions: int
    same_token: int
    apart: int


class _NotTheSameError(Exception):
    """The merged model does not do what the adapters do."""


def run_export(checkpoint: Path, out: Path, dtype: str | None = None) -> int:
    """Merge a run's adapters into its base and write a whole model to `out`.

    Args:
        dtype: of the weights, bf16 or fp32; None for that of the base's files.

    Returns: the exit code, 1 when the result does not do what the adapters do; then nothing is left of it.
    Raises: UserError for a run that has no adapters or whose base is gone, and a folder that is not empty.
    """
    start = time.monotonic()
    _check_asked(checkpoint, out, dtype)
    read_codec(checkpoint)
    about = read_peft_record(checkpoint)
    base = check_base(checkpoint, about, read_base_record(checkpoint))
    wanted = next((name for name in DTYPES if name == dtype), None) or _dtype_of(base)
    quiet_libraries()
    say(f"asked: {checkpoint} merged into {about.base_model_name_or_path}, weights in {wanted}")
    try:
        with _whole_or_absent(out) as partial:
            done = _export(checkpoint, partial, wanted)
    except _NotTheSameError as error:
        complain(str(error))
        return 1
    num_bytes = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    say(f"{done}\nresult: {out} ({size(num_bytes)}, {time.monotonic() - start:.1f} s)")
    say(f"next: python inference_action.py --checkpoint {out} --image IMG --instruction TEXT")
    return 0


def merge_adapters(model: OneViewLlava, dtype: torch.dtype) -> Merged:
    """Put the plain layers back into a float32 model, with what the adapters learnt in their weights.

    Args:
        dtype: in which a layer's weights count as changed.
    """
    from peft.tuners.lora import LoraLayer

    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    changed, of_head = 0, model.get_submodule(HEAD)
    assert isinstance(of_head, TrainedRows)
    with torch.no_grad():
        for name, layer in layers.items():
            own: Any = layer
            plain = own.get_base_layer()
            merged = plain.weight + own.get_delta_weight(ADAPTER)
            changed += not torch.equal(merged.to(dtype), plain.weight.to(dtype))
            plain.weight.copy_(merged)
            model.set_submodule(name, plain)
        for name in (EMBEDDING, HEAD):
            rows = model.get_submodule(name)
            assert isinstance(rows, TrainedRows)
            rows.base_layer.weight[rows.ids] = rows.trained_rows
            model.set_submodule(name, rows.base_layer)
    model.delete_adapter(ADAPTER)
    return Merged(len(layers), changed, len(of_head.ids))


def _check_asked(checkpoint: Path, out: Path, dtype: str | None) -> None:
    if dtype not in (None, *DTYPES):
        raise UserError(f"--dtype {dtype}: expected bf16 or fp32")
    if not (checkpoint / ADAPTER_CONFIG).exists():
        if (checkpoint / "config.json").exists():
            raise UserError(f"{checkpoint}: is a whole model already; copy it: cp -r {checkpoint} {out}")
        raise UserError(f"{checkpoint}: no adapters here; give the folder that training with LoRA wrote")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: is there already; choose a new folder, or an empty one")


def _dtype_of(base: Path) -> Precision:
    """In what the base's files hold most of their weights; what is neither bf16 nor fp32 becomes bf16."""
    sizes: dict[bool, int] = {True: 0, False: 0}
    for file in base.glob("*.safetensors"):
        with safe_open(file, framework="pt") as stream:
            for name in stream.keys():  # noqa: SIM118 (not a dict)
                weight = stream.get_slice(name)
                sizes[weight.get_dtype() == "F32"] += torch.Size(weight.get_shape()).numel()
    return "fp32" if sizes[True] > sizes[False] else "bf16"


def _export(checkpoint: Path, folder: Path, dtype: Precision) -> str:
    """Merge, write, read again and compare; returns what there is to say of it."""
    model, processor = load_adapter_run(checkpoint, torch.float32, quantized=False)
    probe = _Probe(processor)
    of_adapters = probe.ours(model)
    merged = merge_adapters(model, DTYPES[dtype])
    if not merged.changed:
        raise UserError(f"{checkpoint}: the adapters change nothing in {dtype}; was the run trained at all?")
    torch.nn.Module.to(model, DTYPES[dtype])
    save_checkpoint(folder, model, processor)
    del model
    _copy_of_the_run(checkpoint, folder)
    if (checkpoint / CARD_FILE).exists():  # a checkpoint has none
        write_card(folder)
    agreement = probe.compare(of_adapters, probe.stock(folder))
    _require(agreement, dtype)
    lines = [
        f"done: {merged.changed} of {count(merged.layers, 'linear layer')} changed, "
        f"{merged.rows} rows of embedding and head; read again by the stock classes, logits differ by "
        f"{agreement.difference:.1e} of the largest at most (limit {_LIMITS[dtype]:.0e}), same action token "
        f"at {agreement.same_token} of {agreement.positions} positions"
    ]
    if read_base_record(checkpoint).quantize != "none":
        lines.append(_beside_quantized(checkpoint, probe, of_adapters))
    return "\n".join(lines)


def _require(agreement: Agreement, dtype: Precision) -> None:
    """Raises: _NotTheSameError past the limits of a dtype."""
    if agreement.difference > _LIMITS[dtype]:
        raise _NotTheSameError(
            f"the merged model's logits differ from the adapters' by {agreement.difference:.1e} of the "
            f"largest, more than {_LIMITS[dtype]:.0e}; nothing was written" + _try_fp32(dtype)
        )
    if agreement.apart:
        raise _NotTheSameError(
            f"the merged model prefers other action tokens at {agreement.apart} of {agreement.positions} "
            "positions; nothing was written" + _try_fp32(dtype)
        )


def _try_fp32(dtype: Precision) -> str:
    return "; try --dtype fp32" if dtype == "bf16" else ""


def _beside_quantized(checkpoint: Path, probe: _Probe, of_adapters: Tensor) -> str:
    """The line on a run that was trained in 4 bits."""
    note = "note: trained over the base in nf4, merged into the base as it is: not the same model"
    if find_spec("bitsandbytes") is None:
        return f"{note}; by how much is not measured, since bitsandbytes is not installed"
    quantized, _ = load_adapter_run(checkpoint, torch.float32)
    agreement = probe.compare(probe.ours(quantized), of_adapters)
    return (
        f"{note}; logits differ by {agreement.difference:.1e} of the largest, "
        f"same action token at {agreement.same_token} of {agreement.positions} positions"
    )


class _Probe:
    """A prompt with two frames of noise and an answer, and the logits over that answer.

    Two frames, since the stock class takes one view of a frame only where there are several.
    """

    def __init__(self, processor: OneViewProcessor) -> None:
        chance = torch.Generator().manual_seed(0)
        self._action_ids = prove_action_tokens(processor.tokenizer)
        answer = torch.randint(NUM_BINS, (7,), generator=chance).tolist()
        side = processor.image_processor.size["height"]
        asked = f"{IMAGE}\n{question('pick up the red block')}"
        prompt = processor.prompt_ids(asked, [processor.num_image_tokens + 1] * 2)
        self._ids = torch.tensor([[*prompt, *(self._action_ids[i] for i in answer)]])
        self._pixels = torch.rand((2, 3, side, side), generator=chance) * 2 - 1
        self._last = len(answer) + 1

    def ours(self, model: OneViewLlava) -> Tensor:
        """Of a model in memory, [positions, vocabulary]."""
        at = torch.arange(self._ids.shape[1] - self._last, self._ids.shape[1])
        with torch.no_grad():
            logits: Tensor = model(
                self._ids.to(model.device), self._pixels.to(model.device), logits_at=at
            ).logits
        return logits.float().cpu()

    def stock(self, folder: Path) -> Tensor:
        """Of a folder, as transformers' own classes read it."""
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
        if prove_action_tokens(tokenizer) != self._action_ids:
            raise _NotTheSameError("the written tokenizer has other ids for the action tokens")
        model: Any = LlavaOnevisionForConditionalGeneration.from_pretrained(str(folder), dtype=torch.float32)
        with torch.no_grad():
            logits: Tensor = model(
                input_ids=self._ids,
                pixel_values=self._pixels[:, None],
                image_sizes=torch.tensor([list(self._pixels.shape[2:])] * 2),
                batch_num_images=torch.tensor([2]),
                logits_to_keep=self._last,
            ).logits[0]
        return logits

    def compare(self, expected: Tensor, got: Tensor) -> Agreement:
        """How far two models are apart over the answer."""
        largest = expected.abs().max()
        among, picked = expected[:, self._action_ids], got[:, self._action_ids].argmax(dim=-1, keepdim=True)
        lead = (among.max(dim=-1).values - among.gather(-1, picked)[:, 0]) / largest
        return Agreement(
            difference=float((expected - got).abs().max() / largest),
            positions=len(expected),
            same_token=int((lead == 0).sum()),
            apart=int((lead > _TIE).sum()),
        )


def _copy_of_the_run(checkpoint: Path, folder: Path) -> None:
    for name in _OF_THE_RUN:
        source = checkpoint / name
        if source.is_dir():
            shutil.copytree(source, folder / name)
        elif source.exists():
            shutil.copy(source, folder / name)


@contextmanager
def _whole_or_absent(out: Path) -> Iterator[Path]:
    """A folder to write into, which gets its name when the block ends without an error."""
    partial = out.absolute().with_name(f".{out.absolute().name}.exporting")
    with folder_lock(partial, "oxe-mix export"):
        for leftover in partial.iterdir():  # of one that was killed
            if leftover.is_dir():
                shutil.rmtree(leftover)
            elif leftover.name != BUSY_FILE:
                leftover.unlink()
        try:
            yield partial
            os.sync()
            (partial / BUSY_FILE).unlink()
            partial.rename(out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
