"""`oxe-mix report` of what is damaged, missing, too large or in the wrong place."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import webbrowser
from pathlib import Path
from typing import Any

import pytest

from convert.doctor_command import DoctorOptions, run_doctor
from oxe_mix.errors import UserError
from oxe_mix.rlds import INFO_FILE
from oxe_mix.text import size
from oxe_mix.tfrecord import frame
from tests.conftest import OXE_MIX
from tests.converting import convert, viola_episode, viola_folder
from tests.report_pages import report
from train_llava.report.report_command import ReportOptions, run_report


def test_an_episode_that_the_recipe_refuses_is_named_and_the_others_are_shown(
    bucket: Path, tmp_path: Path
) -> None:
    payloads = [viola_episode(["a", "a"], moves=[0.0, float("nan")]), viola_episode(["b", "b"])]
    page = report(viola_folder(tmp_path / "data", bucket, payloads), tmp_path / "report.html")
    assert "viola/train/0/0: step 1, dimension 0: action is nan" in page.text
    assert [episode["instruction"] for episode in page.episodes("viola")] == ["b"]


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("nothing", "no such folder"),
        ("empty", "holds nothing that download, convert or make train wrote"),
        ("unfinished", "the conversion is not finished"),
        ("dataset", r"is one dataset; give the folder of datasets: .*/data$"),
        ("out", "is a folder; name a file"),
        ("data", "--data is for the report of a run"),
    ],
)
def test_what_is_no_folder_of_a_stage_is_said_in_one_line(
    llava: Path, data: Path, tmp_path: Path, what: str, words: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "unfinished/conversations").mkdir(parents=True)
    options = {
        "dataset": ReportOptions(data / "viola/0.1.0"),
        "out": ReportOptions(llava, out=tmp_path),
        "data": ReportOptions(llava, data=llava),
    }
    with pytest.raises(UserError, match=words) as caught:
        run_report(options.get(what) or ReportOptions(tmp_path / what))
    assert "\n" not in str(caught.value)


def _run(folder: Path, **files: str) -> Path:
    """A run's folder with these files; `__` in a name is its dot."""
    folder.mkdir()
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("evaluation.json", "{}", "evaluation.json: steps: Field required"),
        ("evaluation.json", "[]", "evaluation.json: the whole: "),
        ("evaluation.json", "nonsense", "evaluation.json: not valid JSON"),
        ("metrics.jsonl", '{"step": 1, "evaluation": {}}', "metrics.jsonl: line 1: evaluation: samples"),
        ("metrics.jsonl", '{"loss": "a"}', "metrics.jsonl: line 1: step"),
        ("metrics.jsonl", '{"step": 1, "loss": 2}\n{"step": 2, "loss": "a"}', "metrics.jsonl: line 2: loss"),
        ("metrics.jsonl", "nonsense", "metrics.jsonl: a line is not valid JSON"),
    ],
)
def test_a_runs_file_that_training_did_not_write_is_named_in_one_line(
    tmp_path: Path, name: str, text: str, words: str
) -> None:
    run = _run(tmp_path / "run", **{name.replace(".", "__"): f"{text}\n"})
    with pytest.raises(UserError) as caught:
        run_report(ReportOptions(run))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


_HITS = {"exact": 0.1, "within_1": 0.2, "within_5": 0.3}
_POLICIES = ("model", "mean_action")


@pytest.mark.parametrize(
    ("hits", "gripper", "words"),
    [
        (_HITS, {"closed": 0.5, "open": 0.5}, r"gripper_f1\.model"),
        (_HITS | {"note": "text"}, None, r"accuracy\.model\.note"),
        (_HITS | {"within_1": None}, None, r"accuracy\.model: .*some shares are null"),
    ],
)
def test_scores_of_another_form_are_refused(tmp_path: Path, hits: Any, gripper: Any, words: str) -> None:
    scores = {
        "samples": 1,
        "l1": dict.fromkeys(_POLICIES, 0.1),
        "accuracy": dict.fromkeys(_POLICIES, hits),
        "gripper_f1": dict.fromkeys(_POLICIES, gripper),
        "datasets": {},
    }
    line = json.dumps({"step": 1, "evaluation": scores})
    with pytest.raises(UserError, match=words):
        run_report(ReportOptions(_run(tmp_path / "run", metrics__jsonl=f"{line}\n")))


