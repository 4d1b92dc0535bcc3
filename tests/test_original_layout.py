"""LLaVA-NeXT's layout, written here by the inverse of the names and loaded again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlavaOnevisionConfig, PreTrainedTokenizerFast, Qwen2Config, SiglipVisionConfig

from convert.action_codec import action_tokens
from convert.prompt import question
from oxe_mix.errors import UserError
from train_llava.action_tokens import add_action_tokens
from train_llava.loading import load_checkpoint, save_checkpoint
from train_llava.model import OneViewLlava
from train_llava.original_config import OriginalConfig, is_original, vision_config
from train_llava.original_layout import load_original, to_transformers_key

QUESTION = question("pick up the red block")
VISION = "model.vision_tower.vision_tower.vision_model."
# transformers' names and LLaVA-NeXT's, as they stand in published files.
NAMES = {
    "model.image_newline": "model.image_newline",
    "lm_head.weight": "lm_head.weight",
    "model.language_model.embed_tokens.weight": "model.embed_tokens.weight",
    "model.language_model.norm.weight": "model.norm.weight",
    "model.language_model.layers.23.self_attn.q_proj.bias": "model.layers.23.self_attn.q_proj.bias",
    "model.multi_modal_projector.linear_1.weight": "model.mm_projector.0.weight",
    "model.multi_modal_projector.linear_2.bias": "model.mm_projector.2.bias",
    "model.vision_tower.post_layernorm.bias": VISION + "post_layernorm.bias",
    "model.vision_tower.embeddings.patch_embedding.weight": VISION + "embeddings.patch_embedding.weight",
    "model.vision_tower.encoder.layers.25.mlp.fc1.weight": VISION + "encoder.layers.25.mlp.fc1.weight",
}
SPARE_ROWS = 320  # the tokenizer has 270 tokens: as in Qwen2, the table has rows beyond it


def _original_name(name: str) -> str:
    """The inverse of `to_transformers_key`, put down on its own."""
    for new, old in (
        ("model.vision_tower.", VISION),
        ("model.multi_modal_projector.linear_1.", "model.mm_projector.0."),
        ("model.multi_modal_projector.linear_2.", "model.mm_projector.2."),
        ("model.language_model.", "model."),
    ):
        if name.startswith(new):
            return old + name.removeprefix(new)
    return name


def _tokenizer() -> PreTrainedTokenizerFast:
    """Qwen2's special tokens and 267 others; no <image>."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        [QUESTION],
        trainers.BpeTrainer(
            vocab_size=270,
            special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def _source(tied: bool, rows: int) -> OneViewLlava:
    torch.manual_seed(0)
    vision = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        vision_use_head=False,
    )
    text = Qwen2Config(
        vocab_size=rows,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=tied,
    )
    config = LlavaOnevisionConfig(
        vision_config=vision, text_config=text, image_token_index=270, tie_word_embeddings=tied
    )
    model = OneViewLlava(config)
    model.eval()
    return model


def _weights(model: OneViewLlava) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {
        _original_name(name): weight.clone() for name, weight in model.state_dict().items()
    }
    if model.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    return weights


def _config(model: OneViewLlava) -> dict[str, Any]:
    """A config.json as LLaVA-NeXT writes it: the language model's fields on top, the trainer's among them."""
    text: Any = model.config.text_config
    vision: Any = model.config.vision_config
    config: dict[str, Any] = text.to_dict() | {
        "architectures": ["LlavaQwenForCausalLM"],
        "model_type": "llava_qwen",
        "rope_parameters": None,
        "rope_theta": 1e6,
        "rope_scaling": None,
        "image_aspect_ratio": "anyres_max_9",
        "image_grid_pinpoints": [[28, 28], [28, 56]],
        "mm_hidden_size": 32,
        "mm_patch_merge_type": "spatial_unpad",
        "mm_projector_lr": None,
        "mm_projector_type": "mlp2x_gelu",
        "mm_resampler_type": None,
        "mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter,mm_language_model",
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "tiny/siglip-2-of-3-layers",
        "use_mm_proj": True,
        "vision_config": vision.to_dict(),
    }
    return config


Edit = Callable[[dict[str, Any], dict[str, Tensor]], object]


