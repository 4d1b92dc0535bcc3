"""Corrected recipes, each one worked out by hand; and which steps recipes lose."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import pytest

from convert.recipe import proprioception, standardize, zero_action
from oxe_mix.cards import SHIPPED, Card, Cards, load_card
from oxe_mix.rlds import Episode, Key
from oxe_mix.trees import shipped_tree
from tests.awkward_episodes import awkward_recording, payload

Rows = list[list[float]]
IAMLAB = "iamlab_cmu_pickup_insert_converted_externally_to_rlds"
SIRIUS = "austin_sirius_dataset_converted_externally_to_rlds"
EDAN = "dlr_edan_shared_control_converted_externally_to_rlds"
MANISKILL = "maniskill_dataset_converted_externally_to_rlds"
MASK_VIT = "stanford_mask_vit_converted_externally_to_rlds"
NYU_ROT = "nyu_rot_dataset_converted_externally_to_rlds"
MVP = "berkeley_mvp_converted_externally_to_rlds"
RPT = "berkeley_rpt_converted_externally_to_rlds"
SEVEN = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
TCP = [1.0, 2.0, 3.0, 0.1, 0.2, 0.3, 0.4]  # position, then w, x, y, z
ROBOT_OBS = [float(i) for i in range(15)]
PUSHT: Key = ("action", "gripper_closedness_action")


@dataclass(frozen=True, slots=True)
class Worked:
    """Steps as they are recorded, and what the corrected recipe makes of them; None: what the usual one
    makes.
    """

    recorded: dict[Key, Rows]
    actions: Rows | None = None
    states: Rows | None = None
    first_step: int = 0
    kind: str = "delta"
    encoding: str | None = None  # of the state


def _about(axis: int, angle: float) -> list[float]:
    """w x y z of a turn about one axis."""
    turn = [math.cos(angle / 2), 0.0, 0.0, 0.0]
    turn[1 + axis] = math.sin(angle / 2)
    return turn


WORKED = {
    # Two movements from three poses; the yaw goes over half a turn in the second.
    IAMLAB: Worked(
        {
            ("action",): [
                [0.5, 0.25, 1.0, *_about(2, 3.0), 1.0],
                [0.75, 0.25, 1.0, *_about(2, 3.1), 1.0],
                [0.75, 0.0, 1.0, *_about(2, 3.3), 0.0],
                [0.75, 0.0, 1.5, *_about(2, 3.3), 0.0],
            ]
        },
        actions=[
            [0.25, 0, 0, 0, 0, 0.1, 1],
            [0, -0.25, 0, 0, 0, 0.2, 0],
            [0, 0, 0.5, 0, 0, 0, 0],
        ],
        first_step=1,
    ),
    "cmu_play_fusion": Worked(
        {
            ("action",): [
                [1, 2, 3, math.sin(0.25), 0, 0, math.cos(0.25), 1, 0],
                [4, 5, 6, 0, math.sin(0.1), 0, math.cos(0.1), 0, 1],
            ]
        },
        actions=[[1, 2, 3, 0.5, 0, 0, 1], [4, 5, 6, 0, 0.2, 0, 0]],
    ),
    "taco_play": Worked(
        {
            ("action", "rel_actions_world"): [[*SEVEN[:6], -1], [*SEVEN[:6], 1]],
            ("observation", "robot_obs"): [ROBOT_OBS, ROBOT_OBS],
        },
        actions=[[*SEVEN[:6], 1], [*SEVEN[:6], 0]],
        states=[[0, 1, 2, 3, 4, 5, 0, 6]] * 2,
    ),
    NYU_ROT: Worked(
        {("action",): [[*SEVEN[:6], 0], [*SEVEN[:6], 1]]}, actions=[[*SEVEN[:6], 1], [*SEVEN[:6], 0]]
    ),
    "droid": Worked(
        {
            ("observation", "cartesian_position"): [SEVEN[:6]],
            ("observation", "gripper_position"): [[0.25]],
        },
        states=[[*SEVEN[:6], 0, 0.25]],
        encoding="POS_EULER",
    ),
    "dobbe": Worked({("observation", "state"): [SEVEN]}, states=[[1, 2, 3, 4, 5, 6, 0, 7]]),
    EDAN: Worked({("action",): [SEVEN]}, actions=[[1, 2, 3, 4, 5, 6, -6]], kind="absolute"),
    MANISKILL: Worked(
        {
            ("action",): [[*SEVEN[:6], -1], [*SEVEN[:6], 1]],
            ("observation", "tcp_pose"): [TCP, TCP],
            ("observation", "state"): [[float(i) for i in range(18)]] * 2,
        },
        actions=[[*SEVEN[:6], 0], [*SEVEN[:6], 1]],
        states=[[1, 2, 3, 0.2, 0.3, 0.4, 0.1, 7]] * 2,
    ),
    MASK_VIT: Worked(
        {
            ("action",): [[1, 2, 3, 0.5, -1], [1, 2, 3, -0.5, 1]],
            ("observation", "end_effector_pose"): [[4, 5, 6, 0.75, 0.1]] * 2,
        },
        actions=[[1, 2, 3, 0, 0, 0.5, 1], [1, 2, 3, 0, 0, -0.5, 0]],
        states=[[4, 5, 6, 0, 0, 0.75, 0, 0.1]] * 2,
    ),
    "columbia_cairlab_pusht_real": Worked(
        {
            ("action", "world_vector"): [SEVEN[:3]] * 5,
            ("action", "rotation_delta"): [SEVEN[3:6]] * 5,
            PUSHT: [[0], [1], [0], [-1], [0]],
        },
        actions=[[*SEVEN[:6], is_open] for is_open in (1, 0, 0, 1, 1)],
    ),
    SIRIUS: Worked(
        {("observation", "state_joint"): [SEVEN], ("observation", "state_gripper"): [[0.05]]},
        states=[[*SEVEN, 0.05]],
        encoding="JOINT",
    ),
    MVP: Worked({("action",): [[*SEVEN, 1], [*SEVEN, 0]]}, actions=[[*SEVEN, 0], [*SEVEN, 1]]),
    RPT: Worked({("action",): [[*SEVEN, 1], [*SEVEN, 0]]}, actions=[[*SEVEN, 0], [*SEVEN, 1]]),
}


def _episode(card: Card, recorded: dict[Key, Rows]) -> Episode:
    num_steps = len(next(iter(recorded.values())))
    tree = shipped_tree(card.tree or card.name)
    assert tree is not None
    return Episode(payload(card, awkward_recording(card, 0, num_steps) | recorded, num_steps), tree)


def _close(rows: Rows) -> list[object]:
    return [pytest.approx(row, rel=1e-6, abs=1e-6) for row in rows]


@pytest.mark.parametrize("name", WORKED)
def test_a_corrected_recipe_comes_to_what_is_worked_out_by_hand(name: str, cards: Cards) -> None:
    worked, usual = WORKED[name], cards.get(name)
    card = usual.with_recipe("corrected")
    episode = _episode(card, worked.recorded)
    usually = standardize(episode, usual)
    actions = usually.actions.tolist() if worked.actions is None else worked.actions
    states = proprioception(episode, usual).tolist() if worked.states is None else worked.states
    kept = standardize(episode, card)
    assert kept.actions.tolist() == _close(actions)
    assert kept.first_step == worked.first_step
    assert proprioception(episode, card).tolist() == _close(states)
    assert (card.action_kind, card.state.encoding) == (
        worked.kind,
        worked.encoding or usual.state.encoding,
    )


@pytest.mark.parametrize("name", sorted(set(WORKED) - {EDAN}))
def test_the_usual_recipe_says_something_else_of_the_same_steps(name: str, cards: Cards) -> None:
    worked, usual = WORKED[name], cards.get(name)
    episode = _episode(usual, worked.recorded)
    if worked.actions is not None:
        assert standardize(episode, usual).actions.tolist() != _close(worked.actions)
    if worked.states is not None:
        assert proprioception(episode, usual).tolist() != _close(worked.states)


def test_every_corrected_recipe_is_worked_out_here_and_no_other(cards: Cards) -> None:
    assert {card.name for card in cards if card.corrected} == set(WORKED)


def test_a_card_keeps_openvlas_recipe_unless_it_is_asked(cards: Cards) -> None:
    card = cards.get(IAMLAB)
    assert card.with_recipe("openvla") is card
    assert card.action.trajectory_after == ()
    assert card.with_recipe("corrected").with_recipe("corrected") == card.with_recipe("corrected")


def test_steps_may_be_lost_on_either_side_of_a_recipe(tmp_path: Path) -> None:
    text = (SHIPPED / f"{IAMLAB}.yaml").read_text()
    after = "    trajectory_after: [drop_first_step]"
    both = "    trajectory_before: [drop_first_step]\n    trajectory_after: [drop_first_step, drop_last_step]"
    assert after in text
    file = tmp_path / f"{IAMLAB}.yaml"
    file.write_text(text.replace(after, both))
    card = load_card(file).with_recipe("corrected")
    kept = standardize(_episode(card, WORKED[IAMLAB].recorded), card)
    assert (kept.first_step, kept.steps) == (2, slice(2, 3))
    assert kept.actions.tolist() == _close([[0, -0.25, 0, 0, 0, 0.2, 0]])
    short: dict[Key, Rows] = {("action",): WORKED[IAMLAB].recorded["action",][:3]}
    assert standardize(_episode(card, short), card).actions.shape == (0, 7)


def test_only_droid_drops_idle_steps(cards: Cards) -> None:
    still: dict[Key, Rows] = {
        ("action_dict", "cartesian_velocity"): [[0.0] * 6, [0.0] * 5 + [1e-4], [1e-7] * 6]
    }
    droid = cards.get("droid")
    actions = standardize(_episode(droid, still), droid).actions
    assert zero_action(actions, droid).tolist() == [True, False, True]
    assert zero_action(actions, cards.get("droid_wipe")).tolist() == [False] * 3
    assert [card.name for card in cards if card.action.drop_zero] == ["droid"]
    # The gripper does not count.
    actions[:, 6] = 0.5
    assert zero_action(actions, droid.with_recipe("corrected")).tolist() == [True, False, True]
