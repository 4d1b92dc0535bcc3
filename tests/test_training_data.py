"""Sources, order, tokens, batches, and what is proved of them before step 1."""

from __future__ import annotations

import copy
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from convert.manifest import read_manifest
from convert.prompt import question
from oxe_mix.errors import UserError
from tests.converting import edit_line
from train_llava.augment import Augment
from train_llava.batch import BatchPlan
from train_llava.config import DataConfig, ModelConfig, SourceConfig, TinyModel
from train_llava.data import Draw, RankBatches, SampleDataset, Tokens, collate
from train_llava.loading import load_or_build
from train_llava.model import OneViewLlava
from train_llava.preflight import check_lengths, check_sight, first_batch, in_words, rehearse_save
from train_llava.processor import IGNORE, OneViewProcessor
from train_llava.sources import TrainingData, open_data

Tiny = tuple[OneViewLlava, OneViewProcessor]


@pytest.fixture(scope="module")
def tiny() -> Tiny:
    small = TinyModel(hidden_size=32, text_layers=2, heads=2)
    model, processor, _ = load_or_build(ModelConfig(tiny=small), [question("pick up the red block")], seed=0)
    return model.eval(), processor


@pytest.fixture
def chat(llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SourceConfig:
    """Three samples of LLaVA data: text in two turns, text, and two images."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "images").mkdir()
    for name, frame in zip(("a.jpg", "b.jpg"), sorted((llava / "images").rglob("*.jpg")), strict=False):
        shutil.copy(frame, tmp_path / "images" / name)

    def turns(*texts: str) -> list[dict[str, str]]:
        return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]

    samples = [
        {"id": "two-turns", "conversations": turns("What is two and two?", "Four.", "And three?", "Five.")},
        {"id": "text", "conversations": turns("Name a colour.", "Blue.")},
        {
            "id": "images",
            "image": ["a.jpg", "b.jpg"],
            "conversations": turns("<image>\n<image>\nWhat differs?", "Light."),
        },
    ]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    return SourceConfig(name="chat", path=tmp_path / "chat.jsonl", images=tmp_path / "images", weight=20.0)


def _dataset(data: TrainingData, processor: OneViewProcessor, **options: Any) -> SampleDataset:
    return SampleDataset(data, processor, **options)


def _at(dataset: SampleDataset, position: int) -> Tokens:
    sample = dataset[Draw(position, *dataset.data.order.sample_at(position))]
    assert isinstance(sample, Tokens)
    return sample


def _of_chat(dataset: SampleDataset, index: int) -> Tokens:
    sample = dataset[Draw(0, len(dataset.data.sources) - 1, index)]
    assert isinstance(sample, Tokens)
    return sample


def _supervised(sample: Tokens, processor: OneViewProcessor) -> str:
    ids = [token for token, label in zip(sample.ids, sample.labels, strict=True) if label != IGNORE]
    assert ids == [label for label in sample.labels if label != IGNORE]
    text: str = processor.tokenizer.decode(ids, spaces_between_special_tokens=False)
    return text


def test_of_an_action_the_answer_is_supervised_and_nothing_else(llava: Path, tiny: Tiny) -> None:
    data = open_data(DataConfig(), llava, seed=0)
    dataset = _dataset(data, tiny[1], cache=True)
    source, index = data.order.sample_at(3)
    answer = data.sources[source].sample(index).turns[1][1]
    sample = _at(dataset, 3)
    assert _supervised(sample, tiny[1]) == answer + "<|im_end|>"
    assert sample.labels[:-8] == [IGNORE] * (len(sample.ids) - 8)
    assert sample.dimensions == [-1] * (len(sample.ids) - 8) + [*range(7), -1]
    assert _at(dataset, 3) is sample  # cached


def test_of_a_conversation_every_answer_is_supervised(llava: Path, tiny: Tiny, chat: SourceConfig) -> None:
    dataset = _dataset(open_data(DataConfig(sources=(chat,)), llava, seed=0), tiny[1])
    sample = _of_chat(dataset, 0)
    assert _supervised(sample, tiny[1]) == "Four.<|im_end|>Five.<|im_end|>"
    assert sample.views == ()
    assert set(sample.dimensions) == {-1}
    whole = tiny[1].tokenizer.decode(sample.ids, spaces_between_special_tokens=False)
    assert whole == (
        "<|im_start|>user\n\nWhat is two and two?<|im_end|>\n<|im_start|>assistant\nFour.<|im_end|>\n"
        "<|im_start|>user\n\nAnd three?<|im_end|>\n<|im_start|>assistant\nFive.<|im_end|>"
    )
    images = _of_chat(dataset, 2)
    assert len(images.views) == 2
    assert images.ids.count(tiny[1].image_token_id) == 34
    assert in_words(images, tiny[1]).endswith("[Light.<|im_end|>]")
    assert "<image> x 34" in in_words(images, tiny[1])


def test_a_batch_names_the_positions_whose_next_token_is_supervised(
    llava: Path, tiny: Tiny, chat: SourceConfig
) -> None:
    dataset = _dataset(open_data(DataConfig(sources=(chat,)), llava, seed=0), tiny[1])
    samples: list[Tokens | UserError] = [_of_chat(dataset, 1), _of_chat(dataset, 2)]
    batch = collate(samples, tiny[1])
    flat = torch.cat([batch["input_ids"], torch.zeros(2, 1, dtype=torch.long)], dim=1)
    width = batch["input_ids"].shape[1]
    after = [int(flat[int(at) // width, int(at) % width + 1]) for at in batch["logits_at"]]
    assert after == batch["targets"].tolist()
    assert tiny[1].tokenizer.decode(after) == "Blue.<|im_end|>Light.<|im_end|>"
    assert batch["pixel_values"].shape == (2, 3, 64, 64)
    text = collate([_of_chat(dataset, 0)], tiny[1])
    assert "pixel_values" not in text


def test_sources_are_drawn_by_weight_times_samples(llava: Path, chat: SourceConfig) -> None:
    data = open_data(DataConfig(weight=2.0, sources=(chat,)), llava, seed=0)
    manifest = read_manifest(llava)
    parts = {d.name: 2.0 * d.weight * d.steps.written for d in manifest.datasets} | {"chat": 20.0 * 3}
    total, epoch = sum(parts.values()), len(data.order)
    assert epoch == manifest.num_samples + 3
    for name, part in parts.items():
        assert abs(data.order.draws[name] - epoch * part / total) <= 1


def test_another_converted_folder_is_mixed_in_and_other_actions_are_refused(
    llava: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(llava, other)
    source = SourceConfig(name="other", path=other)
    with pytest.raises(UserError, match="bridge_orig is in the command's folder too; convert them together"):
        open_data(DataConfig(sources=(source,)), llava, seed=0)
    codec = json.loads((other / "action_codec.json").read_text())
    codec["chunk"] = 4
    (other / "action_codec.json").write_text(json.dumps(codec))
    with pytest.raises(UserError, match="chunk is 4, but 1 in the command's folder"):
        open_data(DataConfig(sources=(source,)), llava, seed=0)


def test_ranks_and_micro_batches_share_the_same_samples_of_every_step(llava: Path) -> None:
    order = open_data(DataConfig(), llava, seed=0).order

    def steps(batch: BatchPlan, **options: bool) -> list[Counter[tuple[int, int, int]]]:
        ranks = [list(RankBatches(order, batch, 5, rank, **options)) for rank in range(batch.num_ranks)]
        assert all(len(own) == 5 * batch.accumulate for own in ranks)
        assert all(len(micro) == batch.micro for own in ranks for micro in own)
        return [
            Counter(
                (draw.position, draw.source, draw.index)
                for own in ranks
                for micro in own[step * batch.accumulate : (step + 1) * batch.accumulate]
                for draw in micro
            )
            for step in range(5)
        ]

    one, two = BatchPlan(4, 4, 1, accumulate_is_given=True), BatchPlan(8, 1, 2, accumulate_is_given=True)
    assert steps(one) == steps(two)
    assert {position for position, *_ in steps(two)[2]} == set(range(32, 48))
    assert len(set(map(frozenset, steps(two, overfit=True)))) == 1


def test_frames_are_changed_by_the_position_alone_and_not_in_evaluation(llava: Path, tiny: Tiny) -> None:
    data = open_data(DataConfig(), llava, seed=0)
    plain, changed = _dataset(data, tiny[1]), _dataset(data, tiny[1], change=Augment(), seed=5)
    again = _dataset(data, tiny[1], change=Augment(), seed=5)
    draw = Draw(3, *data.order.sample_at(3))
    later = Draw(1003, draw.source, draw.index)

    def pixels(dataset: SampleDataset, draw: Draw) -> np.ndarray[Any, Any]:
        return dataset.load(draw).views[0].patches

    assert (pixels(changed, draw) == pixels(again, draw)).all()
    assert (pixels(changed, draw) != pixels(changed, later)).any()
    assert (pixels(changed, draw) != pixels(plain, draw)).any()
    assert (pixels(plain, draw) == pixels(plain, later)).all()


def test_a_sample_that_cannot_be_had_is_an_error_and_no_other_takes_its_place(
    llava: Path, tiny: Tiny, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(llava, broken)
    data = open_data(DataConfig(), broken, seed=0)
    draw = Draw(0, *data.order.sample_at(0))
    frame = data.sources[draw.source].sample(draw.index).images[0]
    frame.file.unlink()
    found = _dataset(data, tiny[1])[draw]
    assert isinstance(found, UserError)
    assert collate([found], tiny[1]) == {"error": f"{frame.file}: no such image"}


def test_the_longest_sample_is_said_part_by_part_and_one_that_does_not_fit_is_named(
    tiny: Tiny, llava: Path, tmp_path: Path
) -> None:
    data = open_data(DataConfig(), llava, seed=0)
    dataset = _dataset(data, tiny[1])
    longest = max(len(_at(dataset, i).ids) for i in range(len(data.order)))
    said = check_lengths(dataset, longest)
    assert said.startswith(f"length: frames 17 + prompt {longest - 25} + answer 8 = {longest} <= {longest}")
    with pytest.raises(UserError, match=r"^bridge_orig/train/0/\d+/1: .* tokens > train\.max_length 20"):
        check_lengths(dataset, 20)
    # Every sample is looked at, not a few of them.
    long = tmp_path / "long"
    shutil.copytree(llava, long)
    file = long / read_manifest(long).datasets[-1].files[-1].path
    number = len(file.read_text().splitlines()) - 1

    def lengthen(sample: dict[str, Any]) -> None:
        sample["conversations"][1]["value"] *= 10

    edit_line(file, number, lengthen)
    changed = open_data(DataConfig(), long, seed=0)
    last = changed.sources[-1]
    with pytest.raises(UserError, match=f"^{last.sample(last.range.samples[-1]).id}: "):
        check_lengths(_dataset(changed, tiny[1]), longest)


def test_a_sample_without_anything_to_learn_is_named(llava: Path, tiny: Tiny, chat: SourceConfig) -> None:
    text = chat.path.read_text().replace('"Blue."', '""')
    chat.path.write_text(text)
    dataset = _dataset(open_data(DataConfig(sources=(chat,)), llava, seed=0), tiny[1])
    with pytest.raises(UserError, match=r"^text: the answer has no token to learn from"):
        check_lengths(dataset, 2048)


def test_a_model_whose_answer_does_not_depend_on_its_frames_is_found(llava: Path, tiny: Tiny) -> None:
    samples = first_batch(_dataset(open_data(DataConfig(), llava, seed=0), tiny[1]), 4)
    assert len(samples) == 4
    assert "change the logits by up to" in check_sight(*tiny, samples)
    blind = copy.deepcopy(tiny[0])
    for layer in blind.model.language_model.layers:
        layer.self_attn.o_proj.weight.data.zero_()  # no token learns of another one
    with pytest.raises(UserError, match="the model does not see its frames"):
        check_sight(blind, tiny[1], samples)


def test_saving_is_rehearsed_and_a_difference_is_found(llava: Path, tiny: Tiny, tmp_path: Path) -> None:
    samples = first_batch(_dataset(open_data(DataConfig(), llava, seed=0), tiny[1]), 1)

    def same(_: Path) -> OneViewLlava:
        return copy.deepcopy(tiny[0])

    def other(_: Path) -> OneViewLlava:
        changed = copy.deepcopy(tiny[0])
        changed.lm_head.weight.data += 1e-3
        return changed

    assert "the same logits" in rehearse_save(*tiny, samples, tmp_path, same)
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="gives other logits"):
        rehearse_save(*tiny, samples, tmp_path, other)
