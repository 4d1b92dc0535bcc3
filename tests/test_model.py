"""The model, its tokens, its batches and its decoder, on a tiny LLaVA-OneVision made on the spot."""

from __future__ import annotations

import copy
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from convert.action_codec import ActionCodec
from convert.manifest import read_manifest
from convert.prompt import question
from convert.reader import ConversationReader
from convert.statistics import action_stats
from oxe_mix.errors import UserError
from tests.conftest import ROOT
from tests.converting import edit_line
from train_llava.config import ModelConfig, TinyModel, deepspeed_json, load_config
from train_llava.data import MixSampler, SampleDataset, Tokens, collate
from train_llava.decode import ActionDecoder
from train_llava.metrics import Scored, score
from train_llava.model import (
    OneViewLlava,
    add_action_tokens,
    load_checkpoint,
    load_or_build,
    prove_action_tokens,
    save_checkpoint,
)
from train_llava.preflight import check_lengths, frame_effect
from train_llava.processor import IGNORE, OneViewProcessor

QUESTIONS = [question(f"pick up the {color} block") for color in ("red", "green", "blue", "yellow")]
STATS = action_stats(
    np.random.default_rng(0).normal(size=(50, 7)).astype(np.float32), (True,) * 6 + (False,), 1
)
CODEC = ActionCodec(action_dim=7, datasets={"viola": STATS})


@pytest.fixture(scope="module")
def tiny() -> tuple[OneViewLlava, OneViewProcessor]:
    small = TinyModel(hidden_size=32, text_layers=2, heads=2)
    model, processor = load_or_build(ModelConfig(tiny=small), QUESTIONS, seed=0)
    return model.eval(), processor


def _views(number: int, size: int = 64) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return np.random.default_rng(number).integers(0, 256, (number, size, size, 3), np.uint8)


def test_the_action_tokens_are_256_single_ids_side_by_side(
    tiny: tuple[OneViewLlava, OneViewProcessor],
) -> None:
    tokenizer = tiny[1].tokenizer
    ids = prove_action_tokens(tokenizer)
    assert len(set(ids)) == 256
    assert tokenizer("<ACTION_1><ACTION_12><ACTION_123>", add_special_tokens=False)["input_ids"] == [
        ids[1],
        ids[12],
        ids[123],
    ]


def test_a_tokenizer_without_the_tokens_is_refused(tiny: tuple[OneViewLlava, OneViewProcessor]) -> None:
    from train_llava.model import _train_tokenizer

    with pytest.raises(UserError, match="does not keep the 256 action tokens apart"):
        prove_action_tokens(_train_tokenizer(QUESTIONS, 400))


@pytest.mark.parametrize("tied", [False, True])
def test_new_rows_start_at_the_mean_of_the_old_ones_and_a_tied_head_stays_tied(
    tmp_path: Path, tied: bool
) -> None:
    from train_llava.model import _build_tiny, _table

    torch.manual_seed(0)
    model, processor = _build_tiny(TinyModel(hidden_size=32, heads=2), QUESTIONS)
    if tied:
        text_config: Any = model.config.text_config
        model.config.tie_word_embeddings = text_config.tie_word_embeddings = True
        model.tie_weights()
    rows = len(processor.tokenizer)
    before_in = _table(model.get_input_embeddings())[:rows].mean(dim=0).detach().clone()
    before_out = _table(model.get_output_embeddings())[:rows].mean(dim=0).detach().clone()
    add_action_tokens(model, processor.tokenizer)
    assert torch.allclose(_table(model.get_input_embeddings())[rows:], before_in.expand(256, -1))
    assert torch.allclose(_table(model.get_output_embeddings())[rows:], before_out.expand(256, -1))
    # Adding once more adds nothing.
    add_action_tokens(model, processor.tokenizer)
    assert _table(model.get_input_embeddings()).shape[0] == rows + 256
    save_checkpoint(tmp_path, model, processor)
    loaded, _ = load_checkpoint(tmp_path)
    assert (loaded.lm_head.weight is _table(loaded.get_input_embeddings())) == tied
    ids, pixels = torch.tensor([processor.prompt_ids(QUESTIONS[0])]), torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model.eval()(ids, pixels).logits, loaded.eval()(ids, pixels).logits)


