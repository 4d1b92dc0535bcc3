"""The model, its tokens, its batches and its decoder, on a tiny LLaVA-OneVision made on the spot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from convert.prompt import question
from oxe_mix.errors import UserError
from train_llava.action_tokens import add_action_tokens, prove_action_tokens
from train_llava.config import ImageMode, ModelConfig, TinyModel
from train_llava.loading import load_checkpoint, load_or_build, save_checkpoint
from train_llava.model import OneViewLlava
from train_llava.processor import OneViewProcessor, View
from train_llava.trainer import compile_layers

QUESTIONS = [question(f"pick up the {color} block") for color in ("red", "green", "blue", "yellow")]


@pytest.fixture(scope="module")
def tiny() -> tuple[OneViewLlava, OneViewProcessor]:
    small = TinyModel(hidden_size=32, text_layers=2, heads=2)
    model, processor, _ = load_or_build(ModelConfig(tiny=small), QUESTIONS, seed=0)
    return model.eval(), processor


def _views(number: int, size: int = 64) -> list[View]:
    pixels = np.random.default_rng(number).integers(0, 256, (number, 1, size, size, 3), np.uint8)
    return [View(patches, (size, size)) for patches in pixels]


def _pixels(processor: OneViewProcessor, views: list[View]) -> torch.Tensor:
    return torch.from_numpy(processor.frames(views)["pixel_values"])


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
    from train_llava.tiny import train_tokenizer

    with pytest.raises(UserError, match="does not keep the 256 action tokens apart"):
        prove_action_tokens(train_tokenizer(QUESTIONS, 400))


@pytest.mark.parametrize("tied", [False, True])
def test_new_rows_start_at_the_mean_of_the_old_ones_and_a_tied_head_stays_tied(
    tmp_path: Path, tied: bool
) -> None:
    from train_llava.action_tokens import rows_of
    from train_llava.tiny import build_tiny

    torch.manual_seed(0)
    model, processor = build_tiny(TinyModel(hidden_size=32, heads=2), QUESTIONS)
    if tied:
        text_config: Any = model.config.text_config
        model.config.tie_word_embeddings = text_config.tie_word_embeddings = True
        model.tie_weights()
    rows = len(processor.tokenizer)
    before_in = rows_of(model.get_input_embeddings())[:rows].mean(dim=0).detach().clone()
    before_out = rows_of(model.get_output_embeddings())[:rows].mean(dim=0).detach().clone()
    add_action_tokens(model, processor.tokenizer)
    assert torch.allclose(rows_of(model.get_input_embeddings())[rows:], before_in.expand(256, -1))
    assert torch.allclose(rows_of(model.get_output_embeddings())[rows:], before_out.expand(256, -1))
    # Adding once more adds nothing.
    add_action_tokens(model, processor.tokenizer)
    assert rows_of(model.get_input_embeddings()).shape[0] == rows + 256
    save_checkpoint(tmp_path, model, processor)
    loaded, _ = load_checkpoint(tmp_path)
    assert (loaded.lm_head.weight is rows_of(loaded.get_input_embeddings())) == tied
    ids, pixels = torch.tensor([processor.prompt_ids(QUESTIONS[0], [17])]), torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model.eval()(ids, pixels).logits, loaded.eval()(ids, pixels).logits)


def test_one_view_is_what_the_stock_model_makes_of_a_picture_beside_others(
    tiny: tuple[OneViewLlava, OneViewProcessor],
) -> None:
    model, processor = tiny
    pixels = _pixels(processor, _views(2))
    with torch.no_grad():
        ours = model.frame_features(pixels)
        stock = model.model.get_image_features(
            pixels[:, None],
            torch.tensor([[64, 64]] * 2),
            batch_num_images=torch.tensor([2]),
            return_dict=True,
        ).pooler_output
    assert torch.equal(ours, torch.cat(list(stock)))


def _of_mode(mode: ImageMode) -> tuple[OneViewLlava, OneViewProcessor]:
    config = ModelConfig(tiny=TinyModel(hidden_size=32, text_layers=2, heads=2), image_mode=mode)
    model, processor, _ = load_or_build(config, QUESTIONS, seed=0)
    return model.eval(), processor


@pytest.mark.parametrize("shape", [(64, 64), (48, 80), (200, 90), (128, 512)])
def test_anyres_is_the_stock_processor_and_the_stock_model(shape: tuple[int, int]) -> None:
    model, processor = _of_mode("anyres_max_9")
    grid = [[64 * h, 64 * w] for h in range(1, 4) for w in range(1, 4)]
    processor.image_processor.image_grid_pinpoints = model.config.image_grid_pinpoints = grid
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8))
    view = processor.view(image)
    stock = processor.image_processor(images=[image], return_tensors="pt")
    ours = processor.frames([view])
    assert ours["image_sizes"].tolist() == stock["image_sizes"].tolist() == [list(shape)]
    assert np.abs(ours["pixel_values"] - stock["pixel_values"][0].numpy()).max() < 1e-5
    with torch.no_grad():
        features = model.frame_features(
            torch.from_numpy(ours["pixel_values"]), torch.from_numpy(ours["image_sizes"])
        )
        expected = model.model.get_image_features(
            torch.from_numpy(ours["pixel_values"])[None],
            stock["image_sizes"],
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
            vision_aspect_ratio="anyres_max_9",
            return_dict=True,
        ).pooler_output
    assert torch.equal(features, torch.cat(list(expected)))
    assert len(features) == processor.num_view_tokens(shape)


def test_a_thin_picture_is_made_small_before_it_is_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[int, int]] = []
    new = Image.new

    def noted(mode: str, size: tuple[int, int], *more: Any) -> Image.Image:
        made.append(size)
        return new(mode, size, *more)

    thin = Image.new("RGB", (1, 30_000), (255, 0, 0))
    monkeypatch.setattr(Image, "new", noted)
    (padded,) = _of_mode("pad")[1].view(thin).patches
    assert padded.shape == (64, 64, 3)
    assert max(max(size) for size in made) <= 4 * 64


def test_pad_keeps_the_aspect_and_single_stretches() -> None:
    image = Image.new("RGB", (100, 50), (255, 0, 0))
    (padded,) = _of_mode("pad")[1].view(image).patches
    assert padded.shape == (64, 64, 3)
    assert (padded[20:44, :] == (255, 0, 0)).all()
    assert (padded[:12, :] == 127).all()  # the mean that the tower was trained with
    (single,) = _of_mode("single")[1].view(image).patches
    assert (single == (255, 0, 0)).all()


def test_the_image_mode_goes_with_the_checkpoint(tmp_path: Path) -> None:
    model, processor = _of_mode("pad")
    save_checkpoint(tmp_path, model, processor)
    assert load_checkpoint(tmp_path)[1].image_mode == "pad"


def test_frames_that_do_not_fit_the_prompt_are_an_error(tiny: tuple[OneViewLlava, OneViewProcessor]) -> None:
    model, processor = tiny
    ids = torch.tensor([processor.prompt_ids(QUESTIONS[0], [17])])
    with pytest.raises(ValueError, match="17 image tokens, but frames for 34"):
        model(ids, _pixels(processor, _views(2)))
    with pytest.raises(ValueError, match="1 images in the question, 1 in the prompt, 2 given"):
        processor.prompt_ids(QUESTIONS[0], [17, 17])


def test_a_prompt_holds_one_view_of_image_tokens_where_the_marker_stood(
    tiny: tuple[OneViewLlava, OneViewProcessor],
) -> None:
    _, processor = tiny
    ids = processor.prompt_ids(QUESTIONS[0], [17])
    assert ids.count(processor.image_token_id) == 17
    text = processor.tokenizer.decode(ids, spaces_between_special_tokens=False)
    assert text == (
        "<|im_start|>user\n"
        + "<image>" * 17
        + "\nWhat action should the robot take to pick up the red block?"
        "<|im_end|>\n<|im_start|>assistant\n"
    )


def test_logits_of_some_positions_are_those_of_all(tiny: tuple[OneViewLlava, OneViewProcessor]) -> None:
    model, processor = tiny
    ids = torch.tensor([processor.prompt_ids(QUESTIONS[i], [17]) for i in (0, 0)])
    pixels, at = _pixels(processor, _views(2)), torch.tensor([3, 20, ids.shape[1] + 7])
    with torch.no_grad():
        everywhere = model(ids, pixels).logits
        some = model(ids, pixels, logits_at=at).logits
    assert torch.allclose(some, everywhere.flatten(0, 1)[at], atol=1e-6)


def test_padding_at_the_end_needs_no_mask(tiny: tuple[OneViewLlava, OneViewProcessor]) -> None:
    model, processor = tiny
    ids = processor.prompt_ids(QUESTIONS[0], [17])
    longer = torch.tensor([ids + [processor.tokenizer.pad_token_id] * 9])
    pixels = _pixels(processor, _views(1))
    with torch.no_grad():
        alone, padded = model(torch.tensor([ids]), pixels).logits, model(longer, pixels).logits
    assert torch.allclose(alone, padded[:, : len(ids)], atol=1e-5)


def test_a_batch_of_text_gives_the_frames_weights_gradients_of_zero() -> None:
    model, processor, _ = load_or_build(
        ModelConfig(tiny=TinyModel(hidden_size=32, text_layers=2, heads=2)), QUESTIONS, seed=0
    )
    ids = torch.tensor([processor.prompt_ids("hello", [])])
    model.train()(ids).logits.sum().backward()
    for name, weight in model.named_parameters():
        if "vision_tower.encoder" in name or "multi_modal_projector" in name or "newline" in name:
            assert weight.grad is not None, name
            assert not weight.grad.any()


@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of itself
def test_compiled_layer_by_layer_it_is_the_same_model() -> None:
    config = ModelConfig(tiny=TinyModel(hidden_size=32, text_layers=1, vision_layers=1, heads=2))
    model, processor, _ = load_or_build(config, QUESTIONS, seed=0)
    ids, pixels = torch.tensor([processor.prompt_ids(QUESTIONS[0], [17])]), _pixels(processor, _views(1))

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model.train()(ids, pixels).logits.square().mean().backward()
        return [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]

    names, before = list(model.state_dict()), gradients()
    compile_layers(model)
    assert list(model.state_dict()) == names
    for ours, theirs in zip(gradients(), before, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
