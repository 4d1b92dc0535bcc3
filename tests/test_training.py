"""A real, short run: DeepSpeed ZeRO-2 on two ranks by `make train`, then acting with what it left."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert import action_codec as codec
from convert.action_codec import read_codec
from tests.conftest import PYTHON, ROOT, run


def _act(checkpoint: Path, image: Path, *more: str, code: int = 0) -> str:
    words = ("--instruction", "Pick up the red block", *more)
    done = run(
        PYTHON, ROOT / "inference_action.py", "--checkpoint", checkpoint, "--image", image, *words, code=code
    )
    return done.stdout if code == 0 else done.stderr


@pytest.fixture(scope="module")
def image(llava: Path) -> Path:
    return next((llava / "images/viola/train/0").glob("*.jpg"))


def test_it_trained_under_zero_2_on_two_ranks_and_learnt_something(checkpoint: Path, image: Path) -> None:
    report = json.loads((checkpoint / "evaluation.json").read_text())
    assert (report["zero_stage"], report["ranks"]) == (2, 2)
    lines = [json.loads(line) for line in (checkpoint / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert lines[-1]["loss"] < lines[0]["loss"] - 1
    assert set(report["held_out"]["l1"]) == {"model", "shuffled_images", "mean_action", "repeat_last"}
    assert set(report["held_out"]["accuracy"]) == set(report["held_out"]["l1"])
    assert set(report["held_out"]["accuracy"]["model"]) == {"exact", "within_1", "within_5"}
    assert json.loads(_act(checkpoint, image, "--unnorm-key", "viola"))["bins"][0][6] >= 128


def test_the_stock_classes_load_what_it_left(checkpoint: Path, llava: Path) -> None:
    import torch
    from transformers import AutoTokenizer, LlavaOnevisionForConditionalGeneration

    from train_llava.loading import load_checkpoint

    loaded: Any = LlavaOnevisionForConditionalGeneration.from_pretrained(checkpoint, output_loading_info=True)
    stock, loading = loaded
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    assert len(tokenizer("<ACTION_0><ACTION_255>", add_special_tokens=False)["input_ids"]) == 2
    ours, processor = load_checkpoint(checkpoint)
    ids = torch.tensor([tokenizer("user", add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        assert torch.equal(stock.eval()(input_ids=ids).logits, ours.eval()(ids).logits)
    assert (checkpoint / "action_codec.json").read_bytes() == (llava / "action_codec.json").read_bytes()
    assert processor.num_image_tokens == 16


def test_acting_prints_one_action_in_robot_units(checkpoint: Path, image: Path) -> None:
    record = json.loads(_act(checkpoint, image, "--unnorm-key", "viola"))
    assert set(record) == {
        "image", "unnorm_key", "actions", "clamped", "bins", "probabilities", "entropies", "latency_ms"
    }  # fmt: skip
    stats = read_codec(checkpoint).datasets["viola"]
    assert (
        np.shape(record["bins"]) == np.shape(record["actions"]) == np.shape(record["probabilities"]) == (1, 7)
    )
    assert np.allclose(record["actions"], codec.decode(np.array(record["bins"]), stats))
    assert all(0 < p <= 1 for p in record["probabilities"][0])
    assert set(record["latency_ms"]) == {"preprocess", "prefill", "decode", "total"}


def test_the_key_is_asked_for_when_several_robots_could_be_meant(checkpoint: Path, image: Path) -> None:
    assert "name the robot with --unnorm-key, one of: bridge_orig, " in _act(checkpoint, image, code=2)
    said = _act(checkpoint, image, "--unnorm-key", "bridge", code=2)
    assert said == "error: unknown --unnorm-key 'bridge'; did you mean bridge_orig?\n"


def test_what_cannot_act_says_why_in_one_line(checkpoint: Path, image: Path, tmp_path: Path) -> None:
    def one_line(*args: Any) -> str:
        said = _act(*args, code=2)
        assert said.startswith("error: ")
        assert said.count("\n") == 1
        return said

    assert "no such image" in one_line(checkpoint, tmp_path / "none.jpg", "--unnorm-key", "viola")
    (tmp_path / "text.jpg").write_text("not a picture")
    assert "not an image that can be decoded" in one_line(
        checkpoint, tmp_path / "text.jpg", "--unnorm-key", "viola"
    )
    said = one_line(checkpoint, image, "--unnorm-key", "viola", "--device", "gpu0")
    assert said.startswith("error: --device gpu0: ")
    shutil.copytree(checkpoint, tmp_path / "stripped")
    (tmp_path / "stripped/action_codec.json").unlink()
    assert "action_codec.json: no such file" in one_line(tmp_path / "stripped", image)
    shutil.copy(checkpoint / "action_codec.json", tmp_path)
    assert "no config.json, so no model" in one_line(tmp_path, image, "--unnorm-key", "viola")


def test_weights_that_are_missing_are_refused(checkpoint: Path, image: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    weights = load_file(broken / "model.safetensors")
    del weights[next(name for name in weights if name.endswith("lm_head.weight"))]
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    said = _act(broken, image, "--unnorm-key", "viola", code=2)
    assert "the weights have no lm_head.weight" in said
    (broken / "model.safetensors").write_bytes((checkpoint / "model.safetensors").read_bytes()[:1000])
    assert "no LLaVA-OneVision that can be loaded" in _act(broken, image, "--unnorm-key", "viola", code=2)


def _train(config: Path, llava: Path, out: Path) -> str:
    launch = (
        PYTHON,
        "-m",
        "train_llava.launch",
        "--config",
        config,
        "--llava",
        llava,
        "--run",
        out,
        "--nproc",
        "1",
    )
    done = run(*launch, code=2)
    assert done.stderr.count("error: ") == 1
    assert "Traceback" not in done.stderr
    return done.stderr


def test_training_refuses_in_one_line_what_cannot_work(
    checkpoint: Path, llava: Path, tiny_config: Path, tmp_path: Path
) -> None:
    assert "holds a trained model already" in _train(tiny_config, llava, checkpoint)
    assert "no finished conversion" in _train(tiny_config, tmp_path, tmp_path / "run")
    assert "no such file" in _train(tmp_path / "none.yaml", llava, tmp_path / "run")
    none = run(
        PYTHON, "-m", "train_llava.launch", "--config", tiny_config, "--llava", llava, "--nproc", "0", code=2
    )
    assert none.stderr == "error: NPROC is 0; at least one process must train\n"
    short = tmp_path / "short.yaml"
    short.write_text(tiny_config.read_text().replace("max_length: 128", "max_length: 30"))
    assert "tokens > train.max_length 30" in _train(short, llava, tmp_path / "run")
    assert not (tmp_path / "run/config.json").exists()
