"""Every dataset of the facts through recipe and codec, next to a plain second implementation that reads the
facts themselves; and against golden values that stand without the facts.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from numpy.typing import NDArray

from convert.action_codec import ActionStats, Bins, encode, normalize
from convert.episodes import read_trajectory
from convert.recipe import proprioception, standardize, zero_action
from convert.statistics import action_stats
from oxe_mix.cards import Card, Cards, load_cards
from oxe_mix.rlds import Episode
from oxe_mix.trees import shipped_tree
from tests.awkward_episodes import awkward_recording, payload
from tests.conftest import SHARED
from tests.plain_recipes import (
    NUM_BINS,
    Facts,
    PlainEpisode,
    Recording,
    plain_bin,
    plain_episode,
    plain_normalized,
    plain_stats,
)

GOLDEN = Path(__file__).parent / "golden/recipes.json"
NAMES = tuple(card.name for card in load_cards())
STEPS = (30, 14, 1, 2, 3)  # of one episode each; a recipe may leave nothing of the short ones
GOLDEN_SEED, GOLDEN_STEPS = 7, 8
NEAR_AN_EDGE = 1e-9


@functools.cache
def _facts() -> dict[str, Facts]:
    file = SHARED / "oxe/facts.yaml"
    if not file.exists():
        return {}
    datasets: dict[str, Facts] = yaml.safe_load(file.read_text())["datasets"]
    return {name: facts for name, facts in datasets.items() if "schema" in facts}


def _facts_of(card: Card) -> Facts:
    """The facts of a card; they know one dataset only by its alias."""
    return _facts()[next(name for name in card.names if name in _facts())]


@dataclass(frozen=True, slots=True)
class _Ours:
    """What the converter makes of an episode."""

    actions: NDArray[np.float32]
    states: NDArray[np.float32]
    kept: list[int]
    idle: list[bool]
    texts: list[str]


def _ours(card: Card, recording: Recording, num_steps: int) -> _Ours:
    tree = shipped_tree(card.tree or card.name)
    assert tree is not None
    episode = Episode(payload(card, recording, num_steps), tree)
    kept, read = standardize(episode, card), read_trajectory(episode, card, state=True)
    assert (read.first_step, read.actions.tolist()) == (kept.first_step, kept.actions.tolist())
    return _Ours(
        actions=kept.actions,
        states=proprioception(episode, card),
        kept=list(range(*kept.steps.indices(num_steps))),
        idle=zero_action(kept.actions, card).tolist(),
        texts=read.instructions,
    )


def _stats(card: Card, actions: NDArray[np.float32]) -> ActionStats:
    return action_stats(actions, card.normalise_mask, 1)


def _assert_same(ours: _Ours, plain: PlainEpisode) -> None:
    assert ours.kept == plain.kept
    assert ours.idle == plain.idle
    assert ours.texts == plain.texts
    for own, other in ((ours.actions, plain.actions), (ours.states, plain.states)):
        assert len(own) == len(other)
        for row, expected in zip(own.tolist(), other, strict=True):
            assert row == pytest.approx(expected, rel=1e-6, abs=1e-12)


def _assert_same_bins(bins: Bins, normalized: list[list[float]], scaled: list[bool]) -> None:
    for row, expected in zip(bins.tolist(), normalized, strict=True):
        for own, x, is_scaled in zip(row, expected, scaled, strict=True):
            edge = round((x + 1) / 2 * NUM_BINS) / NUM_BINS * 2 - 1
            # A quantile's last digit may put a scaled value on either side of an edge, and nothing else.
            near = is_scaled and abs(x - edge) < NEAR_AN_EDGE
            assert abs(own - plain_bin(x)) <= int(near), x


@pytest.mark.parametrize("name", _facts() or ["no facts"])
def test_every_dataset_comes_out_as_the_facts_say(name: str, cards: Cards, shared: Path) -> None:
    card, facts = cards.get(name), _facts()[name]
    recordings = [awkward_recording(card, seed, num_steps) for seed, num_steps in enumerate(STEPS)]
    plain = [plain_episode(facts, r, n) for r, n in zip(recordings, STEPS, strict=True)]
    ours = [_ours(card, r, n) for r, n in zip(recordings, STEPS, strict=True)]
    for own, other in zip(ours, plain, strict=True):
        _assert_same(own, other)
    actions = np.concatenate([episode.actions for episode in ours])
    stats = _stats(card, actions)
    plain_of_all = plain_stats(facts, [row for episode in plain for row in episode.actions])
    for own_column, column in ((stats.q01, plain_of_all.q01), (stats.q99, plain_of_all.q99)):
        assert list(own_column) == pytest.approx(column, rel=1e-6, abs=1e-12)
    normalized = [plain_normalized(row, plain_of_all) for episode in plain for row in episode.actions]
    assert normalize(actions, stats).tolist() == [pytest.approx(row, rel=1e-6) for row in normalized]
    scaled = [m and not c for m, c in zip(plain_of_all.mask, plain_of_all.constant, strict=True)]
    _assert_same_bins(encode(actions, stats), normalized, scaled)


def test_the_made_episodes_are_awkward_enough_to_tell_recipes_apart(cards: Cards, shared: Path) -> None:
    plain = {
        name: plain_episode(_facts()[name], awkward_recording(cards.get(name), 1, STEPS[1]), STEPS[1])
        for name in (
            "droid",
            "bridge_orig",
            "fractal20220817_data",
            "furniture_bench_dataset_converted_externally_to_rlds",
        )
    }
    droid, bridge, rt1, furniture = plain.values()
    # At rest, all but at rest, and moving.
    assert (sum(droid.idle), len(droid.idle)) == (4, STEPS[1])
    assert bridge.kept == list(range(1, STEPS[1] - 1))
    assert {row[6] for row in rt1.actions} == {0.0, 1.0}
    # Two of the quarter turns are gimbal locks: no yaw.
    assert sum(row[5] == 0 for row in furniture.actions) >= 2
    assert all("" in episode.texts and len(set(episode.texts)) > 3 for episode in plain.values())


def _rounded(rows: list[list[float]]) -> list[list[float]]:
    return [[float(f"{x:.7g}") for x in row] for row in rows]


def _golden_entry(card: Card, facts: Facts) -> dict[str, Any]:
    """What the plain implementation makes of one episode."""
    recording = awkward_recording(card, GOLDEN_SEED, GOLDEN_STEPS)
    plain = plain_episode(facts, recording, GOLDEN_STEPS)
    stats = plain_stats(facts, plain.actions)
    return {
        "kept": plain.kept,
        "idle": [step for step, idle in zip(plain.kept, plain.idle, strict=True) if idle],
        "actions": _rounded(plain.actions),
        "states": _rounded(plain.states),
        "bins": [[plain_bin(x) for x in plain_normalized(row, stats)] for row in plain.actions],
        "language": plain.texts,
    }


def _rewrite(cards: Cards) -> None:
    """One line a dataset, so that a change shows which ones it touches."""
    lines = [
        f'"{card.name}": {json.dumps(_golden_entry(card, _facts_of(card)), ensure_ascii=False)}'
        for card in cards
    ]
    head = f'"seed": {GOLDEN_SEED}, "steps": {GOLDEN_STEPS}'
    GOLDEN.write_text(f'{{{head}, "datasets": {{\n' + ",\n".join(lines) + "\n}}\n", encoding="utf-8")


@functools.cache
def _golden() -> dict[str, Any]:
    golden: dict[str, Any] = json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert (golden["seed"], golden["steps"]) == (GOLDEN_SEED, GOLDEN_STEPS)
    datasets: dict[str, Any] = golden["datasets"]
    return datasets


def test_the_golden_values_are_of_every_card(request: pytest.FixtureRequest, cards: Cards) -> None:
    # First in the file's order, so that --rewrite-golden is done before the values are read.
    if request.config.getoption("--rewrite-golden"):
        request.getfixturevalue("shared")
        _rewrite(cards)
    assert tuple(_golden()) == NAMES
    assert GOLDEN.stat().st_size < 300_000


@pytest.mark.parametrize("name", NAMES)
def test_every_dataset_comes_out_as_the_golden_values_say(name: str, cards: Cards) -> None:
    card, golden = cards.get(name), _golden()[name]
    ours = _ours(card, awkward_recording(card, GOLDEN_SEED, GOLDEN_STEPS), GOLDEN_STEPS)
    assert ours.kept == golden["kept"]
    assert [step for step, idle in zip(ours.kept, ours.idle, strict=True) if idle] == golden["idle"]
    assert ours.texts == golden["language"]
    assert ours.actions.tolist() == [pytest.approx(row, rel=1e-6, abs=1e-12) for row in golden["actions"]]
    assert ours.states.tolist() == [pytest.approx(row, rel=1e-6, abs=1e-12) for row in golden["states"]]
    assert encode(ours.actions, _stats(card, ours.actions)).tolist() == golden["bins"]
