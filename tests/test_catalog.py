"""`oxe-mix datasets` and `oxe-mix mix check`: what they say of good and of bad input, without any network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from oxe_mix.cards import SHIPPED, Card, Cards, load_cards
from oxe_mix.catalog import card_text, datasets_text, number, run_datasets
from oxe_mix.errors import UserError
from oxe_mix.mix import MIXTURES, find_mix, load_mix
from oxe_mix.mix_check import MixReport, check_mix, report_text, run_mix_check
from tests.conftest import OXE_MIX, PYTHON, run

VIOLA = "{name: viola, version: 0.1.0, fraction: 0.5}"
KUKA = "{name: kuka, version: 0.1.0, fraction: 0.07, mods: [filter_success]}"
RPT = "{name: berkeley_rpt_converted_externally_to_rlds, version: 0.1.0, fraction: 0.5}"


def _words(text: str) -> str:
    """Text without its line breaks."""
    return " ".join(text.split())


def _mix(tmp_path: Path, *datasets: str, head: str = "") -> Path:
    file = tmp_path / "mine.yaml"
    file.write_text("\n".join(["name: mine", head, "datasets:", *(f"- {line}" for line in datasets), ""]))
    return file


def _report(file: Path, cards: Cards) -> MixReport:
    return check_mix(load_mix(file, cards), cards, find_mix(file))


def test_the_list_has_a_line_for_each_dataset_and_says_what_to_type_next(cards: Cards) -> None:
    lines = datasets_text(cards).splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in lines[2:-2]}
    assert list(rows) == [card.name for card in cards]
    assert rows["viola"] == ["Franka", "1+wrist", "20", "150", "10.4", "EEF", "7", "delta", "1", "-"]
    assert rows["berkeley_rpt_converted_externally_to_rlds"][1:4] == ["wrist", "30", "908"]
    assert rows["robo_set"][5:] == ["joint", "8", "abs.", "0", "-"]
    assert rows["kuka"][-2:] == ["2", "filter"]
    assert rows["droid_wipe"][1:5] == ["1+wrist", "15", "?", "?"]
    assert lines[-1].startswith("next: oxe-mix datasets NAME")
    assert max(map(len, lines)) <= 140


def test_the_list_as_json_has_the_figures_as_numbers() -> None:
    listed = json.loads(run(OXE_MIX, "datasets", "--json").stdout)
    fmb = next(dataset for dataset in listed if dataset["name"] == "fmb")
    assert fmb["aliases"] == ["fmb_dataset"]
    assert fmb["cameras"] == {
        "primary": "image_side_1",
        "secondary": "image_side_2",
        "wrist": "image_wrist_1",
    }
    assert (fmb["episodes"], fmb["size_gib"], fmb["control_hz"]) == ({"train": 1804}, 356.63, 10)
    assert fmb["action"] == {"encoding": "EEF_POS", "dims": 7, "kind": "delta"}
    assert fmb["mods"] == ["{flip_channels: [image_side_1, image_side_2, image_wrist_1, image_wrist_2]}"]


def test_a_card_in_full_says_where_the_data_is_and_what_its_numbers_mean() -> None:
    said = run(OXE_MIX, "datasets", "bridge_orig").stdout
    assert (
        "https://rail.eecs.berkeley.edu/datasets/bridge_release/data/tfds, as bridge_orig or bridge_dataset"
        in said
    )
    assert "EEF_POS, 7 columns, delta" in said
    assert "- observation/state, [0:6], next_state_delta" in said
    assert "- 0 in 1 column" in said
    assert "- action, [-1:], binarize" in said
    assert "drop_first_step, drop_last_step" in said
    assert "language_instruction, utf8" in said
    assert "every column but 6" in said
    kuka = run(OXE_MIX, "datasets", "kuka").stdout
    assert "gs://gresearch/robotics/kuka/0.1.0" in kuka
    assert "- {name: kuka, version: 0.1.0, fraction: 0.1, mods: [filter_success]}" in kuka


def test_every_card_in_full_has_all_its_notes_and_every_defect_with_its_source(cards: Cards) -> None:
    for card in cards:
        text = _words(card_text(card))
        assert all(_words(note) in text for note in card.notes), card.name
        assert all(_words(f"{one.what} source: {one.source}") in text for one in card.defects), card.name


def test_a_dataset_without_a_public_copy_says_so(cards: Cards) -> None:
    assert "no public copy is known; a mix has to name one" in card_text(cards.get("droid_wipe"))


def test_an_alias_shows_the_card_and_json_is_the_whole_of_it(
    cards: Cards, capsys: pytest.CaptureFixture[str]
) -> None:
    run_datasets("roboset", None, as_json=True)
    assert Card.model_validate_json(capsys.readouterr().out) == cards.get("robo_set")


def test_an_unknown_dataset_is_one_line_with_the_nearest_name() -> None:
    done = run(OXE_MIX, "datasets", "kukka", code=2)
    assert done.stderr == "error: no dataset called 'kukka'; did you mean kuka?\n"


def test_ones_own_card_is_in_the_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "my_robot.yaml").write_text(
        (SHIPPED / "viola.yaml").read_text().replace("name: viola", "name: my_robot")
    )
    run_datasets(None, tmp_path, as_json=False)
    assert "\nmy_robot " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "?"),
        (779.81, "780"),
        (1998.4, "1,998"),
        (10.4, "10.4"),
        (7.0, "7"),
        (0.135, "0.14"),
        (0.0052, "0.005"),
    ],
)
def test_a_figure_is_short(value: float | None, text: str) -> None:
    assert number(value) == text


def test_the_default_mix_is_sound_and_shows_what_it_asks_for() -> None:
    lines = run(OXE_MIX, "mix", "check", "default.yaml").stdout.splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in lines[2:28]}
    assert rows["kuka"] == ["0.1.0", "train", "0.07", "1", "40,627", "54.6", "2", "filter"]
    # Of 150 episodes in 10.4 GiB, 135 are in train; half of them, by Python's round.
    assert rows["viola"] == ["0.1.0", "train", "0.5", "1", "68", "4.71", "1", "-"]
    assert rows["bridge_orig"][4:6] == ["?", "?"]
    assert lines[28] == (
        "about 111,489 episodes, 377 GiB, by the cards' figures and before mods; "
        "unknown, so not counted: episodes of 1, size of 1"
    )
    assert lines[29].endswith("default.yaml: sound, 0 warnings")
    assert lines[30].startswith("next: oxe-mix download --mix ")
    assert len(lines) == 31


@pytest.mark.parametrize("file", sorted(MIXTURES.glob("*.yaml")), ids=lambda file: file.stem)
def test_of_the_shipped_mixes_only_those_of_private_data_and_the_demo_have_a_warning(
    file: Path, cards: Cards
) -> None:
    warnings = _report(file, cards).warnings
    if file.stem == "demo":
        assert warnings == ("kuka: its card advises filter_success; the mix leaves that out",)
    elif file.stem.startswith(("tdroid", "droid_")):
        assert warnings == (f"{file.stem}: no public copy is known; name yours with source: or --source",)
    else:
        assert warnings == ()


@pytest.mark.parametrize(
    ("dataset", "warning"),
    [
        (
            KUKA.replace(", mods: [filter_success]", ""),
            "kuka: its card advises filter_success; the mix leaves",
        ),
        (
            "{name: taco_play, version: 0.1.0, fraction: 1, mods: [{flip_channels: [rgb_static]}]}",
            "taco_play: {flip_channels: [rgb_static]} is in the mix, but its card does not advise it",
        ),
        (VIOLA.replace("0.1.0", "0.2.0"), "viola: its card describes 0.1.0, the mix asks for 0.2.0"),
        (VIOLA.replace("}", ", max_gb: 1}"), "max_gb may scale fractions down at download"),
        (f"{VIOLA}\nmax_gb: 1", "max_gb may scale fractions down at download"),
    ],
)
def test_what_a_mix_may_not_mean_is_a_warning(
    tmp_path: Path, cards: Cards, dataset: str, warning: str
) -> None:
    (said,) = _report(_mix(tmp_path, dataset), cards).warnings
    assert said.startswith(warning)


def test_a_resize_is_taste_and_no_warning(tmp_path: Path, cards: Cards) -> None:
    file = _mix(tmp_path, VIOLA.replace("}", ", mods: [{resize: 128}]}"))
    assert _report(file, cards).warnings == ()
    assert report_text(_report(file, cards)).splitlines()[2].endswith(" resize")


def test_two_splits_of_a_dataset_warn_once(tmp_path: Path, cards: Cards) -> None:
    train = "{name: kuka, version: 0.1.0, fraction: 0.1}"
    report = _report(_mix(tmp_path, train, train.replace("0.1}", "0.1, split: val}")), cards)
    assert [share.episodes for share in report.shares] == [58039, None]
    assert len(report.warnings) == 1


def test_actions_of_different_width_in_one_mix_are_a_warning(tmp_path: Path, cards: Cards) -> None:
    (said,) = _report(_mix(tmp_path, VIOLA, KUKA, RPT), cards).warnings
    assert said == (
        "actions are not of one width: 8 in berkeley_rpt_converted_externally_to_rlds; 7 in all others"
    )
    assert _report(_mix(tmp_path, RPT), cards).warnings == ()


@pytest.mark.parametrize("where", ["mix", "dataset"])
def test_a_private_dataset_with_a_source_of_ones_own_is_no_warning(
    tmp_path: Path, cards: Cards, where: str
) -> None:
    wipe = "{name: droid_wipe, version: 1.0.0, fraction: 1}"
    file = (
        _mix(tmp_path, wipe, head="source: /my/copy")
        if where == "mix"
        else _mix(tmp_path, wipe.replace("}", ", source: /my/copy}"))
    )
    assert _report(file, cards).warnings == ()


@pytest.mark.parametrize(
    ("mods", "message"),
    [
        ("[filter_success]", "mod filter_success: no flag called success in an episode"),
        (
            "[{flip_channels: [agent_rgb]}]",
            "mod flip_channels: no colour frames called observation/agent_rgb",
        ),
        (
            "[{flip_channels: [joint_states]}]",
            "mod flip_channels: no colour frames called observation/joint_states",
        ),
        ("[flip_image_channels]", "mod flip_image_channels: no colour frames called observation/image"),
        ("[resize_and_jpeg_encode]", "resize_and_jpeg_encode would encode every frame anew"),
        ("[sharpen]", "unknown mod 'sharpen'"),
    ],
)
def test_a_mod_that_cannot_be_applied_is_refused_with_its_dataset(
    tmp_path: Path, mods: str, message: str
) -> None:
    file = _mix(tmp_path, KUKA, VIOLA.replace("}", f", mods: {mods}}}"))
    with pytest.raises(UserError) as error:
        run_mix_check(file, None, as_json=False)
    assert str(error.value).startswith(f"{file}: datasets.1.mods")
    assert message in str(error.value)


def test_a_success_flag_below_the_episodes_metadata_counts(tmp_path: Path, cards: Cards) -> None:
    name = "ucsd_pick_and_place_dataset_converted_externally_to_rlds"
    file = _mix(tmp_path, f"{{name: {name}, version: 0.1.0, fraction: 1, mods: [filter_success]}}")
    assert [share.episodes for share in _report(file, cards).shares] == [1355]


def test_every_bad_dataset_of_a_mix_has_its_line_and_the_exit_is_2(tmp_path: Path) -> None:
    bad = VIOLA.replace("}", ", mods: [filter_success]}")
    file = _mix(tmp_path, bad, KUKA, bad.replace("viola", "toto"))
    done = run(OXE_MIX, "mix", "check", file, code=2)
    assert [line.split(": mod ")[0] for line in done.stderr.splitlines()] == [
        f"error: {file}: datasets.0.mods: viola",
        f"error: {file}: datasets.2.mods: toto",
    ]


def test_a_card_that_does_not_fit_its_tree_is_refused_at_its_line(tmp_path: Path) -> None:
    (tmp_path / "cards").mkdir()
    card = tmp_path / "cards/viola.yaml"
    card.write_text((SHIPPED / "viola.yaml").read_text().replace("agentview_rgb", "agent_rgb"))
    done = run(OXE_MIX, "mix", "check", _mix(tmp_path, VIOLA), "--cards", card.parent, code=2)
    line = next(i for i, text in enumerate(card.read_text().splitlines(), 1) if "agent_rgb" in text)
    assert done.stderr == (
        f"error: {card}:{line}: no image feature observation/agent_rgb (shipped feature tree of viola)\n"
    )


def test_a_card_without_a_shipped_tree_is_checked_at_download(tmp_path: Path) -> None:
    text = (SHIPPED / "viola.yaml").read_text().replace("name: viola", "name: my_robot")
    (tmp_path / "my_robot.yaml").write_text(text)
    own = load_cards(tmp_path)
    (tmp_path / "mixes").mkdir()
    report = _report(_mix(tmp_path / "mixes", VIOLA.replace("viola", "my_robot")), own)
    assert report.warnings == ("my_robot: no feature tree is shipped; card and mods are checked at download",)


def test_a_check_as_json_has_shares_and_warnings(tmp_path: Path) -> None:
    fmb = "{name: fmb_dataset, version: 0.0.1, fraction: 1, mods: [{flip_channels: [image_side_1]}]}"
    file = _mix(tmp_path, KUKA, fmb.replace("}]", "}, {resize: 128}]"))
    said = json.loads(run(OXE_MIX, "mix", "check", file, "--json").stdout)
    assert (said["mix"], len(said["warnings"])) == ("mine", 2)
    assert [
        (share["name"], share["weight"], share["episodes"], share["mods"]) for share in said["shares"]
    ] == [
        ("kuka", 1.0, 40627, ["filter_success"]),
        ("fmb", 1.0, 1804, ["{flip_channels: [image_side_1]}", "{resize: 128}"]),
    ]


def test_listing_and_checking_load_nothing_heavy() -> None:
    heavy = ("apache_beam", "torch", "tensorflow", "tensorflow_datasets", "PIL", "fsspec")
    code = (
        "import sys; from pathlib import Path; from oxe_mix.catalog import run_datasets; "
        "from oxe_mix.mix_check import run_mix_check; run_datasets(None, None, True); "
        "run_mix_check(Path('default.yaml'), None, True); "
        f"sys.exit(str([m for m in {heavy} if m in sys.modules]))"
    )
    assert run(PYTHON, "-c", code, code=1).stderr.strip() == "[]"
