"""What a synthetic episode holds: random values in every true layout, and frames as TFDS stores them."""

from __future__ import annotations

import io
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from PIL import Image

from oxe_mix.cards import Card, Cards, load_cards
from oxe_mix.rlds import Episode
from oxe_mix.synth.episodes import world_episode
from oxe_mix.synth.features import serialize
from oxe_mix.synth.frames import PLACES, coloured
from oxe_mix.synth.generic import random_episode
from oxe_mix.synth.robots import ROBOTS
from oxe_mix.synth.world import sample_scene
from oxe_mix.trees import shipped_tree


def _episode(card: Card, number: int, seed: int = 0) -> Episode:
    example = random_episode(card, np.random.default_rng([seed, number]), number)
    tree = shipped_tree(card.tree or card.name)
    assert tree is not None
    return Episode(serialize(card.tree or card.name, example), tree)


@pytest.mark.parametrize("card", list(load_cards()), ids=lambda card: card.name)
def test_every_leaf_of_every_shipped_tree_comes_back_in_its_own_shape(card: Card) -> None:
    tree = shipped_tree(card.tree or card.name)
    assert tree is not None
    episode = _episode(card, 11)
    assert 2 <= episode.num_steps <= 4
    for key, feature in tree.step.items():
        if feature.kind == "image":
            sizes = {Image.open(io.BytesIO(frame)).size for frame in episode.values(key)}
            assert sizes == {(feature.shape[1], feature.shape[0])}
        elif feature.dtype == "string":
            assert all(episode.values(key))
        else:
            values = episode.array(key)
            assert values.shape == (episode.num_steps, *feature.shape)
            assert (np.abs(values[np.isfinite(values)]) < (512 if key == card.language.key else 4)).all()


def test_the_instruction_stands_where_the_card_says_the_same_at_every_step(cards: Cards) -> None:
    for name, key in (("toto", ("observation", "natural_language_instruction")), ("fmb", None)):
        card = cards.get(name)
        texts = _episode(card, 0).values(key or card.language.key)
        assert len(set(texts)) == 1
        assert texts[0].startswith(b"Pick up the ")
    codes = _episode(cards.get("language_table"), 0).array(("observation", "instruction")).astype(int)
    assert "".join(map(chr, codes[1])).rstrip("\0").startswith("Pick up the ")


def test_numbers_are_small_and_random_and_maps_and_clouds_are_empty(cards: Cards) -> None:
    card = cards.get("toto")
    steps = [step for i in range(60) for step in random_episode(card, np.random.default_rng(i), i)["steps"]]
    values = np.concatenate([step["observation"]["state"] for step in steps])
    assert 0.08 < values.std() < 0.12
    assert abs(values.mean()) < 0.02
    assert not _episode(cards.get("fmb"), 0).array(("observation", "image_side_1_depth")).any()


def test_four_episodes_in_five_are_a_success_wherever_the_flag_is(cards: Cards) -> None:
    card = cards.get("ucsd_pick_and_place_dataset_converted_externally_to_rlds")
    flags = [
        random_episode(card, np.random.default_rng(i), i)["episode_metadata"]["success"] for i in range(500)
    ]
    assert 0.75 < np.mean(flags) < 0.85


def test_one_kuka_grasp_in_five_fails_and_nothing_else_of_it_changes() -> None:
    # Without its camera: nothing is drawn, so this is quick.
    kuka = replace(next(robot for robot in ROBOTS if robot.name == "kuka"), cameras={})
    episodes = [world_episode(kuka, np.random.default_rng(i), i) for i in range(500)]
    assert 0.75 < np.mean([episode["success"] for episode in episodes]) < 0.85
    for i, episode in enumerate(episodes):
        # The scene is drawn first: what the flag takes from the generator, it takes after it.
        told = episode["steps"][0]["observation"]["natural_language_instruction"]
        assert told == sample_scene(np.random.default_rng(i)).instruction


@pytest.mark.parametrize("encoding", ["png", "jpeg"])
def test_a_coloured_frame_shows_a_flip_of_its_channels_and_the_step(encoding: str) -> None:
    node = {"kind": "image", "shape": [48, 64, 3], "dtype": "uint8", "encoding": encoding}
    for hue in range(4):
        frames = [
            np.asarray(Image.open(io.BytesIO(coloured(node, hue, t)))).astype(int) for t in range(PLACES)
        ]
        for a, b in pairwise(frames):
            assert np.abs(a - b).max() > 100
        assert min(np.abs(frame - frame[..., ::-1]).mean() for frame in frames) > 80


def test_depth_frames_are_stored_as_tfds_stores_them() -> None:
    def pixels(dtype: str) -> np.ndarray[Any, Any]:
        node = {"kind": "image", "shape": [None, 64, 1], "dtype": dtype, "encoding": "png"}
        return np.array(Image.open(io.BytesIO(coloured(node, 1, 0))))

    assert pixels("uint8").shape == (64, 64)
    assert set(pixels("uint8").flat) == {20, 60}
    assert set(pixels("uint16").flat) == {250, 750}
    metres = pixels("float32")
    assert metres.shape == (64, 64, 4)  # the bytes of a float, as four channels
    assert set(metres.view(np.float32).flat) == {0.25, 0.75}


def test_kinds_that_no_shipped_tree_has_are_written_too(
    monkeypatch: pytest.MonkeyPatch, cards: Cards
) -> None:
    step = {
        "a/b": {"kind": "tensor", "shape": [None], "dtype": "float64", "encoding": "none"},
        "packed": {"kind": "tensor", "shape": [3, 2], "dtype": "bool", "encoding": "zlib"},
        "words": {"kind": "tensor", "shape": [2], "dtype": "string", "encoding": "none"},
        "parts": {"kind": "dataset", "feature": {"kind": "scalar", "dtype": "int8"}},
    }
    steps = {"kind": "dataset", "feature": {"kind": "dict", "features": step}}
    tree = {"kind": "dict", "features": {"steps": steps}}
    monkeypatch.setattr("oxe_mix.synth.generic.feature_tree", lambda name: tree)
    monkeypatch.setattr("oxe_mix.synth.features.feature_tree", lambda name: tree)
    card = cards.get("viola").model_copy(update={"tree": "odd"})
    from tensorflow_datasets.core.example_parser import tf_example_pb2

    example = random_episode(card, np.random.default_rng(0), 5)
    record = tf_example_pb2.Example.FromString(serialize("odd", example)).features.feature
    num_steps = len(example["steps"])
    assert len(record["steps/a/b"].float_list.value) == 8 * num_steps
    assert len(record["steps/packed"].bytes_list.value) == num_steps
    assert list(record["steps/words"].bytes_list.value) == [b"words 5"] * 2 * num_steps
    lengths = list(record["steps/parts/ragged_row_lengths_0"].int64_list.value)
    assert lengths == [len(one["parts"]) for one in example["steps"]]
