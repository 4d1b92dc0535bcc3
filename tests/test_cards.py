"""Cards: the six shipped ones say what the facts say, and a wrong one is refused with file and line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from oxe_mix.card_check import check_fits
from oxe_mix.cards import SHIPPED, Cards, load_card, load_cards
from oxe_mix.errors import UserError
from oxe_mix.rlds import FeatureTree, parse_features
from oxe_mix.synth.bucket import _features
from tests.conftest import DATASETS


def _tree(name: str, tmp_path: Path) -> FeatureTree:
    _features(name).save_config(str(tmp_path))
    return parse_features((tmp_path / "features.json").read_text(), "features.json")


@pytest.mark.parametrize("name", DATASETS)
def test_a_shipped_card_fits_the_datasets_true_tree(name: str, cards: Cards, tmp_path: Path) -> None:
    card = cards.get(name)
    check_fits(card, cards.file_of(card), _tree(name, tmp_path), "features.json")


@pytest.mark.parametrize("name", DATASETS)
def test_a_shipped_card_says_what_the_facts_say(name: str, shared: Path) -> None:
    facts = yaml.safe_load((shared / "oxe/facts.yaml").read_text())["datasets"][name]
    card = yaml.safe_load((SHIPPED / f"{name}.yaml").read_text())
    for key in ("robot", "control_hz", "cameras", "state", "language", "normalise_mask"):
        assert card[key] == facts[key], key
    for key in ("encoding", "dims", "recipe", "trajectory_before", "trajectory_after"):
        assert card["action"].get(key) == facts["action"].get(key), key
    # language_table lies under another version than the facts' list says; its card gives the source.
    assert card["version"] == (facts["version"] if name != "language_table" else "0.0.1")


@pytest.mark.parametrize("name", DATASETS)
def test_a_shipped_tree_is_the_schema_of_the_facts(name: str, shared: Path) -> None:
    schema = json.loads((shared / f"oxe/schemas/{name}.json").read_text())["features"]
    assert json.loads((SHIPPED.parent / f"trees/{name}.json").read_text()) == schema


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
        for word in (new.split(":", 1)[0], "normalise_mask", "name")
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


@pytest.mark.parametrize(
    ("field", "op"), [("trajectory_before", "drop_last_step"), ("trajectory_after", "drop_first_step")]
)
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