def test_one_damaged_frame_or_line_of_a_conversion_costs_no_other_dataset(
    llava: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(llava, tmp_path / "llava")
    for image in (copy / "images/viola").rglob("*.jpg"):
        image.write_bytes(b"x")
    broken = next(f for f in (copy / "conversations").glob("kuka-train-*.jsonl") if f.stat().st_size)
    broken.write_text("x" + broken.read_text()[1:])
    page = report(copy, tmp_path / "r.html")
    said = capsys.readouterr().err
    assert "warning: viola: " in said
    assert "warning: kuka: " in said
    assert page.episodes("bridge_orig") != []
    assert "viola" not in [one["name"] for one in page.viewer]
    assert run_doctor(DoctorOptions(copy, json=True)) == 1
    found = {
        one["subject"] for one in json.loads(capsys.readouterr().out)["checks"] if one["level"] == "error"
    }
    assert found == {"viola", "kuka"}


def test_metadata_that_is_no_text_costs_one_dataset(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(data, tmp_path / "data")
    next((copy / "viola").glob("*/features.json")).write_bytes(b'{"a": "\xff\xfe"}')
    assert "features.json: is no UTF-8 text" in (report(copy, tmp_path / "r.html").text)
    capsys.readouterr()
    assert run_doctor(DoctorOptions(copy, json=True)) == 1
    assert "is no UTF-8 text" in capsys.readouterr().out


def test_a_codec_without_a_dataset_of_the_manifest_is_refused(llava: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(llava, tmp_path / "llava")
    codec = json.loads((copy / "action_codec.json").read_text())
    del codec["datasets"]["viola"]
    (copy / "action_codec.json").write_text(json.dumps(codec))
    for run in (lambda: run_report(ReportOptions(copy)), lambda: run_doctor(DoctorOptions(copy))):
        with pytest.raises(UserError, match=r"no statistics of viola, which manifest\.json lists"):
            run()


@pytest.mark.parametrize("words", [("doctor", "dätä"), ("report", "dätä")])
def test_what_a_terminal_cannot_write_is_written_another_way(words: tuple[str, str], tmp_path: Path) -> None:
    done = subprocess.run(
        [OXE_MIX, *words],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: d\\xe4t\\xe4: no such folder")


def test_scores_of_which_a_part_is_missing_are_refused(tmp_path: Path) -> None:
    hits = {"exact": 0.1, "within_1": 0.2, "within_5": 0.3}
    scores = {"samples": 1, "l1": {"model": 0.1}, "accuracy": {"model": hits}, "gripper_f1": {"model": None}}
    line = json.dumps({"step": 1, "evaluation": {**scores, "datasets": {}}})
    with pytest.raises(UserError, match="no scores of mean_action"):
        run_report(ReportOptions(_run(tmp_path / "run", metrics__jsonl=f"{line}\n")))


def test_a_loss_that_is_no_number_is_told_and_no_warning_of_ours(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [{"step": step, "loss": loss} for step, loss in enumerate([2.0, float("nan"), 1.5], 1)]
    run = _run(tmp_path / "run", metrics__jsonl="".join(f"{json.dumps(line)}\n" for line in lines))
    page = report(run, tmp_path / "r.html")
    assert "not finite at step 2; its curve has a gap" in page.text
    assert "nan" not in page.text
    assert "warning: The training loss was not finite at step 2" in capsys.readouterr().err


def test_a_run_without_weights_is_not_said_to_be_served(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = _run(tmp_path / "run", metrics__jsonl='{"step": 1, "loss": 2.0}\n')
    assert "no weights yet" in report(run, tmp_path / "r.html").text
    said = capsys.readouterr().out
    assert "no weights yet" in said
    assert "--checkpoint" not in said
    for name in ("model.safetensors", "action_codec.json"):
        shutil.copy(run / "metrics.jsonl", run / name)
    from train_llava.report.run_files import has_weights

    assert has_weights(run)


def test_one_damaged_shard_does_not_hide_the_other_datasets(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(data, tmp_path / "data")
    shard = next((copy / "viola").glob("*/*-00000-of-*"))
    os.truncate(shard, shard.stat().st_size - 50)
    gone = next((copy / "kuka").glob("*/*-00000-of-*"))
    gone.unlink()
    page, whole = report(copy, tmp_path / "r.html"), report(data, tmp_path / "whole.html")
    warned = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning:")]
    assert [line.split()[1] for line in warned] == ["viola:", "kuka:"]
    assert f"{shard.name}: record" in page.text
    assert "the file ends inside the record" in page.text
    assert f"{gone.name}: cannot be read (No such file or directory)" in page.text
    assert page.episodes("bridge_orig") == whole.episodes("bridge_orig")
    assert len(page.episodes("viola")) == 3
    assert page.rows == whole.rows


def test_a_record_whose_checksum_is_wrong_leaves_those_behind_it(bucket: Path, tmp_path: Path) -> None:
    payloads = [viola_episode([text, text]) for text in ("a", "b", "c")]
    folder = viola_folder(tmp_path / "data", bucket, payloads)
    [shard] = (folder / "viola/0.1.0").glob("*.tfrecord*")
    content = bytearray(shard.read_bytes())
    content[len(frame(payloads[0])) + 20] ^= 1
    shard.write_bytes(content)
    page = report(folder, tmp_path / "r.html")
    assert {episode["instruction"] for episode in page.episodes("viola")} == {"a", "c"}
    assert "record 1 at byte" in page.text


def test_a_frame_that_is_no_picture_is_told_and_the_other_episodes_are_shown(
    bucket: Path, tmp_path: Path
) -> None:
    payloads = [viola_episode(["a", "a"], image=b"\xff\xd8 no picture"), viola_episode(["b", "b"])]
    page = report(viola_folder(tmp_path / "data", bucket, payloads), tmp_path / "r.html")
    assert [episode["instruction"] for episode in page.episodes("viola")] == ["b"]
    assert "viola/train/0/0, step 0: " in page.text


def test_a_dataset_that_cannot_be_opened_is_told_and_the_others_are_shown(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(data, tmp_path / "data")
    next((copy / "viola").glob("*/features.json")).unlink()
    page = report(copy, tmp_path / "r.html")
    assert "viola" not in page.rows
    assert "kuka" in page.rows
    assert "features.json: no such file" in page.text
    assert "warning: viola: " in capsys.readouterr().err


def test_without_a_lock_all_splits_are_counted(bucket: Path, tmp_path: Path) -> None:
    payloads = [viola_episode(["a", "a"]), viola_episode(["b", "b"])]
    folder = viola_folder(tmp_path / "data", bucket, payloads)
    own = folder / "viola/0.1.0"
    info = json.loads((own / INFO_FILE).read_text())
    train = info["splits"][0]
    info["splits"] += [{**train, "name": "val"}, {**train, "name": "test"}]  # of the last no file is there
    (own / INFO_FILE).write_text(json.dumps(info))
    shutil.copy(own / "viola-train.tfrecord-00000-of-00001", own / "viola-val.tfrecord-00000-of-00001")
    page = report(folder, tmp_path / "r.html")
    num_bytes = size(2 * sum(map(len, payloads)))
    assert [page.figures["", "", name] for name in ("episodes", "shards", "bytes")] == ["4", "2", num_bytes]
    assert [cell.strip() for cell in page.rows["viola"][-2:]] == ["4", num_bytes]
    assert page.figures["viola", "", "splits"] == "train, val"
    assert "All 4 episodes read" in page.text
    assert "convert reads only train" in page.text


def test_datasets_that_are_held_out_whole_are_told_in_words(data: Path, tmp_path: Path) -> None:
    convert(data, tmp_path / "llava", "--val-fraction", "0.95", code=1)
    own = json.loads((tmp_path / "llava/manifest.json").read_text())["datasets"]
    without = [one["name"] for one in own if not one["episodes"]["written"]]
    assert 0 < len(without) < len(own)
    page = report(tmp_path / "llava", tmp_path / "r.html")
    assert page.text.count("No training episode; ") == len(without)
    assert page.text.count("No episode was read, so there are no actions to draw.") == len(without)
    assert {name for name, _ in page.drawn} == {one["name"] for one in own} - set(without) | {""}


def test_one_of_anything_is_told_as_one(bucket: Path, tmp_path: Path) -> None:
    folder = viola_folder(tmp_path / "data", bucket, [viola_episode(["a"])])
    page = report(folder, tmp_path / "r.html")
    assert "1 different instruction in 1 episode that was read:" in page.text


@pytest.mark.parametrize("place", ["/sys/r.html", "/proc/nothing/r.html"])
def test_a_place_that_cannot_be_written_is_said_in_one_line(llava: Path, place: str) -> None:
    with pytest.raises(UserError, match="cannot be written") as caught:
        run_report(ReportOptions(llava, Path(place)))
    assert "\n" not in str(caught.value)


def test_a_page_too_large_for_a_browser_is_warned_of(
    llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for most, warned in ((25_000_000, False), (100_000, True)):
        monkeypatch.setattr("train_llava.report.report_command._MOST_BYTES", most)
        report(llava, tmp_path / "r.html")
        assert ("is much for a browser; give a smaller --episodes" in capsys.readouterr().err) == warned


def test_the_page_is_opened_only_when_asked(
    llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = list[str]()

    def browse(url: str) -> bool:
        asked.append(url)
        return len(asked) == 1

    monkeypatch.setattr(webbrowser, "open", browse)
    for opens in (False, True, True):
        report(llava, tmp_path / "r.html", opens=opens)
    assert asked == [(tmp_path / "r.html").as_uri()] * 2
    assert capsys.readouterr().err.count("no browser could be started") == 1
