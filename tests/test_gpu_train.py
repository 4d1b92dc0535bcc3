"""The GPU benchmark where there is no GPU: its counts, its loss, and every path of it at tiny shapes."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import gpu_loops, gpu_measure, gpu_model, gpu_train
from benchmarks.gpu_model import IGNORE, SHAPES, Shape
from tests.conftest import PYTHON, ROOT
from train_llava.model import OneViewLlava

# Hugging Face's count of Qwen2-0.5B and Qwen2-7B, and the action tokens' rows on top.
QWEN2 = {"ov-0.5b": 494_032_768 + 256 * 896, "ov-7b": 7_615_616_512 + 2 * 256 * 3584}
# SigLIP so400m without its pooling head and its 27th layer: patches, positions, layers, last norm.
_ATTENTION, _MLP = 4 * (1152 * 1152 + 1152), 1152 * 4304 + 4304 + 4304 * 1152 + 1152
SIGLIP = 3 * 14 * 14 * 1152 + 1152 + 729 * 1152 + 26 * (_ATTENTION + _MLP + 4 * 1152) + 2 * 1152
ABSENT = ("oxe_mix", "train_llava", "convert", "pydantic", "deepspeed", "peft", "accelerate", "__editable__")


def _count(weights: Any) -> int:
    return sum(weight.numel() for weight in weights)


@pytest.fixture(scope="module", params=sorted(SHAPES))
def shape(request: pytest.FixtureRequest) -> Shape:
    return SHAPES[request.param]


@pytest.fixture(scope="module")
def model(shape: Shape) -> Any:
    return gpu_model.build(shape, "meta")


def test_the_models_have_the_weights_of_the_published_ones(shape: Shape, model: Any) -> None:
    trained = _count(p for p in model.parameters() if p.requires_grad)
    lora = _count(p for n, p in model.named_parameters() if n.endswith((".down", ".up")))
    assert _count(model.model.vision_tower.parameters()) == SIGLIP
    language = [*model.model.language_model.parameters(), *model.lm_head.parameters()]
    assert _count({id(p): p for p in language}.values()) - lora == QWEN2[shape.name]
    if shape.lora_rank:
        widths = [(3584, 3584), (3584, 512), (3584, 512), (3584, 3584)] + [(3584, 18_944)] * 3
        assert lora == 28 * 32 * sum(map(sum, widths))
        assert trained == lora + 2 * 256 * 3584
    else:
        assert (lora, trained) == (0, _count(model.parameters()))


def _meta_batch(shape: Shape, tokens: gpu_measure.Tokens) -> dict[str, Tensor]:
    return {
        "input_ids": torch.zeros(1, tokens.total, dtype=torch.long),
        "pixel_values": torch.zeros(1, 3, shape.tower.image, shape.tower.image, dtype=torch.bfloat16),
        "image_at": torch.zeros(tokens.visual, dtype=torch.long),
        "supervised": torch.zeros(tokens.supervised, dtype=torch.long),
        "targets": torch.zeros(tokens.supervised, dtype=torch.long),
    }


def test_flops_are_those_that_pytorch_counts(shape: Shape, model: Any) -> None:
    tokens = gpu_loops.tokens_of(shape, stock=False)
    batch = {name: value.to("meta") for name, value in _meta_batch(shape, tokens).items()}
    with FlopCounterMode(display=False) as counter:
        gpu_model.one_view_loss(model, batch, mask=False).backward()
    model.zero_grad()
    flops = gpu_measure.flops_per_sample(model, shape, tokens)
    # PyTorch counts a causal product in full, and not the product that LoRA adds in place.
    causal = 2 * tokens.total**2 * shape.hidden * shape.layers * 3
    in_place = sum(2 * p.numel() * tokens.total for n, p in model.named_parameters() if n.endswith(".up"))
    assert counter.get_total_flops() == flops.weights + flops.attention + causal - in_place


def test_a_frame_takes_the_documented_tokens_in_both_loops(shape: Shape) -> None:
    ours, stock = (gpu_loops.tokens_of(shape, stock=kind) for kind in (False, True))
    assert (ours.visual, stock.visual) == (730, 1485)
    assert (ours.total, stock.total) == (779, 1534)
    prompts = [len(sample["input_ids"][sample["labels"] == IGNORE]) for sample in _samples(shape, 13)]
    lengths = [int(sample["attention_mask"].sum()) for sample in _samples(shape, 13)]
    assert (sum(lengths) / 13, min(lengths), max(lengths)) == (tiny_total(shape), *tiny_ends(shape))
    assert len(set(prompts)) == 1  # prompt and padding: everything but the answer's eight tokens


def tiny_total(shape: Shape) -> int:
    return gpu_loops.tokens_of(gpu_model.tiny(shape), stock=False).total


def tiny_ends(shape: Shape) -> tuple[int, int]:
    return tiny_total(shape) - 6, tiny_total(shape) + 6


def _samples(shape: Shape, count: int) -> list[dict[str, Tensor]]:
    small = gpu_model.tiny(shape)
    samples = gpu_loops.Samples(small, gpu_loops.make_frames(small), stock=False)
    return [samples[i] for i in range(count)]


def _small(shape: Shape) -> tuple[Any, dict[str, Tensor]]:
    """A tiny model in fp32 and a batch for it."""
    small = gpu_model.tiny(shape)
    return gpu_model.build(small, "cpu").float(), gpu_loops.Collate(small)(_samples(shape, 3))


def test_the_loss_is_the_trainers_own() -> None:
    model, batch = _small(SHAPES["ov-0.5b"])
    theirs = OneViewLlava(model.config).float()
    theirs.load_state_dict(model.state_dict())
    labels = torch.stack([sample["labels"] for sample in _samples(SHAPES["ov-0.5b"], 3)])
    rows, columns = (labels[:, 1:] != gpu_model.IGNORE).nonzero(as_tuple=True)
    logits = theirs(
        batch["input_ids"], batch["pixel_values"], logits_at=rows * labels.shape[1] + columns
    ).logits
    expected = torch.nn.functional.cross_entropy(logits, labels[rows, columns + 1])
    torch.testing.assert_close(gpu_model.one_view_loss(model, batch, mask=True), expected)
    batch["pixel_values"].neg_()
    assert abs(gpu_model.one_view_loss(model, batch, mask=True) - expected) > 1e-4  # frames are looked at


def test_neither_the_padding_mask_nor_checkpointing_changes_loss_or_gradients(shape: Shape) -> None:
    model, batch = _small(shape)
    found = []
    for mask in (True, False, False):
        loss = gpu_model.one_view_loss(model, batch, mask=mask)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
        model.zero_grad()
        if len(found) == 2:
            gpu_model.checkpoint_layers(model)
    for others in found[1:]:
        torch.testing.assert_close(others, found[0], rtol=1e-4, atol=1e-6)


def test_lora_starts_at_the_model_it_is_put_on_and_learns_in_its_own_weights_alone() -> None:
    shape = SHAPES["ov-7b"]
    model, batch = _small(shape)
    plain = gpu_model.build(replace(gpu_model.tiny(shape), lora_rank=0), "cpu").float()
    start = gpu_model.one_view_loss(model, batch, mask=False)
    torch.testing.assert_close(start, gpu_model.one_view_loss(plain, batch, mask=False))
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    optimizer = gpu_model.MasterAdamW(model.parameters(), 1e-2)
    for _ in range(3):
        gpu_model.one_view_loss(model, batch, mask=False).backward()
        optimizer.step()
    moved = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    assert gpu_model.one_view_loss(model, batch, mask=False) < start - 0.1
    assert {name.rsplit(".", 1)[1] for name in moved} == {"down", "up", "rows"}


def test_fp32_masters_keep_updates_that_bf16_would_lose() -> None:
    weight = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = gpu_model.MasterAdamW([weight], 1e-4)
    for _ in range(100):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    torch.testing.assert_close(weight.float(), torch.full((4,), 0.99), atol=4e-3, rtol=0)


def test_the_clock_leaves_warm_up_out_and_shares_are_of_the_devices_own_peak() -> None:
    clock = gpu_measure.Clock(warmup=2, measured=3, until=math.inf, device=torch.device("cpu"))
    clock.steps, clock.waits = [9.0, 9.0, 1.0, 2.0, 3.0], [5.0, 5.0, 0.0, 0.0, 0.6]
    assert [round(figure, 6) for figure in clock.figures()] == [2.0, 2.0, 0.1]
    assert gpu_train.speeds(clock, batch=16, tokens=779)["tokens_per_s"] == 8 * 779
    flops = gpu_measure.Flops(weights=20e12, attention=2e12)
    shares = gpu_train.shares_of_peak(22.25, flops, "NVIDIA H200")
    assert (shares["mfu"], shares["mfu_with_attention"]) == (0.4499, 0.4949)
    assert gpu_train.shares_of_peak(22.25, flops, "NVIDIA Unheard-of 1")["mfu"] is None
    assert (gpu_measure.peak_flops("NVIDIA H100 PCIe"), gpu_measure.peak_flops("NVIDIA H20")) == (
        756e12,
        None,
    )


def test_our_best_run_is_compared_with_every_stock_run() -> None:
    speed = {"mfu": 0.5, "data_wait_share": 0.05}
    runs = [
        ("ours", "best", 20.0),
        ("ours", "sdpa", 18.0),
        ("stock", "recipe", 8.0),
        ("stock", "tuned", 12.5),
    ]
    results: list[dict[str, Any]] = [
        {"model": "ov-7b", "loop": loop, "variant": variant, "samples_per_s": rate} | speed
        for loop, variant, rate in runs
    ]
    results.append({"model": "ov-0.5b", "loop": "ours", "variant": "best", "left_out": "3 s were left"})
    assert gpu_train.compare(results) == {
        "ov-7b": {
            "ours": "best",
            "mfu": {"value": 0.5, "target": 0.45, "met": True},
            "data_wait_share": {"value": 0.05, "target": 0.03, "met": False},
            "speedup_over_recipe": {"value": 2.5, "target": 1.8, "met": True},
            "speedup_over_tuned": {"value": 1.6, "target": 1.8, "met": False},
        }
    }


def _dry(folder: Path, *start: str) -> dict[str, Any]:
    """Run the benchmark's own files alone, from a folder where nothing else of the project is."""
    (folder / "benchmarks").mkdir(parents=True)
    for file in (ROOT / "benchmarks").glob("*.py"):
        if file.name.startswith(("gpu_", "results", "__init__")):
            shutil.copy(file, folder / "benchmarks")
    environment = os.environ | {"OUT": str(folder), "OMP_NUM_THREADS": "1"}
    command = [PYTHON, *start, "--dry"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report: dict[str, Any] = json.loads((folder / "gpu-train-dry.json").read_text())
    assert (report["measured"], report["why"], report["comparison"]) == (False, "not measured: no GPU", {})
    runs = {(r["model"], r["loop"], r["variant"]) for r in report["runs"] if r["steps"] == 2}
    assert runs == {(r.model, r.loop, r.variant) for r in gpu_train.RUNS}
    assert not [r for r in report["runs"] if {"samples_per_s", "mfu"} & set(r)]  # a CPU's speed says nothing
    return report


def test_it_runs_where_only_torch_and_transformers_are_installed(tmp_path: Path) -> None:
    site = tmp_path / "site"
    site.mkdir()
    for entry in Path(torch.__file__).parent.parent.iterdir():
        if not entry.name.startswith(ABSENT) and entry.suffix != ".pth":
            (site / entry.name).symlink_to(entry)
    program = (
        f"import sys, runpy; sys.path[:0] = [{str(site)!r}, {str(tmp_path / 'bare')!r}]\n"
        "import importlib.util as found\n"
        f"assert not [name for name in {ABSENT!r} if found.find_spec(name)]\n"
        "runpy.run_module('benchmarks.gpu_train', run_name='__main__', alter_sys=True)"
    )
    report = _dry(tmp_path / "bare", "-I", "-S", "-c", program)
    assert "accelerate" in report["stock_loop"]


def test_the_stock_loop_is_the_trainer_where_it_can_be(tmp_path: Path) -> None:
    assert _dry(tmp_path / "whole", "-m", "benchmarks.gpu_train")["stock_loop"] == "transformers' Trainer"