def test_one_view_is_what_the_stock_model_makes_of_a_picture_beside_others(
    tiny: tuple[OneViewLlava, OneViewProcessor],
) -> None:
    model, processor = tiny
    pixels = torch.from_numpy(processor.pixels(_views(2)))
    with torch.no_grad():
        ours = model.frame_features(pixels)
        stock = model.model.get_image_features(
            pixels[:, None],
            torch.tensor([[64, 64]] * 2),
            batch_num_images=torch.tensor([2]),
            return_dict=True,
        ).pooler_output
    assert torch.equal(ours, torch.stack(list(stock)))


def test_a_prompt_holds_one_view_of_image_tokens_where_the_marker_stood(
    tiny: tuple[OneViewLlava, OneViewProcessor],
) -> None:
    _, processor = tiny
    ids = processor.prompt_ids(QUESTIONS[0])
    assert ids.count(processor.image_token_id) == 17
    text = processor.tokenizer.decode(ids, spaces_between_special_tokens=False)
    assert text == (
        "<|im_start|>user\n"
        + "<image>" * 17
        + "\nWhat action should the robot take to pick up the red block?"
        "<|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_answer_is_supervised_and_nothing_else(
    tiny: tuple[OneViewLlava, OneViewProcessor], llava: Path
) -> None:
    _, processor = tiny
    reader = ConversationReader(llava, "train")
    dataset = SampleDataset(reader, processor, cache=True)
    tokens, answer = dataset[3], reader[3].answer
    supervised = [i for i, label in zip(tokens.ids, tokens.labels, strict=True) if label != IGNORE]
    assert supervised == [label for label in tokens.labels if label != IGNORE]
    assert (
        processor.tokenizer.decode(supervised, spaces_between_special_tokens=False) == answer + "<|im_end|>"
    )
    assert tokens.labels[: -len(supervised)] == [IGNORE] * (len(tokens.ids) - 8)
    assert dataset[3] is tokens
    batch = collate([tokens, Tokens(tokens.ids[:-3], tokens.labels[:-3], tokens.views)], processor)
    assert batch["attention_mask"].sum(dim=1).tolist() == [len(tokens.ids), len(tokens.ids) - 3]
    assert (batch["labels"][1, -3:] == IGNORE).all()
    assert batch["pixel_values"].shape == (2, 3, 64, 64)


def test_the_loss_is_the_mean_over_the_supervised_tokens(tiny: tuple[OneViewLlava, OneViewProcessor]) -> None:
    model, processor = tiny
    prompt, answer = processor.prompt_ids(QUESTIONS[1]), processor.answer_ids("<ACTION_3><ACTION_4>")
    batch = collate([Tokens([*prompt, *answer], [IGNORE] * len(prompt) + answer, _views(1))], processor)
    with torch.no_grad():
        loss = model(**batch).loss
        logits = model(
            batch["input_ids"], batch["pixel_values"], attention_mask=batch["attention_mask"]
        ).logits
    expected = -logits[0, -4:-1].log_softmax(dim=-1)[range(3), answer].mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    with torch.no_grad():
        assert model(**batch, num_items_in_batch=6).loss.item() == pytest.approx(
            expected.item() / 2, rel=1e-5
        )


def test_decoding_takes_exactly_seven_action_tokens_and_equals_decoding_without_a_cache(
    tiny: tuple[OneViewLlava, OneViewProcessor],
) -> None:
    model, processor = tiny
    views = _views(1)
    prediction = ActionDecoder(model, processor, CODEC).predict([QUESTIONS[2]], views, ["viola"])
    assert prediction.bins.shape == prediction.probabilities.shape == (1, 1, 7)
    ids, action_ids = processor.prompt_ids(QUESTIONS[2]), prove_action_tokens(processor.tokenizer)
    pixels = torch.from_numpy(processor.pixels(views))
    for i in range(7):
        with torch.no_grad():
            logits = model(torch.tensor([ids]), pixels).logits[0, -1]
        # The gripper's bins are the upper half: the lower one would be no gripper at all.
        among = torch.where(torch.tensor(i == 6) & (torch.arange(256) < 128), -torch.inf, logits[action_ids])
        among = among.softmax(dim=-1)
        assert int(among.argmax()) == prediction.bins[0, 0, i]
        assert float(among.max()) == pytest.approx(prediction.probabilities[0, 0, i], abs=1e-5)
        ids.append(action_ids[int(among.argmax())])


