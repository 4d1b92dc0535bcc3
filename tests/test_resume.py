"""Runs that are killed, stopped, split otherwise or go wrong; the `checkpoint` fixture is the undisturbed
one.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import PYTHON, ROOT, run


def _command(config: Path, llava: Path, out: Path, num_ranks: int, *more: str) -> list[str]:
    words = ("-m", "train_llava.launch", "--config", config, "--llava", llava, "--run", out)
    return [PYTHON, *map(str, words), "--nproc", str(num_ranks), *more]


def _changed(config: Path, folder: Path, **changes: Any) -> Path:
    raw = yaml.safe_load(config.read_text())
    for section, values in changes.items():
        raw[section] = {**raw.get(section, {}), **values}
    file = folder / "changed.yaml"
    file.write_text(yaml.safe_dump(raw))
    return file


def _lines(run_folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]


def _course(run_folder: Path) -> list[tuple[Any, ...]]:
    """What does not depend on the clock."""
    keys = ("step", "loss", "grad_norm", "learning_rate", "shares")
    return [tuple(line[key] for key in keys) for line in _lines(run_folder) if "loss" in line]


def _descendants(pid: int) -> list[int]:
    listed = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    parents = {int(own): int(parent) for own, parent in map(str.split, listed.splitlines())}
    found = [pid]
    for one in found:
        found += [own for own, parent in parents.items() if parent == one]
    return found


def _kill_at(command: list[str], step: int) -> None:
    """Run until a step is logged, then end every process of it with SIGKILL."""
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(f"step {step}/"):
                # Stopped first: a launcher that saw its ranks die would end in its own way.
                for number in (signal.SIGSTOP, signal.SIGKILL):
                    for pid in _descendants(process.pid):
                        with suppress(ProcessLookupError):
                            os.kill(pid, number)
                break
    assert process.returncode == -signal.SIGKILL


def test_killed_at_any_step_and_started_again_it_is_the_same_run_bit_for_bit(
    checkpoint: Path, llava: Path, tiny_config: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    command = _command(tiny_config, llava, out, 2)
    steps = sorted(random.Random(7).sample(range(2, 12), 2))
    for step in steps:
        _kill_at(command, step)
        assert not (out / "config.json").exists()
    said = run(*command).stdout
    assert "going on from" in said
    assert _course(out) == _course(checkpoint)
    for file in ("model.safetensors", "tokenizer.json", "action_codec.json", "config.json"):
        assert (out / file).read_bytes() == (checkpoint / file).read_bytes(), file
    assert not list((out / "checkpoints").glob(".partial-*"))
    scores = [
        json.loads((folder / "evaluation.json").read_text())["held_out"] for folder in (out, checkpoint)
    ]
    assert scores[0] == scores[1]


def test_one_rank_with_twice_the_accumulation_has_the_same_losses_as_two(
    checkpoint: Path, llava: Path, tiny_config: Path, tmp_path: Path
) -> None:
    done = run(*_command(tiny_config, llava, tmp_path / "run", 1))
    assert "x 2 (worked out) x 1 ranks" in done.stdout
    for one, two in zip(_lines(tmp_path / "run"), _lines(checkpoint), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=2e-5)
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-3)


def test_each_rank_holds_its_share_of_the_optimizers_state_by_deepspeeds_own_report(
    checkpoint: Path,
) -> None:
    report = json.loads((checkpoint / "evaluation.json").read_text())
    held = report["optimizer_bytes"]
    assert (report["zero_stage"], report["ranks"]) == (2, 2)
    assert held["this_rank"] == pytest.approx(held["unsplit"] / 2, rel=0.01)


def test_with_other_ranks_only_the_weights_go_on_and_only_when_asked(
    checkpoint: Path, llava: Path, tiny_config: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    (out / "checkpoints").mkdir(parents=True)
    shutil.copytree(checkpoint / "checkpoints/step-10", out / "checkpoints/step-10")
    shutil.copy(checkpoint / "metrics.jsonl", out)
    refused = run(*_command(tiny_config, llava, out, 1), code=2).stderr
    assert "written by 2 ranks, and now there are 1" in refused
    assert "WEIGHTS_ONLY=1" in refused
    run(*_command(tiny_config, llava, out, 1, "--weights-only"))
    course, undisturbed = _course(out), _course(checkpoint)
    assert course[:10] == undisturbed[:10]
    # The weights, the data and the schedule are those of the run; the first loss shows it.
    assert course[10][1] == pytest.approx(undisturbed[10][1], rel=2e-5)
    assert [line[3] for line in course] == [line[3] for line in undisturbed]


def test_sigterm_saves_and_ends_and_the_next_start_goes_on(
    checkpoint: Path, llava: Path, tiny_config: Path, tmp_path: Path
) -> None:
    # Frames that workers decode are those that one process would have.
    config = _changed(tiny_config, tmp_path, data={"cache_frames": False, "workers": 1})
    out = tmp_path / "run"
    command = _command(config, llava, out, 2)
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as process:
        assert process.stdout is not None
        said = ""
        for line in process.stdout:
            said += line
            if line.startswith("step 3/"):
                process.send_signal(signal.SIGTERM)
    assert process.returncode == 143
    assert "saved; the same command goes on from there" in said
    assert not (out / "README.md").exists()
    run(*command)
    assert _course(out) == _course(checkpoint)


def test_a_loss_that_is_no_number_ends_the_run_before_the_weights_change(
    llava: Path, tiny_config: Path, tmp_path: Path
) -> None:
    rates = {"vision_tower": 1e30, "projector": 1e30, "language_model": 1e30}
    config = _changed(
        tiny_config, tmp_path, train={"learning_rates": rates, "warmup_ratio": 0.0}, checkpoints={"every": 1}
    )
    out = tmp_path / "run"
    said = run(*_command(config, llava, out, 2), code=1).stderr
    assert "the loss is no number at step 2; the weights are those of step 1" in said
    assert [line["step"] for line in _lines(out)] == [1]
    assert [path.name for path in (out / "checkpoints").glob("step-*")] == ["step-1"]
    assert not (out / "config.json").exists()


def test_check_only_trains_nothing(llava: Path, tiny_config: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    said = run(*_command(tiny_config, llava, out, 2, "--check-only")).stdout
    for part in (
        "batch: 64 (train.global_batch)",
        "256 action tokens",
        "length: frames 17 + prompt",
        "[<ACTION_",
        "a black and a white frame change the logits",
        "saved and loaded again gives the same logits",
        "memory per process",
        "checked; nothing was trained",
    ):
        assert part in said, part
    assert not (out / "metrics.jsonl").exists()
    assert not list(out.glob("checkpoints/step-*"))


def test_one_batch_alone_is_learnt_and_leaves_no_model(
    llava: Path, tiny_config: Path, tmp_path: Path
) -> None:
    rates = {"vision_tower": 5e-3, "projector": 5e-3, "language_model": 5e-3}
    train = {"global_batch": 4, "micro_batch": 2, "max_steps": 60, "learning_rates": rates}
    config = _changed(tiny_config, tmp_path, train=train, logging={"every": 20})
    out = tmp_path / "run"
    said = run(*_command(config, llava, out, 2, "--overfit-batch")).stdout
    assert "after 60 steps on one batch: loss 0.0" in said
    assert "of its 32 tokens right: it can learn" in said
    assert not (out / "config.json").exists()
    assert not (out / "metrics.jsonl").exists()
    config = _changed(config, tmp_path, train={**train, "max_steps": 2})
    assert "on one batch" in run(*_command(config, llava, out, 2, "--overfit-batch"), code=2).stderr


def test_bf16_with_workers_augmentation_more_data_and_the_best_checkpoint(
    llava: Path, tiny_config: Path, tmp_path: Path
) -> None:
    sample = {
        "id": "t",
        "conversations": [{"from": "human", "value": "Two and two?"}, {"from": "gpt", "value": "4"}],
    }
    (tmp_path / "chat.jsonl").write_text(json.dumps(sample) + "\n")
    chat = {"name": "chat", "path": str(tmp_path / "chat.jsonl"), "weight": 100}
    config = _changed(
        tiny_config,
        tmp_path,
        data={"cache_frames": False, "workers": 1, "augment": {}, "sources": [chat]},
        # Batches of one: some ranks meet only text in a step.
        train={"precision": "bf16", "micro_batch": 1, "global_batch": 8, "max_steps": 6},
        checkpoints={"every": 4, "keep": 1},
        evaluation={"every": 3, "samples": 8},
        logging={"every": 1, "to": ["tensorboard"]},
    )
    out = tmp_path / "run"
    run(*_command(config, llava, out, 2))
    lines = _lines(out)
    assert lines[0]["shares"]["chat"] > 0
    assert list((out / "tensorboard").glob("events.out.*"))
    evaluations = {line["step"]: line["evaluation"]["l1"]["model"] for line in lines if "evaluation" in line}
    assert list(evaluations) == [3, 6]
    best = min(evaluations, key=lambda step: (evaluations[step], step))
    assert {path.name for path in (out / "checkpoints").glob("step-*")} == {f"step-{best}", "step-6"}
    assert json.loads((out / "checkpoints/best.json").read_text())["step"] == best
    import torch
    from safetensors.torch import load_file

    assert {weight.dtype for weight in load_file(out / "model.safetensors").values()} == {torch.bfloat16}


def test_a_logger_that_is_not_installed_is_one_line(llava: Path, tiny_config: Path, tmp_path: Path) -> None:
    config = _changed(tiny_config, tmp_path, logging={"to": ["wandb"]})
    said = run(*_command(config, llava, tmp_path / "run", 1), code=2).stderr
    assert said == "error: logging.to: wandb is not installed; pip install 'oxe-mix[logging]'\n"


def test_under_zero_3_the_losses_are_the_same_and_the_whole_model_is_saved(
    checkpoint: Path, llava: Path, tiny_config: Path, tmp_path: Path
) -> None:
    config = _changed(tiny_config, tmp_path, train={"zero": {"stage": 3}})
    out = tmp_path / "run"
    run(*_command(config, llava, out, 2))
    for own, other in zip(_lines(out), _lines(checkpoint), strict=True):
        assert own["loss"] == pytest.approx(other["loss"], rel=1e-4)
    from train_llava.loading import load_checkpoint

    model, _ = load_checkpoint(out)
    assert all(weight.numel() for weight in model.parameters())
