"""Cards: the shipped ones say what the facts say and fit their trees; a wrong one is refused at its line."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from oxe_mix.card_check import check_fits
from oxe_mix.cards import SHIPPED, Cards, load_card, load_cards
from oxe_mix.errors import UserError
from oxe_mix.mods import FlipChannels
from oxe_mix.record_mods import resolve
from oxe_mix.rlds import FeatureTree, parse_features
from oxe_mix.synth.features import features as _features
from oxe_mix.trees import TREES, shipped_tree
from tests.conftest import DATASETS

NAMES = tuple(card.name for card in load_cards())
TREE_NAMES = tuple(sorted(file.stem for file in TREES.glob("*.json")))
JOINTS_SCALED_GRIPPER_RAW = [*[True] * 7, False]
# Where a card deliberately says something else than the facts, and the card's notes or defects say why.
DIFFERENT: dict[tuple[str, str], Any] = {
    ("language_table", "version"): "0.0.1",  # the facts repeat a list that is wrong about the bucket
    ("droid_wipe", "version"): "1.0.0",  # the facts have none; a card needs one
    ("berkeley_mvp_converted_externally_to_rlds", "normalise_mask"): JOINTS_SCALED_GRIPPER_RAW,
    ("berkeley_rpt_converted_externally_to_rlds", "normalise_mask"): JOINTS_SCALED_GRIPPER_RAW,
    ("robo_set", "normalise_mask"): JOINTS_SCALED_GRIPPER_RAW,
}


def _tree(name: str, tmp_path: Path) -> FeatureTree:
    """The tree as TFDS writes it into a dataset's own features.json."""
    _features(name).save_config(str(tmp_path))
    return parse_features((tmp_path / "features.json").read_text(), "features.json")


@functools.cache
def _facts(shared: Path) -> dict[str, Any]:
    facts: dict[str, Any] = yaml.safe_load((shared / "oxe/facts.yaml").read_text())["datasets"]
    return facts


def test_every_dataset_of_known_layout_has_a_card_by_name_or_alias(cards: Cards, shared: Path) -> None:
    known = {name: "schema" in facts for name, facts in _facts(shared).items()}
    assert {name: cards.find(name) is not None for name in known} == known
    assert len(NAMES) == 66


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_card_and_its_mods_fit_the_datasets_true_tree(
    name: str, cards: Cards, tmp_path: Path
) -> None:
    card = cards.get(name)
    tree = _tree(card.tree or name, tmp_path)
    check_fits(card, cards.file_of(card), tree, "features.json")
    resolve(card.mods, tree, name)


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_card_says_what_the_facts_say(name: str, shared: Path) -> None:
    facts = _facts(shared)[{"robo_set": "roboset"}.get(name, name)]
    card = yaml.safe_load((SHIPPED / f"{name}.yaml").read_text())
    no_depth = dict.fromkeys(("primary", "secondary", "wrist"))
    for key in ("version", "robot", "control_hz", "cameras", "state", "normalise_mask"):
        assert card[key] == DIFFERENT.get((name, key), facts[key]), key
    for key in ("encoding", "dims", "recipe", "trajectory_before", "trajectory_after"):
        assert card["action"].get(key) == facts["action"].get(key), key
    assert card["language"] == {key: facts["language"][key] for key in ("key", "decode")}
    assert card.get("depth", no_depth) == facts["depth"]
    assert card.get("tree", name) == facts["schema"]
    assert card.get("public", True) == (facts["path"] != "not public")
    for key, listed in (("episodes", "catalog_examples"), ("size_gib", "size_gib")):
        if listed in facts:
            assert card[key] == facts[listed], key


@pytest.mark.parametrize("name", NAMES)
def test_a_dataset_outside_the_bucket_has_an_address_or_is_not_public(name: str, shared: Path) -> None:
    path = _facts(shared)[{"robo_set": "roboset"}.get(name, name)]["path"]
    card = load_card(SHIPPED / f"{name}.yaml")
    in_bucket = path.startswith("gs://gresearch/robotics/") or name == "language_table"
    assert (card.source is None) == (in_bucket or not card.public)
    # The facts' address of a dataset begins like the card's, without what only a download needs.
    assert card.source is None or path.startswith(card.source.removesuffix("/resolve/main"))


def test_a_card_is_advised_the_mods_of_the_facts_without_the_encoding(cards: Cards, shared: Path) -> None:
    flips = ("image_side_1", "image_side_2", "image_wrist_1", "image_wrist_2")
    asked = {
        name: set(facts.get("mods") or ()) - {"resize_and_jpeg_encode"}
        for name, facts in _facts(shared).items()
        if facts.get("mods") and cards.find(name)
    }
    # No published mod reaches fmb's cameras; a defect in the facts says that all four are blue first.
    asked["fmb"] = {FlipChannels(flip_channels=flips)}
    assert {name: set(cards.get(name).mods) for name in asked} == asked
    assert [card.name for card in cards if card.mods and card.name not in asked] == []


def test_the_shipped_trees_are_the_schemas_of_the_facts(shared: Path) -> None:
    schemas = {
        file.stem: json.loads(file.read_text())["features"]
        for file in (shared / "oxe/schemas").glob("*.json")
    }
    assert {name: json.loads((TREES / f"{name}.json").read_text()) for name in TREE_NAMES} == schemas


