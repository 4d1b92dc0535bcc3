"""Asking for a corrected recipe: what cards and mixes may say, what is refused, and what is shown of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from oxe_mix.card_check import check_fits
from oxe_mix.cards import SHIPPED, Cards, load_card
from oxe_mix.catalog import card_text
from oxe_mix.errors import UserError
from oxe_mix.mix import load_mix
from oxe_mix.mix_check import check_mix, report_json, report_text
from oxe_mix.trees import shipped_tree

IAMLAB = "iamlab_cmu_pickup_insert_converted_externally_to_rlds"
EDAN = "dlr_edan_shared_control_converted_externally_to_rlds"
NYU_ROT = "nyu_rot_dataset_converted_externally_to_rlds"
TACO = "{name: taco_play, version: 0.1.0, fraction: 1, recipe: corrected}"
VIOLA = "{name: viola, version: 0.1.0, fraction: 1}"


def test_a_card_without_a_corrected_recipe_says_so(cards: Cards) -> None:
    with pytest.raises(UserError, match="card viola: has no corrected recipe; drop `recipe: corrected`"):
        cards.get("viola").with_recipe("corrected")


def _edited(tmp_path: Path, name: str, old: str, new: str) -> Path:
    text = (SHIPPED / f"{name}.yaml").read_text()
    assert old in text
    (tmp_path / f"{name}.yaml").write_text(text.replace(old, new))
    return tmp_path / f"{name}.yaml"


def _line(file: Path, of: str) -> int:
    return max(i for i, line in enumerate(file.read_text().splitlines(), 1) if of in line)


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        (
            IAMLAB,
            "    trajectory_after: [drop_first_step]\n",
            "",
            "previous_delta has no value for the first",
        ),
        (
            NYU_ROT,
            "    dims: 7\n    recipe",
            "    dims: 8\n    recipe",
            "corrected.action.dims is 8, action.dims",
        ),
        (EDAN, "  action_kind: absolute\n", "", "corrects nothing; give action, state or action_kind"),
        (EDAN, "  action_kind: absolute", "  action_kind: relative", "'relative' is unknown"),
        (EDAN, "  differs:", "  differss:", "differss: unknown key"),
        ("droid", "    q99: [0.7597932070493698, ", "    q99: [", "q99: "),
        ("droid", "  dims: 7\n", "  dims: 5\n", "drop_zero is of six movements, dims is 5"),
    ],
)
def test_a_corrected_recipe_of_wrong_form_is_refused_with_file_and_line(
    tmp_path: Path, name: str, old: str, new: str, message: str
) -> None:
    file = _edited(tmp_path, name, old, new)
    with pytest.raises(UserError, match=message) as error:
        load_card(file)
    assert str(error.value).startswith(f"{file}:")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[{slice: [6, 7]}, invert]", "[{slice: [7, 8]}, invert]", "slice \\[7, 8\\] of 7 columns is empty"),
        ("[{slice: [6, 7]}, invert]", "[{slice: [5, 7]}, invert]", "comes to 8 columns, dims says 7"),
        ("[{slice: [6, 7]}, invert]", "[wxyz_to_xyzw]", "wxyz_to_xyzw takes 4 columns, there are 7"),
    ],
)
def test_a_corrected_recipe_that_does_not_fit_the_data_is_refused_at_its_line(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    file, tree = _edited(tmp_path, NYU_ROT, old, new), shipped_tree(NYU_ROT)
    assert tree is not None
    with pytest.raises(UserError, match=message) as error:
        check_fits(load_card(file), file, tree, "features.json")
    assert str(error.value).startswith(f"{file}:{_line(file, 'dims: 7' if 'comes to' in message else new)}: ")


def _mix(tmp_path: Path, *datasets: str) -> Path:
    file = tmp_path / "mine.yaml"
    file.write_text("\n".join(["name: mine", "datasets:", *(f"- {line}" for line in datasets), ""]))
    return file


def test_a_mix_asks_for_the_corrected_recipe_beside_a_dataset(tmp_path: Path, cards: Cards) -> None:
    file = _mix(tmp_path, TACO, VIOLA)
    mix = load_mix(file, cards)
    assert [spec.recipe for spec in mix.datasets] == ["corrected", "openvla"]
    report = check_mix(mix, cards, file)
    assert "\ncorrected recipe: taco_play\n" in report_text(report)
    shares = yaml.safe_load(report_json(report))["shares"]
    assert [share["recipe"] for share in shares] == ["corrected", "openvla"]
    plain = _mix(tmp_path, VIOLA)
    assert "corrected" not in report_text(check_mix(load_mix(plain, cards), cards, plain))


@pytest.mark.parametrize(
    ("datasets", "message"),
    [
        ([TACO.replace("corrected", "better")], "datasets.0.recipe: .*'openvla' or 'corrected'"),
        (
            [TACO, TACO.replace("recipe: corrected", "split: test")],
            "taco_play differ in recipe; they share one",
        ),
    ],
)
def test_a_recipe_that_there_is_not_or_two_of_one_dataset_are_refused(
    tmp_path: Path, cards: Cards, datasets: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        load_mix(_mix(tmp_path, *datasets), cards)


def test_the_check_of_a_mix_refuses_a_corrected_recipe_that_no_card_has(tmp_path: Path, cards: Cards) -> None:
    file = _mix(tmp_path, TACO, VIOLA.replace("}", ", recipe: corrected}"))
    with pytest.raises(UserError) as error:
        check_mix(load_mix(file, cards), cards, file)
    assert str(error.value) == (
        f"{file}: datasets.1.recipe: card viola: has no corrected recipe; drop `recipe: corrected`"
    )


def test_a_card_in_full_says_what_its_corrected_recipe_differs_in(cards: Cards) -> None:
    for card in cards:
        text = " ".join(card_text(card).split())
        assert ("corrected recipe" in text) == (card.corrected is not None), card.name
        if card.corrected:
            assert card.corrected.differs in text, card.name
            assert f"source: {card.corrected.source}" in text, card.name
    iamlab = card_text(cards.get(IAMLAB))
    assert "action, [3:7], wxyz_to_xyzw, quat_to_euler, previous_delta, wrap_angle" in iamlab
    assert "action        the same columns, absolute" in card_text(cards.get(EDAN))
    assert "idle steps (drop_zero)" in card_text(cards.get("droid"))
