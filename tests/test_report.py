"""`oxe-mix report`: what its pages say is what the data says, counted here by other means."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from convert.action_codec import decode, read_codec
from convert.episodes import read_trajectory
from convert.reader import ConversationReader
from convert.statistics import action_stats
from oxe_mix.cards import load_cards
from oxe_mix.errors import UserError
from oxe_mix.lock import read_lock
from oxe_mix.rlds import Episode, parse_features
from oxe_mix.text import size
from oxe_mix.tfrecord import read_records
from tests.conftest import OXE_MIX, run
from tests.converting import convert, edit_line, lines_of, viola_episode, viola_folder
from tests.report_pages import Page, report
from train_llava.report import sampling
from train_llava.report.report_command import ReportOptions, run_report
from train_llava.report.sampling import drawn_episodes

EVIL = "</script><img src=x onerror=alert(1)>"


def _bins(line: dict[str, Any]) -> list[int]:
    return [int(bin_) for bin_ in re.findall(r"<ACTION_(\d+)>", line["conversations"][1]["value"])]


def _number(value: float) -> str:
    return f"{value:.3g}" if value else "0"


def test_a_converted_folder_is_told_with_the_counts_of_its_files(of_llava: Page, llava: Path) -> None:
    lines, held_out = lines_of(llava), lines_of(llava, "val")
    assert of_llava.figures["", "", "samples"] == f"{len(lines):,}"
    assert of_llava.figures["", "", "held_out"] == f"{len(held_out):,}"
    assert of_llava.figures["", "", "images"] == f"{len(list((llava / 'images').rglob('*.*'))):,}"
    for name in read_codec(llava).datasets:
        own = [line for line in lines if line["dataset"] == name]
        assert of_llava.figures[name, "", "steps_written"] == f"{len(own):,}"
        assert of_llava.rows[name][3] == f"{len(own):,}"
        assert of_llava.rows[name][7] == f"{len(own) / len(lines):.1%}"  # all weights of the demo are 1
        episodes = {line["id"].rsplit("/", 1)[0] for line in own}
        assert of_llava.figures[name, "", "episodes_written"] == f"{len(episodes):,}"


def test_bins_and_quantiles_of_a_converted_folder_are_those_of_its_conversations(
    of_llava: Page, llava: Path
) -> None:
    codec = read_codec(llava)
    for name, stats in codec.datasets.items():
        bins = np.array([_bins(line) for line in lines_of(llava, name=name)])
        assert len(bins) < 2_500  # so all of them were read
        for a, dimension in enumerate(("x", "y", "z", "rotation 1", "rotation 2", "rotation 3", "gripper")):
            assert of_llava.figures[name, dimension, "bins-used"] == str(len(np.unique(bins[:, a])))
            assert of_llava.figures[name, dimension, "q01"] == _number(stats.q01[a])
            assert of_llava.figures[name, dimension, "q99"] == _number(stats.q99[a])


def test_the_viewer_shows_the_recorded_actions_at_their_steps(of_llava: Page, llava: Path) -> None:
    codec = read_codec(llava)
    for name, stats in codec.datasets.items():
        episodes = of_llava.episodes(name)
        there = len({line["id"].rsplit("/", 1)[0] for line in lines_of(llava, name=name)})
        assert len({episode["id"] for episode in episodes}) == min(3, there)
        for episode in episodes:
            own = [line for line in lines_of(llava, name=name) if line["id"].startswith(episode["id"] + "/")]
            assert episode["steps"] == [line["step"] for line in own]
            actions = decode(np.array([_bins(line) for line in own]), stats, codec.binning)
            np.testing.assert_allclose(episode["actions"], actions, rtol=1e-4)
            moved = actions[:, :3]
            if load_cards().get(name).action_kind == "absolute":
                moved = np.concatenate([moved[:1] * 0, moved[1:] - moved[:-1]])
            np.testing.assert_allclose(episode["arrows"], moved, rtol=1e-4)
            for place, shown in zip(episode["shown"], episode["frames"], strict=True):
                _same_picture(shown, (llava / "images" / own[place]["image"]).read_bytes())


def _same_picture(shown: str, recorded: bytes) -> None:
    a = Image.open(io.BytesIO(base64.b64decode(shown.removeprefix("data:image/jpeg;base64,"))))
    b = Image.open(io.BytesIO(recorded)).convert("RGB").resize(a.size)
    assert np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)).mean() < 6


def test_downloaded_data_is_told_with_what_was_asked_and_what_came_of_it(of_data: Page, data: Path) -> None:
    lock = read_lock(data)
    assert lock is not None
    fractions = {spec.name: spec.fraction for spec in lock.mix.datasets}
    for dataset in lock.datasets:
        (split,) = dataset.splits
        row = of_data.rows[dataset.name]
        assert row[2:6] == [
            f"{split.of_episodes:,}",
            f"{fractions[dataset.name]:.2%}",
            f"{split.taken:,}",
            f"{split.taken / split.of_episodes:.2%}",
        ]
        assert of_data.figures[dataset.name, "", "episodes"] == f"{split.episodes:,}"


def _recorded(data: Path, name: str) -> tuple[dict[str, NDArray[np.float32]], Counter[str]]:
    """All actions of a dataset after its recipe by episode, and how often each instruction is first."""
    lock, card = read_lock(data), load_cards().get(name)
    assert lock is not None
    dataset = next(one for one in lock.datasets if one.name == name)
    tree = parse_features((data / dataset.folder / "features.json").read_text(), "")
    actions, told = {}, Counter[str]()
    for shard, locked in enumerate(dataset.splits[0].shards):
        with (data / dataset.folder / locked.file).open("rb") as stream:
            for record in read_records(stream, locked.file):
                trajectory = read_trajectory(Episode(record.payload, tree), card, state=False)
                actions[f"{name}/train/{shard}/{record.number}"] = trajectory.actions
                told[trajectory.first_instruction] += 1
    return actions, told


@pytest.mark.parametrize("name", ["kuka", "language_table", "bridge_orig"])
def test_figures_of_downloaded_data_are_those_of_its_recipe(of_data: Page, data: Path, name: str) -> None:
    actions, told = _recorded(data, name)
    every = np.concatenate(list(actions.values()))
    assert len(actions) <= sampling.MOST_EPISODES  # so all of them were read
    stats = action_stats(every, load_cards().get(name).normalise_mask, len(actions))
    for a, dimension in enumerate(("x", "y", "z")):
        outside = (every[:, a] < stats.q01[a]) | (every[:, a] > stats.q99[a])
        assert of_data.figures[name, dimension, "clipped"] == f"{outside.mean() * 100:.1f} %"
        assert of_data.figures[name, dimension, "q99"] == _number(stats.q99[a])
    assert of_data.figures[name, "", "instructions"] == str(len(told))
    for episode in of_data.episodes(name):
        np.testing.assert_allclose(episode["actions"], actions[episode["id"]], rtol=1e-4, atol=1e-9)
        first = int(name == "bridge_orig")  # its recipe drops the first step
        assert episode["steps"] == list(range(first, first + len(actions[episode["id"]])))


def test_known_defects_and_the_asked_recipe_are_told(of_data: Page, of_llava: Page) -> None:
    for page in (of_data, of_llava):
        assert "failed grasps are part of the data" in page.text
        assert "Kuka iiwa" in page.text


def test_the_same_seed_gives_the_same_page_and_another_one_other_episodes(
    llava: Path, of_llava: Page, tmp_path: Path
) -> None:
    report(llava, tmp_path / "a.html")
    again, other = report(llava, tmp_path / "b.html"), report(llava, tmp_path / "c.html", seed=1)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    assert again.viewer == of_llava.viewer
    assert other.episodes("viola") != again.episodes("viola")


def test_what_data_says_is_text_and_the_page_may_load_nothing(bucket: Path, tmp_path: Path) -> None:
    payloads = [viola_episode([EVIL, EVIL]), viola_episode(["open the drawer"] * 3)]
    data = viola_folder(tmp_path / "data", bucket, payloads)
    convert(data, tmp_path / "llava")
    for folder in (data, tmp_path / "llava"):
        page = report(folder, tmp_path / "report.html")
        text = (tmp_path / "report.html").read_text()
        assert EVIL not in text
        assert "<img src=x" not in text
        assert "&lt;/script&gt;&lt;img src=x onerror=alert(1)&gt;" in text
        assert text.count("</script>") == 2
        assert EVIL in [episode["instruction"] for episode in page.episodes("viola")]
        assert not {name for name in page.attributes if name.startswith("on") or name == "style"}
        assert page.policy.startswith("default-src 'none'; img-src data:; style-src 'sha256-")
        assert "unsafe" not in page.policy


def test_an_image_outside_the_folder_is_not_shown(
    llava: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(llava, tmp_path / "llava")
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.jpg")
    for file in sorted((copy / "conversations").glob("viola-*.jsonl")):
        for number in range(len(file.read_text().splitlines())):
            edit_line(file, number, lambda line: line.update(image="../../secret.jpg"))
    page = report(copy, tmp_path / "report.html")
    assert "secret.jpg" in capsys.readouterr().err
    shown = [one["name"] for one in page.viewer]
    assert "viola" not in shown
    assert "kuka" in shown


@pytest.mark.parametrize(("old", "new"), [("conversations/viola", "../viola"), ('"viola"', '"../viola"')])
def test_a_manifest_that_names_things_outside_is_refused(
    llava: Path, tmp_path: Path, old: str, new: str
) -> None:
    copy = shutil.copytree(llava, tmp_path / "llava")
    manifest = (copy / "manifest.json").read_text()
    assert old in manifest
    (copy / "manifest.json").write_text(manifest.replace(old, new))
    with pytest.raises(UserError, match=r"outside the folder|no name for a dataset"):
        run_report(ReportOptions(copy))


def test_both_layouts_give_the_same_page(data: Path, llava: Path, tmp_path: Path) -> None:
    convert(data, tmp_path / "llava", "--val-fraction", "0.1", "--layout", "tar")
    tar, files = (report(folder, tmp_path / "r.html") for folder in (tmp_path / "llava", llava))
    assert tar.viewer == files.viewer
    assert tar.figures == files.figures


def test_of_a_large_dataset_a_seeded_part_is_read_and_each_episode_once(
    llava: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    reader = ConversationReader(llava, "train")
    own = reader.ranges["viola"]
    all_of_it = {found.start: found for found in drawn_episodes(reader, own, 0)}
    assert sum(map(len, all_of_it.values())) == len(own)
    monkeypatch.setattr(sampling, "_ALL", 10)
    drawn = list(drawn_episodes(reader, own, 0))
    assert len({found.start for found in drawn}) == len(drawn)
    assert all(all_of_it[found.start] == found for found in drawn)
    assert drawn == list(drawn_episodes(reader, own, 0))
    monkeypatch.setattr("train_llava.report.from_llava.MOST_EPISODES", 5)
    page = report(llava, tmp_path / "report.html")
    assert f"5 of {len(all_of_it):,} training episodes read" in page.text


def test_a_report_in_its_folder_disturbs_neither_verify_nor_check(data: Path, llava: Path) -> None:
    for folder in (data, llava):
        assert run_report(ReportOptions(folder)) == 0
    run(OXE_MIX, "verify", data)
    run(OXE_MIX, "check", llava)
    for folder in (data, llava):
        (folder / "report.html").unlink()


def test_the_command_ends_with_what_was_read_and_what_to_do_next(
    llava: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_report(ReportOptions(llava, tmp_path / "report.html"))
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith(f"read: {llava}, converted data: ")
    num_bytes = (tmp_path / "report.html").stat().st_size
    assert out[-2].startswith(f"result: {tmp_path}/report.html, {size(num_bytes)}, ")
    assert out[-1] == f"next: open it in a browser, then oxe-mix check {llava}, make train LLAVA={llava}"
    assert json.loads((llava / "manifest.json").read_text())["datasets"][0]["name"] in out[1]
