"""Mix files: what is read, and what one line says when something is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from oxe_mix.cards import Cards
from oxe_mix.errors import UserError
from oxe_mix.mix import MIXTURES, Mix, load_mix

SHIPPED_MIXES = sorted(MIXTURES.glob("*.yaml"))

GOOD = """\
name: mine
datasets:
- {name: viola, version: 0.1.0, fraction: 0.5, weight: 2}
- {name: bridge_dataset, version: 1.0.0, fraction: 1}
"""


def _load(tmp_path: Path, text: str, cards: Cards) -> object:
    file = tmp_path / "mix.yaml"
    file.write_text(text)
    return load_mix(file, cards)


def test_a_mix_is_read_with_defaults_and_card_names(tmp_path: Path, cards: Cards) -> None:
    file = tmp_path / "mix.yaml"
    file.write_text(GOOD)
    mix = load_mix(file, cards)
    assert (mix.seed, mix.source) == (0, "gs://gresearch/robotics")
    viola, bridge = mix.datasets
    assert (viola.fraction, viola.weight, viola.split) == (0.5, 2.0, "train")
    # An alias becomes the card's name, and the card knows that this one lies elsewhere.
    assert bridge.name == "bridge_orig"
    assert mix.sources_of(bridge) == ("https://rail.eecs.berkeley.edu/datasets/bridge_release/data/tfds",)
    assert mix.sources_of(viola) == ("gs://gresearch/robotics",)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("fraction: 0.5", "fraction: 0", "datasets.0.fraction: 0 is not in (0, 1]"),
        (
            "fraction: 0.5",
            "fraction: 1.5",
            "datasets.0.fraction: 1.5 is not in (0, 1]; write 1.5 percent as 0.015",
        ),
        (
            "fraction: 0.5",
            "fraction: 12",
            "datasets.0.fraction: 12 is not in (0, 1]; write 12 percent as 0.12",
        ),
        ("fraction: 0.5", "fraction: .nan", "datasets.0.fraction: nan is not in (0, 1]"),
        ("fraction: 0.5", "fraktion: 0.5", "datasets.0.fraktion: unknown key; did you mean fraction?"),
        ("weight: 2", "weight: 0", "datasets.0.weight: "),
        ("name: viola", "name: voila", "datasets.0.name: no dataset called 'voila'; did you mean viola?"),
        ("name: viola", "name: ../viola", "datasets.0.name: '../viola' is no name for a folder"),
        ("name: viola", "name: bridge_orig", "bridge_orig, split train, stands here twice"),
        ("version: 0.1.0, ", "", "datasets.0.version: missing"),
        ("name: mine", "name: [", "mix.yaml:3: not valid YAML"),
        ("datasets:\n", "datasets: []\nrest:\n", "rest: unknown key"),
        ("name: mine", "nome: mine", "nome: unknown key; did you mean name?"),
    ],
)
def test_a_mistake_is_named_with_its_place(
    tmp_path: Path, cards: Cards, old: str, new: str, message: str
) -> None:
    with pytest.raises(UserError) as error:
        _load(tmp_path, GOOD.replace(old, new, 1), cards)
    assert message in str(error.value)
    assert all(line.startswith(str(tmp_path / "mix.yaml")) for line in str(error.value).splitlines())


def test_the_splits_of_a_dataset_share_version_and_weight(tmp_path: Path, cards: Cards) -> None:
    other = "- {name: viola, version: 0.2.0, fraction: 1, weight: 2, split: test}\n"
    with pytest.raises(UserError, match="the splits of viola differ in version; they share one"):
        _load(tmp_path, GOOD + other, cards)


def test_a_missing_mix_is_looked_up_in_mixtures_and_the_nearest_name_offered(cards: Cards) -> None:
    with pytest.raises(
        UserError, match=r"defualt.yaml: no such file here or in mixtures/; did you mean default"
    ):
        load_mix(Path("defualt.yaml"), cards)


def _members(mix: Mix) -> dict[str, float]:
    return {spec.name: spec.weight for spec in mix.datasets}


def _listed(shared: Path, group: str) -> dict[str, Any]:
    listed: dict[str, Any] = yaml.safe_load((shared / "oxe/mixtures.yaml").read_text())[group]
    return listed


@pytest.mark.parametrize("file", SHIPPED_MIXES, ids=lambda file: file.stem)
def test_a_shipped_mix_loads_under_its_files_name_with_the_versions_of_the_cards(
    file: Path, cards: Cards
) -> None:
    mix = load_mix(file, cards)
    assert mix.name == file.stem
    assert {spec.name: spec.version for spec in mix.datasets} == {
        spec.name: cards.get(spec.name).version for spec in mix.datasets
    }


@pytest.mark.parametrize("file", SHIPPED_MIXES, ids=lambda file: file.stem)
def test_a_shipped_mix_asks_for_the_mods_that_its_cards_advise(file: Path, cards: Cards) -> None:
    # The demo's bucket is made by us, without what the mods mend.
    specs = [spec for spec in load_mix(file, cards).datasets if file.stem != "demo"]
    assert {spec.name: spec.mods for spec in specs} == {
        spec.name: cards.get(spec.name).mods for spec in specs
    }


def test_the_default_mix_has_the_26_fractions_of_the_facts(cards: Cards, shared: Path) -> None:
    facts = _listed(shared, "seed")["default"]["members"]
    # bridge in the bucket is outdated; the same data as its makers publish it stands in.
    facts["bridge_orig"] = facts.pop("bridge")
    default = load_mix(Path("default.yaml"), cards)
    assert {spec.name: spec.fraction for spec in default.datasets} == facts
    assert len(default.datasets) == 26
    assert set(_members(default).values()) == {1.0}


@pytest.mark.parametrize(("name", "fraction", "number"), [("diversity", 1.0, 25), ("llava", 0.33, 3)])
def test_the_other_mixes_of_the_replaced_system_have_its_members(
    name: str, fraction: float, number: int, cards: Cards, shared: Path
) -> None:
    facts = {
        {"bridge": "bridge_orig"}.get(member, member): weight
        for member, weight in _listed(shared, "seed")[name]["members"].items()
    }
    mix = load_mix(Path(f"{name}.yaml"), cards)
    assert _members(mix) == facts
    assert [spec.fraction for spec in mix.datasets] == [fraction] * number


def test_openvlas_mixes_have_its_members_and_weights_but_for_two_substitutions(
    cards: Cards, shared: Path
) -> None:
    for name, listed in _listed(shared, "openvla").items():
        # Joint control cannot be mixed with poses, and fmb_dataset is not public.
        members = {
            {"fmb_dataset": "fmb"}.get(member, member): weight
            for member, weight in listed["members"].items()
            if member != "berkeley_rpt_converted_externally_to_rlds"
        }
        mix = load_mix(Path(f"{name}.yaml"), cards)
        assert _members(mix) == members, name
        assert {spec.fraction for spec in mix.datasets} == {1.0}, name


def test_every_listed_mix_is_shipped_and_no_other(shared: Path) -> None:
    listed = {*_listed(shared, "seed"), *_listed(shared, "openvla")}
    assert {file.stem for file in SHIPPED_MIXES} == {*listed, "demo", "droid"}


def test_the_droid_mix_takes_the_fraction_of_the_replaced_list(cards: Cards) -> None:
    (droid,) = load_mix(Path("droid.yaml"), cards).datasets
    assert (droid.name, droid.version, droid.fraction) == ("droid", "1.0.0", 0.03)


def test_a_libero_mix_reads_from_the_address_of_its_card(cards: Cards) -> None:
    mix = load_mix(Path("libero_10_no_noops.yaml"), cards)
    address = "https://huggingface.co/datasets/openvla/modified_libero_rlds/resolve/main"
    assert [mix.sources_of(spec) for spec in mix.datasets] == [(address,)]


def test_a_cards_own_address_is_for_the_open_x_bucket_alone(tmp_path: Path, cards: Cards) -> None:
    file = tmp_path / "mix.yaml"
    file.write_text(GOOD.replace("name: mine", "name: mine\nsource: /my/bucket"))
    mix = load_mix(file, cards)
    assert {mix.sources_of(spec) for spec in mix.datasets} == {("/my/bucket",)}


def test_one_source_for_all_wins_over_each_datasets_own(tmp_path: Path, cards: Cards) -> None:
    file = tmp_path / "mix.yaml"
    file.write_text(GOOD)
    mix = load_mix(file, cards).with_source("here")
    assert {mix.sources_of(spec) for spec in mix.datasets} == {("here",)}
