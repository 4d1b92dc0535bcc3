"""What the pages of `oxe-mix report` draw of data: each picture against the data, counted by other means."""

from __future__ import annotations

import base64
import io
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from convert.action_codec import encode, read_codec
from convert.episodes import read_trajectory
from convert.statistics import action_stats
from oxe_mix.cards import load_cards
from oxe_mix.lock import read_lock
from oxe_mix.rlds import Episode, parse_features
from oxe_mix.tfrecord import read_records
from tests.conftest import OXE_MIX, run
from tests.converting import lines_of, viola_episode, viola_folder
from tests.report_pages import Page, bars_of, is_share, levels_of, report

_BINS = re.compile(r"<ACTION_(\d+)>")
# Of the demo's datasets: the mods drop some of the first, the recipe a step of each episode of the second.
_NAMES = ("kuka", "bridge_orig", "viola")


def _bins_by_episode(llava: Path, name: str) -> dict[str, NDArray[np.int64]]:
    found: dict[str, list[list[int]]] = {}
    for line in lines_of(llava, name=name):
        bins = [int(bin_) for bin_ in _BINS.findall(line["conversations"][1]["value"])]
        found.setdefault(line["id"].rsplit("/", 1)[0], []).append(bins)
    return {episode: np.array(bins) for episode, bins in found.items()}


def _recorded(data: Path, name: str) -> dict[str, tuple[NDArray[np.float32], str, int]]:
    """Of each episode the actions after its recipe, its instruction and how many steps it had before."""
    lock, card = read_lock(data), load_cards().get(name)
    assert lock is not None
    dataset = next(one for one in lock.datasets if one.name == name)
    tree = parse_features((data / dataset.folder / "features.json").read_text(), "")
    found = {}
    for shard, locked in enumerate(dataset.splits[0].shards):
        with (data / dataset.folder / locked.file).open("rb") as stream:
            for record in read_records(stream, locked.file):
                episode = Episode(record.payload, tree)
                trajectory = read_trajectory(episode, card, state=False)
                told = (trajectory.actions, trajectory.first_instruction, episode.num_steps)
                found[f"{name}/train/{shard}/{record.number}"] = told
    return found


def _grippers(page: Page, name: str) -> dict[str, list[float]]:
    paths = {key[1]: drawn for key, drawn in page.drawn.items() if key[0] == name}
    return {
        label.removeprefix("Gripper of "): levels_of(drawn[0][1])
        for label, drawn in paths.items()
        if label.startswith("Gripper of ")
    }


@pytest.mark.parametrize("name", _NAMES)
def test_a_grippers_timeline_is_high_where_it_is_open(
    of_data: Page, of_llava: Page, data: Path, llava: Path, name: str
) -> None:
    recorded = {episode: actions[:, -1] for episode, (actions, _, _) in _recorded(data, name).items()}
    said = {episode: (bins[:, -1] + 0.5) / 128 - 1 for episode, bins in _bins_by_episode(llava, name).items()}
    for page, truth in ((of_data, recorded), (of_llava, said)):
        drawn = _grippers(page, name)
        assert len(drawn) == min(12, len(truth))
        for episode, levels in drawn.items():
            np.testing.assert_allclose(levels, truth[episode], atol=1e-3)
    assert {round(level) for levels in drawn.values() for level in levels} == {0, 1}


@pytest.mark.parametrize("name", _NAMES)
def test_the_most_frequent_instructions_are_named_with_their_episodes(
    of_data: Page, of_llava: Page, data: Path, llava: Path, name: str
) -> None:
    told = Counter(text for _, text, _ in _recorded(data, name).values())
    exact = json.loads((llava / "manifest.json").read_text())["datasets"]
    [most] = [own["instructions"]["most_repeated"] for own in exact if own["name"] == name]
    assert most
    for page, top in ((of_data, dict(told.most_common(12))), (of_llava, most)):
        for text, episodes in top.items():
            is_share(page, (name, text), str(episodes), episodes / told.total())


def test_up_to_twelve_instructions_are_named(tmp_path: Path, bucket: Path) -> None:
    texts = [f"task {i:02d}" for i in range(14) for _ in range(14 - i)]
    page = report(
        viola_folder(tmp_path / "data", bucket, [viola_episode([t]) for t in texts]), tmp_path / "r"
    )
    named = [label for name, label in page.shares if label.startswith("task")]
    assert named == [f"task {i:02d}" for i in range(12)]
    assert "14 different instructions in 105 episodes that were read; the most frequent:" in page.text


def test_shares_are_drawn_of_downloaded_data(of_data: Page, data: Path, bucket: Path, tmp_path: Path) -> None:
    assert _taken_and_left(of_data, data) == 0
    mix = tmp_path / "mix.yaml"
    kuka = "{name: kuka, version: 0.1.0, fraction: 1, mods: [filter_success]}"
    mix.write_text(f"name: own\nseed: 0\ndatasets:\n- {kuka}\n")
    run(OXE_MIX, "download", "--mix", mix, "--source", bucket, "--out", tmp_path / "data")
    assert _taken_and_left(report(tmp_path / "data", tmp_path / "r.html"), tmp_path / "data") == 1


