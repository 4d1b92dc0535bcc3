"""The estimate of a run's memory, beside what real models of the same shapes take."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import LlavaOnevisionConfig, Qwen2Config, SiglipVisionConfig

from tests.conftest import ROOT
from train_llava.activations import Longest, kept_by_model
from train_llava.batch import plan_batch
from train_llava.config import PARTS, RunConfig, TinyModel, load_config
from train_llava.loading import load_or_build
from train_llava.memory import MemoryEstimate, check_fits, counts, estimate, oom_advice, shapes_of
from train_llava.model import OneViewLlava
from train_llava.shapes import Shapes, Text, Vision
from train_llava.trainer import freeze

SIGLIP = Vision(1152, 4304, 26, 16, 384, 14)
SMALL = Shapes(SIGLIP, Text(896, 4864, 24, 14, 2, 152_000, tied=True))
LARGE = Shapes(SIGLIP, Text(3584, 18944, 28, 28, 4, 152_128, tied=False))
# A view of 16 patches, heads that share keys; and a model of ten times the weights.
TOY = Shapes(Vision(96, 384, 2, 4, 64, 16), Text(96, 256, 3, 4, 2, 770, tied=False))
BIGGER = Shapes(Vision(192, 512, 4, 4, 112, 14), Text(256, 1024, 6, 8, 2, 4000, tied=True))
ALL, TEXT_ONLY, EYES_ONLY = (1e-3, 1e-3, 1e-3), (None, None, 1e-3), (1e-3, 1e-3, None)
Rates = tuple[float | None, float | None, float | None]


def _run(rates: Rates = ALL, train: dict[str, Any] | None = None, **model: Any) -> RunConfig:
    own = {
        "max_steps": 1,
        "micro_batch": 4,
        "accumulate": 1,
        "learning_rates": dict(zip(PARTS, rates, strict=True)),
    }
    return RunConfig.model_validate(
        {"name": "run", "model": {"path": "somewhere"} | model, "train": own | (train or {})}
    )


def _build(shapes: Shapes, config: RunConfig) -> OneViewLlava:
    vision, text = shapes.vision, shapes.text
    torch.manual_seed(0)
    model = OneViewLlava(
        LlavaOnevisionConfig(
            vision_config=SiglipVisionConfig(
                hidden_size=vision.hidden,
                intermediate_size=vision.intermediate,
                num_hidden_layers=vision.layers,
                num_attention_heads=vision.heads,
                image_size=vision.image_size,
                patch_size=vision.patch_size,
                vision_use_head=False,
            ),
            text_config=Qwen2Config(
                vocab_size=text.vocabulary,
                hidden_size=text.hidden,
                intermediate_size=text.intermediate,
                num_hidden_layers=text.layers,
                num_attention_heads=text.heads,
                num_key_value_heads=text.kv_heads,
                tie_word_embeddings=text.tied,
            ),
            image_token_index=5,
            tie_word_embeddings=text.tied,
        )
    )
    model.set_attn_implementation(config.model.attention)
    torch.nn.Module.to(model, torch.bfloat16 if config.train.precision == "bf16" else torch.float32)
    model.train()
    return model


class _Kept:
    """A saved tensor, for as long as the graph holds it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def _kept(model: OneViewLlava, samples: int, tokens: int) -> int:
    """Bytes that a forward pass keeps for the backward pass, the weights themselves left out."""
    own, alive = {w.untyped_storage().data_ptr() for w in model.parameters()}, weakref.WeakSet[_Kept]()

    def pack(tensor: Tensor) -> _Kept:
        kept = _Kept(tensor)
        alive.add(kept)
        return kept

    side: Any = model.config.vision_config
    patches = (side.image_size // side.patch_size) ** 2
    ids = torch.full((samples, tokens), 7)
    ids[:, : patches + 1] = 5
    pixels = torch.rand(samples, 3, side.image_size, side.image_size)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        out = model(ids, pixels, logits_at=torch.arange(2))
    storages = {kept.tensor.untyped_storage().data_ptr(): kept.tensor.untyped_storage() for kept in alive}
    assert out.logits.requires_grad
    return sum(storage.nbytes() for pointer, storage in storages.items() if pointer not in own)


@pytest.mark.parametrize("shapes", [TOY, BIGGER])
def test_weights_are_counted_one_by_one(shapes: Shapes) -> None:
    config = _run()
    model = _build(shapes, config)
    assert sum(shapes.num_weights.values()) == sum(w.numel() for w in model.parameters())
    assert Shapes.of(model.config) == shapes
    for rates in (TEXT_ONLY, EYES_ONLY, (1e-3, None, None)):
        config = _run(rates)
        freeze(model, config)
        assert counts(config, shapes).trained == sum(w.numel() for w in model.parameters() if w.requires_grad)


def test_a_tiny_model_is_counted_before_it_is_built() -> None:
    config = load_config(ROOT / "train_llava/configs/tiny-cpu.yaml")
    assert config.model.tiny is not None
    # Enough text for a tokenizer of the size that was asked for.
    words = [f"block {a}{b}{c} cup" for a in "abcdef" for b in "ghijkl" for c in "mnopqr"]
    model, _, _ = load_or_build(config.model, words, seed=0)
    assert sum(shapes_of(config.model).num_weights.values()) == sum(w.numel() for w in model.parameters())
    assert shapes_of(config.model) == Shapes.of_tiny(TinyModel()) == Shapes.of(model.config)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_weights_gradients_and_states_are_those_of_a_real_step(precision: str) -> None:
    config = _run(train={"precision": precision})
    model = _build(TOY, config)
    model.model.vision_tower.post_layernorm.requires_grad_(False)  # not used, so it has no gradient
    unused = 2 * TOY.vision.hidden
    # As DeepSpeed has it, for either precision: float32 copies of what is trained are stepped.
    masters = [w.detach().float().clone() for w in model.parameters() if w.requires_grad]
    optimizer = torch.optim.AdamW(masters)
    model(torch.full((1, 20), 7), logits_at=torch.arange(3)).logits.sum().backward()
    gradients = [w.grad for w in model.parameters() if w.grad is not None]
    for master, gradient in zip(masters, gradients, strict=True):
        master.grad = gradient.float()
    optimizer.step()
    moments = [v for state in optimizer.state.values() for k, v in state.items() if k != "step"]
    got = estimate(config, TOY, plan_batch(config, 1), Longest(20))
    each = 2 if precision == "bf16" else 4
    assert got.weights == sum(w.nbytes for w in model.parameters())
    assert got.gradients == sum(g.nbytes for g in gradients) + unused * each
    assert got.optimizer == sum(t.nbytes for t in masters + moments) + unused * 12


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("rates", [ALL, TEXT_ONLY, EYES_ONLY])
@pytest.mark.parametrize("shapes", [TOY, BIGGER])
def test_activations_are_what_autograd_keeps(
    shapes: Shapes, rates: Rates, precision: str, attention: str
) -> None:
    config = _run(rates, {"precision": precision}, attention=attention)
    model = _build(shapes, config)
    freeze(model, config)
    kept = _kept(model, 4, shapes.vision.num_patches + 41)
    got = kept_by_model(config, shapes, 4, Longest(shapes.vision.num_patches + 41))
    # Eager attention keeps a little less where a part is frozen.
    assert got == pytest.approx(kept, rel=0.03 if attention == "sdpa" else 0.1)


@pytest.mark.parametrize("rates", [ALL, TEXT_ONLY, EYES_ONLY])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_with_checkpointing_each_layers_input_is_kept_and_one_layer_in_full(
    rates: Rates, precision: str
) -> None:
    longest = Longest(BIGGER.vision.num_patches + 41)
    model = _build(BIGGER, _run(rates, {"precision": precision}))
    config = _run(rates, {"precision": precision, "gradient_checkpointing": True})
    freeze(model, config)
    plain = _kept(model, 4, longest.tokens)
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.disable_input_require_grads()  # or the frozen tower would be calculated back through
    kept = _kept(model, 4, longest.tokens)
    # The one layer that is calculated anew: a sixth of what the language model keeps without checkpointing.
    eyes = kept_by_model(_run(rates, {"precision": precision}), BIGGER, 4, Longest(0))
    got = kept_by_model(config, BIGGER, 4, longest)
    assert got == pytest.approx(kept + (plain - eyes) / 6, rel=0.08)
    assert got < plain / 2


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("dropout", [0.0, 0.05])
def test_lora_is_counted_with_its_adapters_and_what_goes_into_them(precision: str, dropout: float) -> None:
    lora = {"rank": 8, "dropout": dropout}
    config = _run(TEXT_ONLY, {"precision": precision}, lora=lora)
    model = _build(BIGGER, config)
    model.requires_grad_(False)
    linear = r"model\.language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
    model.add_adapter(peft.LoraConfig(r=8, lora_dropout=dropout, target_modules=linear))
    for weight in model.parameters():
        weight.data = weight.data.to(model.lm_head.weight.dtype)
    adapters = sum(w.numel() for w in model.parameters() if w.requires_grad)
    assert counts(config, BIGGER).trained == adapters + 256 * BIGGER.text.hidden  # tied: the rows once
    model.get_input_embeddings().register_forward_hook(lambda *a: a[2].requires_grad_(True))
    kept = _kept(model, 4, BIGGER.vision.num_patches + 41)
    got = kept_by_model(config, BIGGER, 4, Longest(BIGGER.vision.num_patches + 41))
    # A CPU's dropout keeps its mask as numbers, a GPU's as bits in bytes, which is what is reckoned.
    assert got == pytest.approx(kept, rel=0.05 if dropout == 0 else 0.25)


def _of(file: str, ranks: int, shapes: Shapes, **zero: Any) -> MemoryEstimate:
    config = load_config(ROOT / "train_llava/configs" / f"{file}.yaml")
    raw = config.model_dump(mode="json")
    raw["train"]["zero"] |= zero
    config = RunConfig.model_validate(raw)
    return estimate(config, shapes, plan_batch(config, ranks), Longest(777))


def test_the_true_shapes_have_the_published_numbers_of_weights() -> None:
    assert sum(SMALL.num_weights.values()) == pytest.approx(0.894e9, rel=0.002)
    assert sum(LARGE.num_weights.values()) == pytest.approx(8.03e9, rel=0.002)


@pytest.mark.parametrize(
    ("file", "ranks", "gigabytes", "shapes"),
    [
        ("ov-0.5b", 1, 80, SMALL),
        ("ov-7b", 8, 80, LARGE),
        ("ov-7b-lora", 1, 80, LARGE),
        ("ov-7b-qlora", 1, 24, LARGE),
    ],
)
def test_each_config_fits_the_gpus_that_it_names(
    file: str, ranks: int, gigabytes: int, shapes: Shapes
) -> None:
    named = (ROOT / "train_llava/configs" / f"{file}.yaml").read_text()
    assert f"of {gigabytes} GB" in named
    got = _of(file, ranks, shapes)
    assert check_fits(got, int(gigabytes * 1e9)) is None
    assert check_fits(got, None) is None


def test_seven_billion_weights_do_not_fit_one_gpu_and_the_run_is_warned() -> None:
    got = _of("ov-7b", 1, LARGE)
    assert got.weights + got.gradients + got.optimizer == 16 * sum(LARGE.num_weights.values())
    warning = check_fits(got, int(80e9))
    assert warning is not None
    assert "is more than the 80.0 GB of this GPU" in warning
    assert "\n" not in warning


def test_ranks_stage_3_and_offload_each_take_their_part_away() -> None:
    one, eight = _of("ov-7b", 1, LARGE), _of("ov-7b", 8, LARGE)
    assert eight.weights == one.weights
    assert (eight.gradients, eight.optimizer) == (one.gradients / 8, one.optimizer / 8)
    assert one.host == eight.host == 0
    split = _of("ov-7b", 8, LARGE, stage=3)
    assert (split.weights, split.optimizer) == (eight.weights / 8, eight.optimizer)
    states = _of("ov-7b", 8, LARGE, offload="optimizer")
    assert (states.weights, states.gradients, states.optimizer) == (eight.weights, 0, 0)
    assert states.host == eight.optimizer * 16 / 12
    everything = _of("ov-7b", 8, LARGE, stage=3, offload="all")
    assert (everything.weights, everything.optimizer) == (0, 0)
    assert everything.host == states.host + split.weights
    assert everything.total < split.total < eight.total < one.total


def test_four_bits_shrink_the_frozen_matrices_alone() -> None:
    half, quarter = _of("ov-7b-lora", 1, LARGE), _of("ov-7b-qlora", 1, LARGE)
    matrices = 28 * (2 * 3584 * 3584 + 2 * 3584 * 512 + 3 * 3584 * 18944)
    assert half.weights - quarter.weights == pytest.approx(matrices * (2 - 0.5159), rel=1e-4)
    assert half.optimizer == quarter.optimizer == pytest.approx(12 * (80.7e6 + 2 * 256 * 3584), rel=0.001)


def test_the_estimate_is_one_line_that_adds_up() -> None:
    got = MemoryEstimate(16.1e9, 2e9, 12.1e9, 25e9, 1.2e9, 4e9)
    assert str(got) == (
        "memory per GPU: about 60.4 GB = weights 16.1 GB + gradients 2.0 GB + optimizer 12.1 GB + "
        "activations 25.0 GB + logits 1.2 GB + reserve 4.0 GB"
    )
    assert str(_of("ov-7b", 8, LARGE, offload="optimizer")).endswith(
        "; and of the machine's memory 16.1 GB per GPU"
    )
    tiny = load_config(ROOT / "train_llava/configs/tiny-cpu.yaml")
    line = str(estimate(tiny, shapes_of(tiny.model), plan_batch(tiny, 2), Longest(57)))
    assert line.startswith("memory per process: about 1.1 GB = weights 3.")


def test_longer_samples_and_larger_batches_take_more() -> None:
    config = _run(train={"gradient_checkpointing": True})
    batch = plan_batch(config, 1)
    short, long = (estimate(config, LARGE, batch, Longest(n)) for n in (777, 2048))
    assert long.activations > 2 * short.activations
    tiles = estimate(config, LARGE, batch, Longest(2048, patches=10))
    assert tiles.activations > long.activations
    assert estimate(config, LARGE, batch, Longest(777, answer=80)).logits == 10 * short.logits


ADVICE: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (
        {"micro_batch": 8, "accumulate": 4},
        {},
        "train.micro_batch: 4 with train.accumulate: 8; train.gradient_checkpointing: true; "
        "train.zero.offload: optimizer",
    ),
    (
        {"micro_batch": 3, "accumulate": 2, "gradient_checkpointing": True},
        {},
        "train.micro_batch: 1 with train.accumulate: 6; train.zero.offload: optimizer; "
        "train.zero: {stage: 3, offload: all}",
    ),
    (
        {"micro_batch": 8, "accumulate": None, "global_batch": 64, "gradient_checkpointing": True},
        {"lora": {"rank": 8}},
        "train.micro_batch: 4; train.zero.offload: optimizer; train.zero: {stage: 3, offload: all}",
    ),
    (
        {"micro_batch": 1, "gradient_checkpointing": True, "zero": {"stage": 3, "offload": "all"}},
        {},
        "model.lora: {rank: 32}",
    ),
    (
        {"micro_batch": 1, "gradient_checkpointing": True, "zero": {"stage": 3, "offload": "all"}},
        {"lora": {"rank": 8}},
        "model.lora.quantize: nf4, with train.zero: {stage: 2, offload: optimizer}",
    ),
    (
        {"micro_batch": 1, "gradient_checkpointing": True, "zero": {"stage": 2, "offload": "optimizer"}},
        {"lora": {"quantize": "nf4"}},
        "every setting that saves memory is in use: take a smaller model, or a larger GPU",
    ),
]


@pytest.mark.parametrize(("train", "model", "advice"), ADVICE)
def test_an_out_of_memory_error_ends_with_the_settings_that_are_left(
    train: dict[str, Any], model: dict[str, Any], advice: str
) -> None:
    assert oom_advice(_run(train=train, **model)).removeprefix("try, in this order: ") == advice


def test_what_is_advised_is_a_valid_config(tmp_path: Path) -> None:
    config = _run(train={"micro_batch": 6, "accumulate": 3})
    assert "train.micro_batch: 3 with train.accumulate: 6" in oom_advice(config)
    halved = _run(train={"micro_batch": 3, "accumulate": 6})
    assert plan_batch(halved, 2).samples == plan_batch(config, 2).samples