@pytest.mark.parametrize("name", TREE_NAMES)
def test_a_shipped_tree_reads_as_the_features_json_that_tfds_makes_of_it(name: str, tmp_path: Path) -> None:
    ours, theirs = shipped_tree(name), _tree(name, tmp_path)
    assert ours is not None
    for one, other in ((ours.episode, theirs.episode), (ours.step, theirs.step)):
        assert {key: (leaf.kind, leaf.shape, leaf.width) for key, leaf in one.items()} == {
            key: (leaf.kind, leaf.shape, leaf.width) for key, leaf in other.items()
        }
        assert {key: leaf.dtype for key, leaf in one.items() if leaf.kind != "image"} == {
            key: leaf.dtype for key, leaf in other.items() if leaf.kind != "image"
        }


def test_a_tree_that_is_not_shipped_is_none() -> None:
    assert shipped_tree("my_robot") is None


def _broken(tmp_path: Path, old: str, new: str) -> Path:
    text = (SHIPPED / "viola.yaml").read_text()
    assert old in text
    (tmp_path / "viola.yaml").write_text(text.replace(old, new, 1))
    return tmp_path / "viola.yaml"


def _line(file: Path, of: str) -> int:
    return next(i for i, line in enumerate(file.read_text().splitlines(), 1) if of in line)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("ops: [clip01, invert]", "ops: [clip02, invert]", "unknown"),
        ("ops: [clip01, invert]", "ops: [{slice: [0]}]", "slice"),
        ("robot: Franka", "robott: Franka", "robott"),
        ("dims: 7", "dims: 0", "greater than 0"),
        ("decode: utf8", "decode: latin1", "'latin1' is unknown; allowed: 'utf8' or 'int32_codepoints'"),
        ("dims: 7", "dims: 7\n  units: [m, rad]", "units has 2 entries, dims is 7"),
        ("true, false]", "false]", "normalise_mask has 6 entries, action.dims is 7"),
    ],
)
def test_a_card_of_wrong_form_is_refused_with_file_and_line(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    file = _broken(tmp_path, old, new)
    with pytest.raises(UserError) as error:
        load_card(file)
    assert message in str(error.value)
    line = int(str(error.value).removeprefix(f"{file}:").split(":", 1)[0])
    # The line holds what was changed, or the key that it belongs to.
    assert any(
        word in file.read_text().splitlines()[line - 1]
        for word in (new.split(":", 1)[0], "normalise_mask", "action", "name")
    )


def test_an_unknown_op_is_refused_at_its_own_line(tmp_path: Path) -> None:
    file = _broken(tmp_path, "ops: [clip01, invert]", "ops: [clip02, invert]")
    with pytest.raises(UserError, match=f"viola.yaml:{_line(file, 'clip02')}: action.recipe.2.ops.0: "):
        load_card(file)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[action, world_vector]", "[action, word_vector]", "no feature action/word_vector"),
        ("[action, rotation_delta]", "[action, terminate_episode]", "comes to 5 columns, dims says 7"),
        ("ops: [clip01, invert]", "ops: [quat_to_euler]", "quat_to_euler takes 4 columns, there are 1"),
        ("ops: [clip01, invert]", "ops: [{slice: [3, 4]}]", "of 1 columns is empty"),
        ("primary: agentview_rgb", "primary: agent_rgb", "no image feature observation/agent_rgb"),
    ],
)
def test_a_card_that_does_not_fit_the_data_is_refused_at_its_line(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    file = _broken(tmp_path, old, new)
    with pytest.raises(UserError, match=message) as error:
        check_fits(load_card(file), file, _tree("viola", tmp_path), "features.json")
    line = int(str(error.value).removeprefix(f"{file}:").split(":", 1)[0])
    expected = _line(file, "dims: 7") if "comes to" in message else _line(file, new.split("]", 1)[0])
    assert line == expected


@pytest.mark.parametrize(("field", "op"), [("trajectory_before", "drop_last_step")])
def test_a_dropped_step_on_the_wrong_side_is_refused(tmp_path: Path, field: str, op: str) -> None:
    text = (SHIPPED / "bridge_orig.yaml").read_text()
    (tmp_path / "bridge_orig.yaml").write_text(re.sub(rf"{field}: \[\w+\]", f"{field}: [{op}]", text))
    with pytest.raises(UserError, match=f"{field}.0: '{op}' is unknown"):
        load_card(tmp_path / "bridge_orig.yaml")


def test_a_delta_without_its_dropped_step_is_refused(tmp_path: Path) -> None:
    text = (SHIPPED / "bridge_orig.yaml").read_text().replace("  trajectory_after: [drop_last_step]\n", "")
    (tmp_path / "bridge_orig.yaml").write_text(text)
    with pytest.raises(UserError, match="next_state_delta has no value for the last step"):
        load_card(tmp_path / "bridge_orig.yaml")


def test_a_feature_name_with_a_slash_is_one_name(tmp_path: Path) -> None:
    tree = _tree("kuka", tmp_path)
    key = ("observation", "clip_function_input/base_pose_tool_reached")
    assert (tree.step[key].shape, tree.step[key].encoding) == ((7,), "zlib")


def test_ones_own_cards_come_on_top(tmp_path: Path) -> None:
    card: dict[str, Any] = yaml.safe_load((SHIPPED / "viola.yaml").read_text())
    (tmp_path / "my_robot.yaml").write_text(yaml.safe_dump({**card, "name": "my_robot"}))
    own = load_cards(tmp_path)
    assert own.get("my_robot").robot == "Franka"
    assert all(own.find(name) for name in DATASETS)
    assert [card.name for card in own] == sorted([*NAMES, "my_robot"])