def test_alone_and_in_a_batch_with_longer_prompts_the_bins_are_the_same(
    tiny: tuple[OneViewLlava, OneViewProcessor],
) -> None:
    model, processor = tiny
    decoder = ActionDecoder(model, processor, CODEC)
    asked = [QUESTIONS[0], question("please be so kind and pick up the yellow block now"), question("go")]
    views = _views(3)
    together = decoder.predict(asked, views, ["viola"] * 3)
    for i, one in enumerate(asked):
        alone = decoder.predict([one], views[i : i + 1], ["viola"])
        assert (alone.bins[0] == together.bins[i]).all()
        assert np.abs(alone.probabilities[0] - together.probabilities[i]).max() < 1e-5


def test_a_model_whose_answer_does_not_depend_on_its_frames_is_found(
    tiny: tuple[OneViewLlava, OneViewProcessor],
) -> None:
    model, processor = tiny
    prompt, answer = processor.prompt_ids(QUESTIONS[0]), processor.answer_ids("<ACTION_3>")
    batch = collate([Tokens([*prompt, *answer], [IGNORE] * len(prompt) + answer, _views(1))], processor)
    assert frame_effect(model, batch) > 0
    blind = copy.deepcopy(model)
    for layer in blind.model.language_model.layers:
        layer.self_attn.o_proj.weight.data.zero_()  # no token learns of another one
    assert frame_effect(blind, batch) == 0
    seen = blind(batch["input_ids"], batch["pixel_values"]).logits
    other = blind(batch["input_ids"], -batch["pixel_values"]).logits
    assert not torch.equal(seen, other)  # its image tokens do see the frame; that is not what counts


