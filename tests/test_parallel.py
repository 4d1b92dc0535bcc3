"""Answers from one pass, trained for real: two ranks under DeepSpeed, chunks of two, then asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from convert.action_codec import read_codec
from convert.reader import ConversationReader
from oxe_mix.errors import UserError
from tests.conftest import OXE_MIX, PYTHON, run
from tests.converting import convert
from train_llava.action_tokens import own_ids, prove_action_tokens
from train_llava.config import LoraConfig, ModelConfig, RunConfig, TinyModel, load_config
from train_llava.evaluate import HeldOut, evaluate
from train_llava.loading import load_checkpoint, load_or_build, save_checkpoint
from train_llava.slots import slot_ids

TINY = ModelConfig(tiny=TinyModel(hidden_size=32, text_layers=2, heads=2))


@pytest.fixture(scope="module")
def chunks(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("chunks") / "llava"
    convert(data, out, "--chunk", "2", "--val-fraction", "0.1")
    return out


@pytest.fixture(scope="module")
def parallel(chunks: Path, tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve steps, by the command that a user types."""
    folder = tmp_path_factory.mktemp("parallel")
    config = yaml.safe_load(tiny_config.read_text())
    config["train"]["parallel_action_slots"] = True
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    words = (f"CONFIG={folder / 'config.yaml'}", "NPROC=2", f"LLAVA={chunks}", f"RUN={folder / 'run'}")
    done = run("make", "train", *words)
    assert "and 14 action slots" in done.stdout
    return folder / "run"


def test_it_learns_and_its_checkpoint_answers_in_one_pass(parallel: Path, chunks: Path) -> None:
    lines = [json.loads(line) for line in (parallel / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < lines[0]["loss"] - 1
    model, processor = load_checkpoint(parallel)
    assert len(slot_ids(processor.tokenizer)) == 14
    reader = ConversationReader(chunks, "val")
    image = next(iter(reader[0].frames))
    asked = ("--instruction", "pick up the red block", "--unnorm-key", "viola", "--image", image.file)
    said = json.loads(run(OXE_MIX, "act", "--checkpoint", parallel, *asked).stdout)
    assert np.shape(said["actions"]) == (2, 7)
    assert said["latency_ms"]["decode"] < said["latency_ms"]["prefill"]
    # What training reported of it is what the folder answers.
    codec = read_codec(parallel)
    found = evaluate(model, processor, codec, HeldOut(reader, codec, samples=40))
    report = json.loads((parallel / "evaluation.json").read_text())["held_out"]
    assert found["loss"]["model"] == pytest.approx(report["loss"]["model"], rel=0.2)


def test_the_stock_classes_load_it(parallel: Path) -> None:
    from transformers import LlavaOnevisionForConditionalGeneration

    loaded: Any = LlavaOnevisionForConditionalGeneration.from_pretrained(parallel, output_loading_info=True)
    assert not loaded[1]["missing_keys"]
    assert not loaded[1]["unexpected_keys"]


def test_the_first_batch_is_shown_with_what_the_slots_are_to_say(
    chunks: Path, parallel: Path, tmp_path: Path
) -> None:
    words = ("--llava", chunks, "--run", tmp_path / "run", "--nproc", "1", "--check-only")
    said = run(PYTHON, "-m", "train_llava.launch", "--config", parallel / "config.yaml", *words).stdout
    (line,) = [line for line in said.splitlines() if line.startswith("first of ")]
    assert "<ACTION_SLOT" not in line
    assert line.count("<ACTION_") == 14
    assert line.endswith(">]")


def test_a_checkpoint_with_slots_is_not_trained_on_without(tmp_path: Path) -> None:
    model, processor, _ = load_or_build(TINY, ["go"], seed=0, num_slots=14)
    save_checkpoint(tmp_path / "run", model, processor)
    config = ModelConfig(path=str(tmp_path / "run"))
    with pytest.raises(UserError, match=r"has 14 action slots, but train\.parallel_action_slots is false"):
        load_or_build(config, [], seed=0)
    with pytest.raises(UserError, match="has 14 action slots, but 7 are wanted"):
        load_or_build(config, [], seed=0, num_slots=7)
    again, tokens, report = load_or_build(config, [], seed=0, num_slots=14)
    assert torch.equal(again.get_input_embeddings().weight, model.get_input_embeddings().weight)  # type: ignore[arg-type]
    assert prove_action_tokens(tokens.tokenizer) == prove_action_tokens(processor.tokenizer)
    assert report.num_new == 0


def test_slots_do_not_move_the_action_tokens() -> None:
    _, plain, _ = load_or_build(TINY, ["go"], seed=0)
    _, slotted, _ = load_or_build(TINY, ["go"], seed=0, num_slots=14)
    assert prove_action_tokens(plain.tokenizer) == prove_action_tokens(slotted.tokenizer)


def test_flash_attention_has_no_such_mask(parallel: Path) -> None:
    config = load_config(parallel / "config.yaml").model_dump()
    config["model"]["attention"] = "flash_attention_2"
    with pytest.raises(ValueError, match="parallel_action_slots needs a mask that flash-attn has not"):
        RunConfig.model_validate(config)


def test_lora_trains_the_slots_rows_too(tmp_path: Path) -> None:
    from train_llava.lora import TrainedRows, add_lora, load_adapter_run, save_adapter

    model, processor, _ = load_or_build(TINY, ["go"], seed=0)
    save_checkpoint(tmp_path / "base", model, processor)
    config = ModelConfig(path=str(tmp_path / "base"), lora=LoraConfig(rank=4, alpha=8))
    model, processor, _ = load_or_build(config, [], seed=0, num_slots=14)
    add_lora(model, config, processor.tokenizer)
    embedding: Any = model.get_input_embeddings()
    assert isinstance(embedding, TrainedRows)
    assert embedding.ids.tolist() == own_ids(processor.tokenizer)
    with torch.no_grad():
        embedding.trained_rows.add_(1)
    (tmp_path / "run").mkdir()
    save_adapter(tmp_path / "run", model, processor)
    again, of_run = load_adapter_run(tmp_path / "run", torch.float32)
    rows: Any = again.get_input_embeddings()
    assert torch.equal(rows.trained_rows, embedding.trained_rows)
    assert len(slot_ids(of_run.tokenizer)) == 14
