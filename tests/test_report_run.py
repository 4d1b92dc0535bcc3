"""`oxe-mix report` of a training run, on a tiny checkpoint that nobody trained."""

from __future__ import annotations

import io
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from convert.action_codec import decode, read_codec, text_to_bins
from convert.reader import ConversationReader
from oxe_mix.errors import UserError
from oxe_mix.files import write_json
from tests.browser import LAPTOP, PHONE, browser
from tests.converting import convert
from tests.report_pages import Page, report
from tests.untrained import untrained
from train_llava.acting.load import Loading, load_policy
from train_llava.acting.observation import Observation
from train_llava.evaluate import HeldOut, evaluate
from train_llava.loading import load_checkpoint
from train_llava.metrics import POLICIES
from train_llava.report.predictions import predict
from train_llava.report.report_command import ReportOptions, run_report

STEPS = 40


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def held_out(checkpoint_folder: Path, llava: Path) -> dict[str, Any]:
    """What training would have scored."""
    model, processor = load_checkpoint(checkpoint_folder, torch.float32)
    codec = read_codec(llava)
    return evaluate(model, processor, codec, HeldOut(ConversationReader(llava, "val"), codec))


@pytest.fixture(scope="module")
def checkpoint_folder(llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return untrained(llava, tmp_path_factory.mktemp("report-run") / "run")


@pytest.fixture(scope="module")
def finished(checkpoint_folder: Path, held_out: dict[str, Any], llava: Path) -> Path:
    """The checkpoint with what training leaves beside it."""
    run = checkpoint_folder
    shutil.copy(llava / "manifest.json", run / "data_manifest.json")
    shutil.copytree(llava / "cards", run / "cards")
    report: dict[str, Any] = {
        "ranks": 2,
        "zero_stage": 2,
        "train_seconds": 400.0,
        "steps": STEPS,
        "global_batch": 64,
    }
    report |= {"samples": 746, "mean_loss": 1.25, "final_loss": 0.625, "held_out": held_out}
    write_json(run / "evaluation.json", report)
    lines: list[dict[str, Any]] = []
    for step in range(1, STEPS + 1):
        lines.append({"step": step, "loss": 3 / step + 0.5 + 0.2 * math.sin(step)})
        lines += [{"step": step, "evaluation": held_out}] if step % 10 == 0 else []
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def test_a_runs_figures_are_those_of_its_report(
    finished: Path, held_out: dict[str, Any], tmp_path: Path
) -> None:
    page = report(finished, tmp_path / "run.html")
    assert page.figures["", "", "l1"] == f"{held_out['l1']['model']:.3f}"
    assert page.figures["", "", "held_out"] == f"{held_out['samples']:,}"
    names = {"model": "model", "shuffled_images": "shuffled", "mean_action": "mean", "repeat_last": "repeat"}
    for name, own in held_out["datasets"].items():
        for policy in POLICIES:
            assert page.figures[name, "", f"l1-{names[policy]}"] == f"{own['l1'][policy]:.3f}"
        assert page.rows[name][3:6] == [
            f"{own['samples']:,}",
            f"{own['l1']['model']:.3f}",
            f"{own['l1']['mean_action']:.3f}",
        ]
    hits = held_out["accuracy"]["model"]
    assert f"{hits['within_5'] - hits['within_1']:.1%}" in page.text
    assert "Give --data LLAVA" in page.text


def test_predictions_are_what_the_model_says_to_held_out_samples(finished: Path, llava: Path) -> None:
    predicted = predict(finished, llava, 12, "cpu")
    assert len(predicted.guesses) == 12
    codec, reader = read_codec(llava), ConversationReader(llava, "val")
    policy = load_policy(finished, Loading(device="cpu"))
    samples = {reader[i].id: reader[i] for i in range(len(reader))}
    for guess in predicted.guesses:
        sample = samples[guess.id]
        stats = codec.datasets[sample.dataset]
        bins = text_to_bins(sample.answer, codec.action_dim)
        np.testing.assert_allclose(guess.recorded, decode(bins, stats, codec.binning)[0])
        image = np.asarray(Image.open(io.BytesIO(sample.frames[0].read())).convert("RGB"))
        instruction = codec.asking.instruction(sample.question)
        question = policy.question(Observation({"primary": image}, instruction, sample.dataset))
        np.testing.assert_allclose(guess.predicted, policy.answer([question])[0].actions[0])
        assert guess.frame.startswith(b"\xff\xd8")
    assert math.isclose(sum(share.value for share in predicted.near), 1)
    assert {guess.id.split("/")[0] for guess in predicted.guesses} == set(reader.ranges)


def test_the_run_is_seen_with_its_predictions(finished: Path, llava: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.html"
    page = report(finished, file, data=llava, samples=12, device="cpu")
    assert "12 held-out samples of llava" in page.text
    with browser(tmp_path / "profile") as window:
        for name, size in (("laptop", LAPTOP), ("phone", PHONE)):
            for part in ("overview", "predictions"):
                window.open(file, part, size)
                assert window.run("return document.querySelector('#panel-guesses').hidden") == (
                    part == "overview"
                )
                assert window.run("return document.documentElement.scrollWidth") <= size[0]
                window.screenshot(f"report-run-{part}-{name}")
                assert window.requests() == []
        assert window.complaints() == []


def test_what_a_run_did_not_leave_is_said(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(finished / "metrics.jsonl", run)
    page = report(run, tmp_path / "run.html")
    assert "There is no `evaluation.json` in this folder" in page.text
    assert "Training loss" in page.text


def test_data_without_held_out_episodes_is_refused(finished: Path, data: Path, tmp_path: Path) -> None:
    convert(data, tmp_path / "llava", "--only", "viola")
    with pytest.raises(UserError, match="holds no held-out sample"):
        run_report(ReportOptions(finished, tmp_path / "r.html", data=tmp_path / "llava"))


def test_a_checkpoint_alone_is_no_run(checkpoint_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    shutil.copy(checkpoint_folder / "action_codec.json", folder)
    with pytest.raises(UserError, match="give the run's own folder"):
        run_report(ReportOptions(folder))


def test_a_pages_numbers_are_read_by_program() -> None:
    """The reader of these tests tells one dataset's figures from another's."""
    text = '<section data-dataset="a"><section><b data-figure="n">1</b></section></section>'
    page = Page(
        f'{text}<section data-dataset="b"><b data-figure="n">2</b></section>'
        '<script type="application/json" id="episodes">[]</script>'
    )
    assert page.figures == {("a", "", "n"): "1", ("b", "", "n"): "2"}
