"""Every dataset whose tree is known converts, with all that can be asked of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from convert.action_codec import read_codec
from convert.manifest import read_manifest
from convert.reader import ConversationReader
from oxe_mix.cards import Cards, load_cards
from oxe_mix.trees import shipped_tree
from tests.conftest import OXE_MIX, run
from train_llava.recorded import Translation

WIDTHS = sorted({card.action.dims for card in load_cards()})


def _mix(folder: Path, cards: Cards, width: int | None) -> Path:
    rows = [
        {"name": card.name, "version": card.version, "fraction": 1.0}
        for card in cards
        if shipped_tree(card.tree or card.name) is not None and width in (None, card.action.dims)
    ]
    file = folder / f"{width}.yaml"
    file.write_text(yaml.safe_dump({"name": "all", "datasets": rows}))
    return file


@pytest.fixture(scope="module")
def everything(cards: Cards, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two episodes of each."""
    folder = tmp_path_factory.mktemp("everything")
    options = ("--episodes", "2", "--shards", "1", "--seed", "5")
    run(OXE_MIX, "synth", "--mix", _mix(folder, cards, None), "--out", folder / "bucket", *options)
    return folder / "bucket"


@pytest.mark.parametrize("width", WIDTHS)
def test_every_dataset_converts_with_its_own_width(
    width: int, everything: Path, cards: Cards, tmp_path: Path
) -> None:
    mix = _mix(tmp_path, cards, width)
    more = ("--state", "--cameras", "primary,wrist", "--allow-missing", "--chunk", "2", "--layout", "tar")
    run(OXE_MIX, "convert", "--data", everything, "--mix", mix, "--out", tmp_path / "llava", *more)
    expected = {row["name"] for row in yaml.safe_load(mix.read_text())["datasets"]}
    manifest, codec = read_manifest(tmp_path / "llava"), read_codec(tmp_path / "llava")
    assert {d.name for d in manifest.datasets} == expected == set(codec.datasets)
    assert codec.action_dim == width
    assert all(d.steps.written > 0 and d.episodes.total == 2 for d in manifest.datasets)
    reader = ConversationReader(tmp_path / "llava", "train")
    for name, samples in reader.ranges.items():
        asking, sample = codec.asking_of(name), reader[samples[0]]
        assert len(asking.cameras) == len(sample.frames) == sample.question.count("<image>"), name
        assert asking.state == ("State: " in sample.question), name
        assert Translation(codec, name, codec, name).recording(sample, None).question == sample.question
    said = run(OXE_MIX, "check", tmp_path / "llava", "--decode").stdout
    assert ", 0 problems," in said


def test_two_widths_are_not_mixed(everything: Path, tmp_path: Path) -> None:
    done = run(OXE_MIX, "convert", "--data", everything, "--out", tmp_path / "llava", code=2)
    assert "actions of widths [7, 8] cannot share one codec" in done.stderr
    assert not (tmp_path / "llava").exists()
