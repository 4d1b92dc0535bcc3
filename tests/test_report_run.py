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

from convert.action_codec import ActionStats, decode, read_codec, text_to_bins
from convert.reader import ConversationReader
from oxe_mix.cards import load_cards
from oxe_mix.errors import UserError
from oxe_mix.files import write_json
from tests.browser import LAPTOP, PHONE, browser
from tests.converting import convert
from tests.report_pages import Page, is_share, points_of, report
from tests.untrained import untrained
from train_llava.acting.load import Loading, load_policy
from train_llava.acting.observation import Observation
from train_llava.evaluate import HeldOut, evaluate
from train_llava.loading import load_checkpoint
from train_llava.metrics import POLICIES
from train_llava.report.predictions import predict
from train_llava.report.report_command import ReportOptions, run_report
from train_llava.report.run_values import Guess

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
        # The first row of a dataset is that of the overview, those of its card have a name of their own.
        for a, dimension in enumerate(("x", "y", "z", "rotation 1", "rotation 2", "rotation 3", "gripper")):
            units = [f"{own['l1_robot_units'][policy][a]:.3g}" for policy in POLICIES]
            said = units if a in own["moving"] else ["—"] * len(POLICIES)
            assert page.rows[f"{name}/{dimension}"] == [dimension, *said]
        most = max(own["l1"].values())
        for policy in POLICIES:
            l1 = own["l1"][policy]
            is_share(page, (name, policy.replace("_", " ")), f"{l1:.3f}", l1 / most)
        _are_distances(page, name, own["accuracy"]["model"])
    for policy in POLICIES:
        _are_distances(page, policy.replace("_", " "), held_out["accuracy"][policy])
    assert "Give --data LLAVA" in page.text


def _are_distances(page: Page, part: str, hits: dict[str, float]) -> None:
    """How many bins away: four classes, each of the difference of two shares."""
    exact, one, five = (hits[name] for name in ("exact", "within_1", "within_5"))
    labels = ("the recorded bin", "1 away", "2 to 5 away", "further")
    for label, share in zip(labels, (exact, one - exact, five - one, 1 - five), strict=True):
        is_share(page, (part, label), f"{share:.1%}", share)


def test_a_runs_curves_go_through_its_figures(
    finished: Path, held_out: dict[str, Any], tmp_path: Path
) -> None:
    page = report(finished, tmp_path / "run.html")
    loss = [3 / step + 0.5 + 0.2 * math.sin(step) for step in range(1, STEPS + 1)]
    drawn = page.drawn["", "Training loss, nats per supervised token"]
    assert [look for look, _ in drawn] == ["grid", "curve faint", "curve model"]
    expected = [(step / STEPS * 400, 100 - own / max(loss) * 100) for step, own in enumerate(loss, 1)]
    np.testing.assert_allclose(points_of(drawn[1][1]), expected, atol=0.06)
    evaluated = {
        "L1 on held-out episodes, codec's range": held_out["l1"],
        "Exact bins on held-out episodes, share": {p: held_out["accuracy"][p]["exact"] for p in POLICIES},
        "Within 5 bins on held-out episodes, share": {
            p: held_out["accuracy"][p]["within_5"] for p in POLICIES
        },
        "Loss on held-out episodes, nats per token": held_out["loss"],
    }
    for label, figures in evaluated.items():
        _, *curves = page.drawn["", label]
        top = max(figures.values()) or 1
        heights = [100 - 100 * figures[policy] / top for policy in POLICIES if policy in figures]
        for (_, path), height in zip(curves, heights, strict=True):
            expected = [(x, height) for x in (100, 200, 300, 400)]
            np.testing.assert_allclose(points_of(path), expected, atol=0.06)


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
        _are_arrows(guess, stats)
    assert math.isclose(sum(share.value for share in predicted.near), 1)
    assert {guess.id.split("/")[0] for guess in predicted.guesses} == set(reader.ranges)


def _are_arrows(guess: Guess, stats: ActionStats) -> None:
    card = load_cards().get(guess.id.split("/")[0])
    if card.action_kind != "delta":
        assert guess.arrows == ()
        assert "no arrow" in guess.arrow_words
        return
    full = math.hypot(*(max(abs(stats.q01[a]), abs(stats.q99[a])) for a in (0, 1)))
    for arrow, action in zip(guess.arrows, (guess.recorded, guess.predicted), strict=True):
        np.testing.assert_allclose(arrow, action[:2] / full)
    assert guess.arrow_words == f"a full arrow is {full:.3g}"


def test_the_run_is_seen_with_its_predictions(finished: Path, llava: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.html"
    page = report(finished, file, data=llava, samples=12, device="cpu")
    assert "12 held-out samples of llava" in page.text
    arrows = 0
    for guess in predict(finished, llava, 12, "cpu").guesses:
        drawn = dict(
            page.drawn.get((guess.id, "Recorded and predicted movement in the plane of x and y"), [])
        )
        tips = [points_of(drawn[f"arrow {look}"])[1] for look in ("recorded", "predicted") if drawn]
        # x of the robot is up, y is left.
        np.testing.assert_allclose(tips, [(-100 * y, -100 * x) for x, y in guess.arrows], atol=0.06)
        arrows += len(tips)
    assert arrows > 6
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
