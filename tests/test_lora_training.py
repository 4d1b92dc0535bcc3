"""A LoRA run by the command, stopped and gone on with, exported, scored and asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from convert.reader import ConversationReader
from tests.conftest import OXE_MIX, PYTHON, ROOT, run
from train_llava.config import TinyModel
from train_llava.loading import load_checkpoint, save_checkpoint
from train_llava.tiny import build_tiny
from train_llava.trainer import part_of


@pytest.fixture(scope="module")
def base(llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model without action tokens, as one would have from a hub."""
    folder = tmp_path_factory.mktemp("base") / "base"
    reader = ConversationReader(llava, "train")
    torch.manual_seed(0)
    small = TinyModel(hidden_size=32, heads=2, text_layers=2)
    save_checkpoint(folder, *build_tiny(small, [reader[i].question for i in range(40)]))
    return folder


@pytest.fixture(scope="module")
def adapters(base: Path, llava: Path, tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight steps of adapters and the projector, on two ranks, with checkpointing of activations."""
    config: dict[str, Any] = yaml.safe_load(tiny_config.read_text())
    config["model"] = {"path": str(base), "lora": {"rank": 4, "alpha": 8, "dropout": 0.1}}
    rates = {"vision_tower": None, "projector": 1e-3, "language_model": 5e-3}
    config["train"] |= {"learning_rates": rates, "max_steps": 8, "gradient_checkpointing": True}
    out = tmp_path_factory.mktemp("lora")
    (out / "config.yaml").write_text(yaml.safe_dump(config))
    command: list[str | Path] = [
        PYTHON,
        "-m",
        "train_llava.launch",
        "--config",
        out / "config.yaml",
        "--llava",
        llava,
    ]
    run(*command, "--run", out / "run", "--nproc", "2")
    return out / "run"


def test_only_adapters_and_what_has_a_rate_changed(adapters: Path, base: Path) -> None:
    trained, _ = load_checkpoint(adapters)
    before = dict(load_checkpoint(base)[0].named_parameters())
    changed = {
        part_of(name)
        for name, weight in trained.named_parameters()
        if name in before and not torch.equal(weight, before[name])
    }
    assert changed == {"projector"}
    assert not (adapters / "model.safetensors").exists()
    resume = adapters / "checkpoints/step-8/resume"
    states = sum(file.stat().st_size for file in resume.rglob("*_model_states.pt"))
    assert states < (base / "model.safetensors").stat().st_size  # the frozen weights are not in it


def test_what_was_exported_is_scored_and_acts_as_the_adapters_do(
    adapters: Path, llava: Path, tmp_path: Path
) -> None:
    merged = tmp_path / "merged"
    said = run(OXE_MIX, "export", "--checkpoint", adapters, "--out", merged).stdout
    assert f"result: {merged}" in said
    assert 'from_pretrained("MERGED")' in (adapters / "README.md").read_text()
    assert 'from_pretrained("RUN")' in (merged / "README.md").read_text()
    scores = []
    for folder in (adapters, merged):
        report = tmp_path / f"{folder.name}.json"
        run(OXE_MIX, "eval", "--checkpoint", folder, "--data", llava, "--samples", "16", "--out", report)
        scores.append(json.loads(report.read_text())["report"]["loss"]["model"])
    assert scores[0] == pytest.approx(scores[1], rel=1e-4)
    image = next((llava / "images/viola").rglob("*.jpg"))
    words = ("--image", image, "--instruction", "Pick up the red block", "--unnorm-key", "viola")
    asked = [
        json.loads(run(PYTHON, ROOT / "inference_action.py", "--checkpoint", folder, *words).stdout)
        for folder in (adapters, merged)
    ]
    assert asked[0]["bins"] == asked[1]["bins"]


def test_training_the_same_folder_again_is_refused(adapters: Path, llava: Path) -> None:
    command: list[str | Path] = [
        PYTHON,
        "-m",
        "train_llava.launch",
        "--config",
        adapters / "config.yaml",
        "--llava",
        llava,
    ]
    said = run(*command, "--run", adapters, "--nproc", "2", code=2).stderr
    assert "holds a trained model already" in said
