"""Mix files: what is read, and what one line says when something is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from oxe_mix.cards import Cards
from oxe_mix.errors import UserError
from oxe_mix.mix import MIXTURES, load_mix

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
    assert mix.source_of(bridge).startswith("https://rail.eecs.berkeley.edu/")
    assert mix.source_of(viola) == "gs://gresearch/robotics"


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
    with pytest.raises(UserError, match="the splits of viola differ in version, weight or source"):
        _load(tmp_path, GOOD + other, cards)


def test_a_missing_mix_is_looked_up_in_mixtures_and_the_nearest_name_offered(cards: Cards) -> None:
    with pytest.raises(
        UserError, match=r"defualt.yaml: no such file here or in mixtures/; did you mean default.yaml"
    ):
        load_mix(Path("defualt.yaml"), cards)


def test_every_shipped_mix_loads(cards: Cards) -> None:
    names = {load_mix(file, cards).name for file in MIXTURES.glob("*.yaml")}
    assert {"demo", "default"} <= names


def test_the_default_mix_has_the_fractions_of_the_facts(cards: Cards, shared: Path) -> None:
    import yaml

    facts = yaml.safe_load((shared / "oxe/mixtures.yaml").read_text())["seed"]["default"]["members"]
    # bridge in the bucket is outdated; the same data as its makers publish it stands in.
    facts["bridge_orig"] = facts.pop("bridge")
    default = load_mix(Path("default.yaml"), cards)
    assert {spec.name: spec.fraction for spec in default.datasets} == {
        name: fraction for name, fraction in facts.items() if cards.find(name)
    }


def test_a_cards_own_address_is_for_the_open_x_bucket_alone(tmp_path: Path, cards: Cards) -> None:
    file = tmp_path / "mix.yaml"
    file.write_text(GOOD.replace("name: mine", "name: mine\nsource: /my/bucket"))
    mix = load_mix(file, cards)
    assert {mix.source_of(spec) for spec in mix.datasets} == {"/my/bucket"}


def test_one_source_for_all_wins_over_each_datasets_own(tmp_path: Path, cards: Cards) -> None:
    file = tmp_path / "mix.yaml"
    file.write_text(GOOD)
    mix = load_mix(file, cards).with_source("here")
    assert {mix.source_of(spec) for spec in mix.datasets} == {"here"}