def _write(folder: Path, model: OneViewLlava, edit: Edit = lambda config, weights: None) -> Path:
    folder.mkdir(exist_ok=True)
    config, weights = _config(model), _weights(model)
    edit(config, weights)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors")
    _tokenizer().save_pretrained(folder)
    return folder


def _logits(model: OneViewLlava, ids: list[int]) -> Tensor:
    pixels = torch.rand(1, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits: Tensor = model.eval()(torch.tensor([ids]), pixels).logits
    return logits


@pytest.mark.parametrize(("new", "old"), NAMES.items())
def test_each_weight_has_its_name(new: str, old: str) -> None:
    assert to_transformers_key(old) == new
    assert _original_name(new) == old


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rows", [270, SPARE_ROWS])
def test_the_loaded_model_gives_the_very_logits_of_the_written_one(
    tmp_path: Path, tied: bool, rows: int
) -> None:
    source = _source(tied, rows)
    folder = _write(tmp_path / "original", source)
    assert is_original(folder)
    model, processor = load_original(folder)
    ids = processor.prompt_ids(QUESTION, [5])
    assert ids.count(270) == 5  # 2 x 2 patches and the newline
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    assert model.config.image_token_id == processor.image_token_id == 270
    # Without spare rows the source's table ends where <image> begins; it reads no row for a view anyhow.
    if rows == 270:
        source.resize_token_embeddings(272, mean_resizing=False)
    assert torch.equal(_logits(model, ids)[..., :rows], _logits(source, ids)[..., :rows])
    assert len(model.lm_head.weight) == max(rows, 272)


def test_it_goes_on_as_any_other_checkpoint(tmp_path: Path) -> None:
    model, processor = load_original(_write(tmp_path / "original", _source(True, SPARE_ROWS)))
    add_action_tokens(model, processor.tokenizer)
    save_checkpoint(tmp_path / "ours", model, processor)
    assert not is_original(tmp_path / "ours")
    loaded, again = load_checkpoint(tmp_path / "ours")
    ids = again.prompt_ids(QUESTION, [5]) + again.answer_ids(action_tokens()[7])
    assert torch.equal(_logits(model, ids), _logits(loaded, ids))
    assert again.end_of_turn == again.tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_the_prompt_is_qwen2s_with_its_opening_turn(tmp_path: Path) -> None:
    _, processor = load_original(_write(tmp_path / "original", _source(False, 270)))
    text = processor.tokenizer.decode(
        processor.prompt_ids(QUESTION, [5]), spaces_between_special_tokens=False
    )
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        + "<image>" * 5
        + "\nWhat action should the robot take to pick up the red block?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_checkpoint_in_several_files_is_the_same(tmp_path: Path) -> None:
    source = _source(False, SPARE_ROWS)
    folder = _write(tmp_path / "original", source)
    (folder / "model.safetensors").unlink()
    names = sorted(weights := _weights(source))
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: weights[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    model, processor = load_original(folder)
    ids = processor.prompt_ids(QUESTION, [5])
    assert torch.equal(_logits(model, ids), _logits(source, ids))
    (folder / "model-00002-of-00002.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError, match=r"00002-of-00002\.safetensors: not a whole safetensors file"):
        load_original(folder)
    index["weight_map"][names[0]] = "../elsewhere.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"\.\./elsewhere\.safetensors is no file beside the index"):
        load_original(folder)


def test_the_unused_vision_layer_the_head_and_rotary_frequencies_are_dropped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = _source(False, SPARE_ROWS)

    def add(_: object, weights: dict[str, Tensor]) -> None:
        weights[VISION + "encoder.layers.2.mlp.fc1.weight"] = torch.ones(1)
        weights[VISION + "head.probe"] = torch.ones(1)
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(1)

    with caplog.at_level("INFO", logger="train_llava.original_layout"):
        model, processor = load_original(_write(tmp_path / "original", source, add))
    assert "3 stored weights have no use here: " in caplog.text
    ids = processor.prompt_ids(QUESTION, [5])
    assert torch.equal(_logits(model, ids), _logits(source, ids))


@pytest.mark.parametrize("said", [None, True])
def test_a_tied_head_may_be_in_the_file_if_it_is_the_embedding(tmp_path: Path, said: bool | None) -> None:
    source = _source(True, SPARE_ROWS)

    def store_head(config: dict[str, Any], weights: dict[str, Tensor]) -> None:
        config["tie_word_embeddings"] = said
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()

    model, processor = load_original(_write(tmp_path / "original", source, store_head))
    # A config that does not say so and a head that is there: two tables, of the same numbers.
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == bool(said)
    ids = processor.prompt_ids(QUESTION, [5])
    assert torch.equal(_logits(model, ids), _logits(source, ids))


def _two_wrong_heads(config: dict[str, Any], weights: dict[str, Tensor]) -> None:
    config["tie_word_embeddings"] = True
    weights["lm_head.weight"][3, 4] += 1e-3


WRONG: list[tuple[Edit, str]] = [
    (
        lambda _, weights: [weights.pop(f"model.layers.1.mlp.{p}_proj.weight") for p in ("up", "down")],
        r"missing \['model.language_model.layers.1.mlp.down_proj.weight', 'model.language_model.layers.1",
    ),
    (
        lambda _, weights: weights.update({"model.vision_resampler.x": torch.ones(1)}),
        r"missing \[\], unexpected \['model.vision_resampler.x'\]",
    ),
    (
        lambda _, weights: weights.update({VISION + "encoder.layers.3.mlp.fc1.bias": torch.ones(1)}),
        r"unexpected \['model.vision_tower.vision_tower.vision_model.encoder.layers.3.mlp.fc1.bias'\]",
    ),
    (
        lambda _, weights: weights.update({"model.norm.weight": torch.ones(7)}),
        r"model.language_model.norm.weight is \[7\], but \[48\] by config.json",
    ),
    (
        lambda _, weights: weights.pop("lm_head.weight"),
        "the weights have no lm_head.weight; if it is tied, as in Qwen2-0.5B, set tie_word_embeddings",
    ),
    (_two_wrong_heads, "lm_head.weight is not the embedding, though tie_word_embeddings is true"),
    (
        lambda config, _: config.pop("vision_config"),
        "config.json: mm_vision_tower: tiny/siglip-2-of-3-layers is not siglip-so400m-patch14-384; for",
    ),
    (
        lambda config, _: config.update(mm_projector_type="linear"),
        "config.json: mm_projector_type: Input should be 'mlp2x_gelu'; expected LLaVA-NeXT's config",
    ),
    (
        lambda config, _: config.update(rope_scaling={"type": "yarn", "factor": 4.0}),
        "config.json: rope_scaling: Input should be None",
    ),
]


@pytest.mark.parametrize(("edit", "message"), WRONG)
def test_what_does_not_fit_is_refused_in_one_line(tmp_path: Path, edit: Edit, message: str) -> None:
    folder = _write(tmp_path / "original", _source(False, SPARE_ROWS), edit)
    with pytest.raises(UserError, match=message) as error:
        load_original(folder)
    assert "\n" not in str(error.value)


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    folder = _write(tmp_path / "original", _source(False, SPARE_ROWS))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(
        UserError, match=r"pickled \(\.bin\), and reading those can run code; get them as safe"
    ):
        load_original(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(UserError, match=r"no weights; expected model\.safetensors or"):
        load_original(folder)


def test_a_folder_without_qwen2s_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = _write(tmp_path / "original", _source(False, SPARE_ROWS))
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(UserError, match="tokenizer"):
        load_original(folder)


@pytest.mark.parametrize("text", [None, "{", "[]", '{"architectures": ["LlavaOnevisionForCausalLM"]}', "{}"])
def test_other_folders_are_not_in_this_layout(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    assert not is_original(tmp_path)


def test_the_published_tower_has_26_layers_and_729_tokens(tmp_path: Path) -> None:
    fields = _config(_source(False, SPARE_ROWS)) | {
        "mm_vision_tower": "google/siglip-so400m-patch14-384",
        "vision_config": None,
    }
    vision: Any = vision_config(OriginalConfig.model_validate(fields), tmp_path)
    default: Any = LlavaOnevisionConfig().vision_config
    assert vision.to_dict() == default.to_dict()  # transformers' own default is this tower
    assert (vision.image_size // vision.patch_size) ** 2 == 729