def test_saving_is_rehearsed_and_a_difference_is_found(
    tiny: tuple[OneViewLlava, OneViewProcessor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from train_llava import preflight

    model, processor = tiny
    prompt = processor.prompt_ids(QUESTIONS[0])
    batch = collate([Tokens(prompt, prompt, _views(1))], processor)
    preflight.rehearse_save(model, processor, tmp_path, batch)
    assert not list(tmp_path.iterdir())

    def save_another(folder: Path, *_: object) -> None:
        other = copy.deepcopy(model)
        other.lm_head.weight.data += 1e-3
        save_checkpoint(folder, other, processor)

    monkeypatch.setattr(preflight, "save_checkpoint", save_another)
    with pytest.raises(UserError, match="gives other logits"):
        preflight.rehearse_save(model, processor, tmp_path, batch)
    model.eval()


def test_a_sample_that_does_not_fit_is_named(
    tiny: tuple[OneViewLlava, OneViewProcessor], llava: Path, tmp_path: Path
) -> None:
    reader = ConversationReader(llava, "train")
    dataset = SampleDataset(reader, tiny[1], cache=False)
    longest = max(len(dataset[i].ids) for i in range(len(dataset)))
    assert check_lengths(dataset, longest) == f"longest sample {longest} tokens <= {longest}"
    last = reader[len(reader) - 1].id
    with pytest.raises(UserError, match=r"^bridge_orig/train/0/\d+/1: \d+ tokens > train\.max_length 20"):
        check_lengths(dataset, 20)
    # Every sample is looked at, not a few of them.
    lines = llava_with_long_last_sample(llava, tmp_path)
    long = SampleDataset(ConversationReader(lines, "train"), tiny[1], cache=False)
    with pytest.raises(UserError, match=f"^{last}: "):
        check_lengths(long, longest)


def llava_with_long_last_sample(llava: Path, tmp_path: Path) -> Path:
    """The folder again, the last sample's answer ten times as long."""
    out = tmp_path / "long"
    shutil.copytree(llava, out)
    file = out / read_manifest(out).datasets[-1].files[-1].path
    number = len(file.read_text().splitlines()) - 1

    def lengthen(sample: dict[str, Any]) -> None:
        sample["conversations"][1]["value"] *= 10

    edit_line(file, number, lengthen)
    return out


@settings(max_examples=30)
@given(st.lists(st.tuples(st.integers(1, 60), st.floats(0.1, 5)), min_size=1, max_size=4), st.integers(0, 3))
def test_an_epoch_draws_each_dataset_in_proportion_to_weight_times_samples(
    parts: list[tuple[int, float]], seed: int
) -> None:
    ranges, weights, start = {}, {}, 0
    for i, (size, weight) in enumerate(parts):
        ranges[f"d{i}"], weights[f"d{i}"] = range(start, start + size), weight
        start += size
    drawn = list(MixSampler(ranges, weights, seed))
    assert len(drawn) == start
    total = sum(size * weight for size, weight in parts)
    counts = Counter(drawn)
    for name, samples in ranges.items():
        own = [counts[i] for i in samples]
        assert abs(sum(own) - start * weights[name] * len(samples) / total) < 1
        assert max(own) - min(own) <= 1  # none comes again before all have come
    assert drawn == list(MixSampler(ranges, weights, seed))


def test_weight_one_everywhere_is_one_pass_and_each_epoch_has_its_order() -> None:
    sampler = MixSampler({"a": range(30), "b": range(30, 40)}, {"a": 1.0, "b": 1.0}, 0)
    first = list(sampler)
    sampler.set_epoch(1)
    assert sorted(first) == list(range(40)) == sorted(sampler)
    assert first != list(sampler)


def test_scores_stand_beside_both_baselines() -> None:
    actions = np.zeros((4, 7), np.float32)
    actions[:, 0] = [-1, 1, -1, 1]
    stats = action_stats(actions, (True,) * 6 + (False,), 2)
    codec = ActionCodec(action_dim=7, datasets={"viola": stats})
    target = np.full((4, 7), 128)
    target[:, 0] = [0, 255, 0, 255]
    predicted = target.copy()
    predicted[0, 0], predicted[0, 3] = 3, 7  # dimension 3 never moves: it does not count
    report = score(codec, [Scored("viola", ["a", "a", "b", "b"], target, predicted, target[::-1])])
    assert report["accuracy"]["model"] == {"exact": 0.75, "within_1": 0.75, "within_5": 1.0}
    assert report["accuracy"]["mean_action"] == {"exact": 0.0, "within_1": 0.0, "within_5": 0.0}
    assert report["accuracy"]["repeat_last"]["exact"] == 0.0
    edge = 255 / 256
    assert report["l1"]["model"] == pytest.approx(3 * 2 / 256 / 4)
    assert report["l1"]["shuffled_images"] == pytest.approx(2 * edge)
    assert report["l1"]["mean_action"] == pytest.approx(edge)
    assert report["l1"]["repeat_last"] == pytest.approx((edge + 2 * edge) / 2)  # the mean at a first step
    assert report["datasets"]["viola"]["moving"] == [0]
    # Bins are 2/256 wide in the codec's range; this dataset's movement spans 2 robot units.
    assert report["datasets"]["viola"]["l1_robot_units"]["model"][0] == pytest.approx(
        3 * 2 / 256 / 4, rel=0.05
    )


def test_deepspeeds_json_comes_from_the_config_alone() -> None:
    config = load_config(ROOT / "train_llava/configs/tiny-cpu.yaml")
    for ranks, accumulate in ((1, 2), (2, 1)):
        made = deepspeed_json(config, ranks)
        assert made["train_batch_size"] == made["train_micro_batch_size_per_gpu"] * ranks * accumulate
        assert made["gradient_accumulation_steps"] == accumulate
        assert made["zero_optimization"]["stage"] == 2
    with pytest.raises(UserError, match=r"64 is no multiple of train\.micro_batch 32 x 3 ranks"):
        deepspeed_json(config, 3)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("max_steps: ", "max_stepps: ", "train.max_stepps: unknown key; did you mean max_steps?"),
        ("learning_rate: ", "learning_rate: -", "train.learning_rate: "),
        ("  tiny: {", "  path: x\n  tiny: {", "give either path (a folder or hub id) or tiny"),
    ],
)
def test_a_wrong_config_is_one_line(tmp_path: Path, old: str, new: str, message: str) -> None:
    text = (ROOT / "train_llava/configs/tiny-cpu.yaml").read_text()
    (tmp_path / "c.yaml").write_text(text.replace(old, new, 1))
    with pytest.raises(UserError) as error:
        load_config(tmp_path / "c.yaml")
    assert message in str(error.value)