def _taken_and_left(page: Page, data: Path) -> int:
    """Prove what is drawn of a download against its lock; how many datasets lost episodes to mods."""
    lock, lost = read_lock(data), 0
    assert lock is not None
    fractions = {spec.name: spec.fraction for spec in lock.mix.datasets}
    for dataset in lock.datasets:
        (split,), name = dataset.splits, dataset.name
        of, taken, left = split.of_episodes, split.taken, split.episodes
        asked, label = fractions[name], "taken: whole episodes, at least one, before mods"
        is_share(page, (name, "asked for, after any --max-gb"), f"{asked:.2%} of {of:,} episodes", asked)
        is_share(page, (name, label), f"{taken:,}, {taken / of:.2%}", taken / of)
        assert ((name, "left by the mods") in page.shares) == (left != taken)
        if left != taken:
            lost, part = lost + 1, (taken - left) / taken
            is_share(page, (name, "left by the mods"), f"{left:,}, {left / of:.2%}", left / of)
            words = f"{taken - left:,} of {taken:,} ({part:.1%})"
            is_share(page, (name, "episodes: by the mods"), words, part)
    return lost


def test_what_the_recipe_drops_of_downloaded_data_is_drawn(of_data: Page, data: Path) -> None:
    steps = [(of, len(actions)) for actions, _, of in _recorded(data, "bridge_orig").values()]
    before, after = sum(of for of, _ in steps), sum(kept for _, kept in steps)
    words = f"{before - after:,} of {before:,} ({1 - after / before:.1%})"
    is_share(of_data, ("bridge_orig", "steps read: lost to the recipe"), words, 1 - after / before)
    assert before > after


def test_shares_and_what_was_dropped_are_drawn_of_converted_data(of_llava: Page, llava: Path) -> None:
    dropped = 0
    for own in json.loads((llava / "manifest.json").read_text())["datasets"]:
        expected: dict[str, tuple[str, float]] = {
            f"asked: weight {own['weight']:g}": (
                f"{own['weight_share']:.1%} of the weights",
                own["weight_share"],
            ),
            "came of it: weight x samples": (f"{own['share']:.1%} of the draws in training", own["share"]),
        }
        for what in ("episodes", "steps"):
            total = own[what]["total"]
            for reason, number in own[what]["dropped"].items():
                part = number / total
                expected[f"{what}: {reason}"] = (f"{number:,} of {total:,} ({part:.1%})", part)
                dropped += 1
        for label, (words, share) in expected.items():
            is_share(of_llava, (own["name"], label), words, share)
    assert dropped


@pytest.mark.parametrize("name", _NAMES)
def test_histograms_quantiles_and_bins_stand_where_the_values_are(
    of_data: Page, data: Path, name: str
) -> None:
    actions = np.concatenate([own for own, _, _ in _recorded(data, name).values()]).astype(np.float64)
    stats = action_stats(actions.astype(np.float32), load_cards().get(name).normalise_mask, 1)
    bins = encode(actions, stats)
    for a, dimension in ((0, "x"), (1, "y"), (6, "gripper")):
        q01, q99 = (stats.q01[a], stats.q99[a])
        margin = 0.35 * (q99 - q01)
        low, high = (q01 - margin, q99 + margin) if dimension != "gripper" else (0.0, 1.0)
        bar, *lines = of_data.drawn[name, f"Values of {dimension}"]
        counts, _ = np.histogram(np.clip(actions[:, a], low, high), 48, (low, high))
        _are_bars(bars_of(bar[1]), np.arange(48) * 400 / 48, counts)
        left, right = at = [(q - low) / (high - low) * 400 for q in (q01, q99)]
        assert [line[0] for line in lines] == ["quantile", "quantile"]
        assert [float(line[1][1:].split()[0]) for line in lines] == pytest.approx(at, abs=0.06)
        [[_, path]] = of_data.drawn[name, f"Bins of {dimension}"]
        used = np.bincount(bins[:, a], minlength=256)[128 * (dimension == "gripper") :]
        _are_bars(bars_of(path), left + np.arange(len(used)) * (right - left) / len(used), np.log1p(used))
        assert of_data.figures[name, dimension, "peak"] == f"{counts.max():,}"


def _are_bars(drawn: list[tuple[float, float]], xs: Any, values: Any) -> None:
    """A bar for each value that is not 0, the largest as high as the chart."""
    expected = [(x, max(2, 100 * value / max(values))) for x, value in zip(xs, values, strict=True) if value]
    assert len(drawn) == len(expected) > 0
    np.testing.assert_allclose(drawn, expected, atol=0.06)


def test_a_sheet_shows_the_first_the_middle_and_the_last_frame(of_data: Page, of_llava: Page) -> None:
    for page in (of_data, of_llava):
        for (name, number), places in page.sheets.items():
            frames = len(page.episodes(name)[number]["frames"])
            assert places == sorted({0, (frames - 1) // 2, frames - 1})


def test_all_cameras_of_downloaded_data_are_shown(of_data: Page) -> None:
    # Two square cameras side by side, and one of 640 x 512.
    for name, aspect in (("viola", 2.0), ("kuka", 1.25)):
        frame = of_data.episodes(name)[0]["frames"][0].removeprefix("data:image/jpeg;base64,")
        width, height = Image.open(io.BytesIO(base64.b64decode(frame))).size
        assert width / height == pytest.approx(aspect, abs=0.01)


def test_a_full_arrow_is_the_99_percent_quantile_of_the_movements(of_llava: Page, llava: Path) -> None:
    codec = read_codec(llava)
    for own in of_llava.viewer:
        stats, moved = codec.datasets[own["name"]], []
        for bins in _bins_by_episode(llava, own["name"]).values():
            low, high = np.array(stats.q01[:3]), np.array(stats.q99[:3])
            xyz = low + (bins[:, :3] + 0.5) / 256 * (high - low)
            moved.append(xyz if own["motion"] == "delta" else np.diff(xyz, axis=0, prepend=xyz[:1]))
        every = np.concatenate(moved)
        full = np.quantile(np.hypot(every[:, 0], every[:, 1]), 0.99), np.quantile(np.abs(every[:, 2]), 0.99)
        np.testing.assert_allclose(own["reach"], full, rtol=1e-3, atol=1e-6)
