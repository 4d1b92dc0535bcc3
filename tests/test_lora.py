"""Adapters on a tiny LLaVA-OneVision that lies in a folder: trained, saved, loaded, also by peft itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy

from convert.action_codec import action_tokens
from convert.prompt import question
from oxe_mix.errors import UserError
from train_llava.action_tokens import add_action_tokens, prove_action_tokens, rows_of
from train_llava.config import LoraConfig, ModelConfig, TinyModel
from train_llava.loading import load_or_build, save_checkpoint
from train_llava.lora import (
    add_lora,
    is_adapter,
    load_adapter,
    load_adapter_run,
    save_adapter,
)
from train_llava.model import OneViewLlava
from train_llava.processor import OneViewProcessor
from train_llava.tiny import build_tiny

pytest.importorskip("peft", reason="peft is in the extra `lora`")

QUESTIONS = [question(f"pick up the {color} block") for color in ("red", "green", "blue", "yellow")]
LORA = LoraConfig(rank=4, alpha=8)
Adapted = tuple[OneViewLlava, OneViewProcessor]
needs_bitsandbytes = pytest.mark.skipif(
    find_spec("bitsandbytes") is None, reason="bitsandbytes, which does nf4, is in the extra `qlora`"
)


def write_base(folder: Path, *, tied: bool, seed: int = 0, hidden: int = 32) -> Path:
    """A whole model without action tokens."""
    torch.manual_seed(seed)
    model, processor = build_tiny(TinyModel(hidden_size=hidden, heads=2, text_layers=2), QUESTIONS)
    if tied:
        text_config: Any = model.config.text_config
        model.config.tie_word_embeddings = text_config.tie_word_embeddings = True
        model.tie_weights()
    save_checkpoint(folder, model, processor)
    return folder


def adapted(base: Path, lora: LoraConfig = LORA) -> Adapted:
    """That model with its tokens and fresh adapters."""
    config = ModelConfig(path=str(base), lora=lora)
    model, processor, _ = load_or_build(config, [], seed=0)
    add_lora(model, config, processor.tokenizer)
    return model, processor


def batch(processor: OneViewProcessor) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, frames and the positions before the answers, of four questions as long as each other."""
    chance = torch.Generator().manual_seed(1)
    answers = [processor.answer_ids("".join(action_tokens()[40 * i : 40 * i + 7])) for i in range(4)]
    prompts = [processor.prompt_ids(asked, [processor.num_view_tokens((64, 64))]) for asked in QUESTIONS]
    ids = torch.tensor([prompt + answer for prompt, answer in zip(prompts, answers, strict=True)])
    at = torch.cat([torch.arange(len(row) - 9, len(row) - 1) + i * len(row) for i, row in enumerate(ids)])
    return ids, torch.rand((4, 3, 64, 64), generator=chance) * 2 - 1, at


def loss_of(model: OneViewLlava, processor: OneViewProcessor) -> Tensor:
    ids, pixels, at = batch(processor)
    return cross_entropy(model(ids, pixels, logits_at=at).logits, ids.flatten()[at + 1])


def logits_of(model: OneViewLlava, processor: OneViewProcessor) -> Tensor:
    ids, pixels, _ = batch(processor)
    with torch.no_grad():
        logits: Tensor = model.eval()(ids, pixels).logits
    return logits


def train(model: OneViewLlava, processor: OneViewProcessor, steps: int = 20) -> list[float]:
    """The losses of so many steps of whatever is not frozen."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    model.train()
    for _ in range(steps):
        loss = loss_of(model, processor)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("lora") / "base", tied=request.param)


@pytest.fixture(scope="module")
def trained(base: Path) -> Adapted:
    model, processor = adapted(base)
    train(model, processor)
    return model.eval(), processor


@pytest.fixture
def saved(trained: Adapted, tmp_path: Path) -> Path:
    save_adapter(tmp_path / "run", *trained)
    return tmp_path / "run"


def _is_tied(base: Path) -> bool:
    return bool(json.loads((base / "config.json").read_text())["tie_word_embeddings"])


def test_adapters_are_in_every_linear_layer_of_the_language_model_and_begin_as_no_change(base: Path) -> None:
    model, processor = adapted(base)
    config = ModelConfig(path=str(base))
    plain, _, _ = load_or_build(config, [], seed=0)
    linear = {
        f"model.language_model.layers.{layer}.{name}_proj.lora_{matrix}.default.weight"
        for layer in range(2)
        for name in (*(f"self_attn.{x}" for x in "qkvo"), *(f"mlp.{x}" for x in ("gate", "up", "down")))
        for matrix in "AB"
    }
    rows = {"model.language_model.embed_tokens.trained_rows"}
    if not _is_tied(base):
        rows.add("lm_head.trained_rows")
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == linear | rows == {name for name, _ in model.named_parameters() if is_adapter(name)}
    assert torch.allclose(logits_of(model, processor), logits_of(plain, processor), atol=1e-6)


def test_steps_lower_the_loss_and_change_nothing_but_adapters_and_the_tokens_rows(base: Path) -> None:
    model, processor = adapted(base)
    ids = prove_action_tokens(processor.tokenizer)
    others = [i for i in range(len(processor.tokenizer)) if i not in ids]
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    tables = [rows_of(model.get_input_embeddings()).clone(), rows_of(model.get_output_embeddings()).clone()]
    losses = train(model, processor)
    assert losses[-1] < losses[0] / 3
    after = model.state_dict()
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        name for name in before if is_adapter(name)
    }
    for layer, table in zip((model.get_input_embeddings(), model.lm_head), tables, strict=True):
        assert torch.equal(rows_of(layer)[others], table[others])
        assert (rows_of(layer)[ids] != table[ids]).any(dim=1).all()
    # Both ends act as the tables say that they do.
    hidden = torch.randn(3, 32)
    assert torch.allclose(model.lm_head(hidden), hidden @ rows_of(model.lm_head).T, atol=1e-6)
    every = torch.arange(len(processor.tokenizer))
    assert torch.equal(model.get_input_embeddings()(every), rows_of(model.get_input_embeddings())[every])
    same = torch.equal(rows_of(model.get_input_embeddings()), rows_of(model.lm_head))
    assert same == _is_tied(base)


def test_gradients_of_the_rows_are_those_of_whole_tables(base: Path) -> None:
    model, processor = adapted(base)
    loss_of(model.eval(), processor).backward()
    whole, _, _ = load_or_build(ModelConfig(path=str(base)), [], seed=0)
    loss_of(whole, processor).backward()
    ids = prove_action_tokens(processor.tokenizer)
    for ours, theirs in (
        (model.get_input_embeddings(), whole.get_input_embeddings()),
        (model.lm_head, whole.lm_head),
    ):
        gradient: Any = rows_of(theirs).grad
        layer: Any = ours
        assert torch.allclose(layer.trained_rows.grad, gradient[ids], atol=1e-6)
        assert gradient[ids].abs().max() > 1e-4


def test_gradient_checkpointing_gives_the_same_gradients(base: Path) -> None:
    model, processor = adapted(base)
    train(model, processor, steps=2)  # else lora_A has none: lora_B begins at zero

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        loss_of(model.train(), processor).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    model.activation_checkpointing_enable({"use_reentrant": False})
    kept = gradients()
    assert plain.keys() == kept.keys() == {name for name, _ in model.named_parameters() if is_adapter(name)}
    assert all(torch.allclose(plain[name], kept[name], atol=1e-6) for name in plain)
    assert all(gradient.abs().max() > 0 for gradient in kept.values())


def test_saved_and_loaded_it_gives_the_same_logits(trained: Adapted, base: Path, saved: Path) -> None:
    model, processor = trained
    loaded, again = load_adapter_run(saved, torch.float32)
    assert torch.equal(logits_of(model, processor), logits_of(loaded, again))
    assert not (saved / "trained_parts.safetensors").exists()
    assert json.loads((saved / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    assert len((saved / "adapter_model.safetensors").read_bytes()) < 400_000
    halved, _ = load_adapter_run(saved, torch.bfloat16)
    assert {p.dtype for p in halved.parameters()} == {torch.bfloat16}
    assert not halved.training


def test_training_goes_on_from_loaded_adapters(trained: Adapted, base: Path, saved: Path) -> None:
    model, processor = adapted(base)
    load_adapter(saved, model)
    assert torch.equal(logits_of(*trained), logits_of(model, processor))
    losses = train(model, processor, steps=5)
    assert losses[-1] < losses[0] < 2  # a fresh one begins above 6


# peft 0.21 asks transformers 5.23 under an old name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_peft_itself_loads_what_was_saved(trained: Adapted, base: Path, saved: Path) -> None:
    from peft import PeftModel

    model, processor = trained
    plain, of_base, _ = load_or_build(ModelConfig(path=str(base)), [], seed=0)
    before = logits_of(plain, processor)
    theirs: Any = PeftModel.from_pretrained(plain, str(saved))
    ids, pixels, _ = batch(of_base)
    with torch.no_grad():
        logits = theirs.eval()(ids, pixels).logits
    assert torch.allclose(logits, logits_of(model, processor), atol=1e-5)
    assert not torch.allclose(logits, before, atol=0.1)


def test_a_projector_trained_beside_the_adapters_is_saved_with_them(base: Path, tmp_path: Path) -> None:
    model, processor = adapted(base)
    vision = {name: weight.clone() for name, weight in model.model.vision_tower.state_dict().items()}
    model.model.multi_modal_projector.requires_grad_(True)
    model.model.image_newline.requires_grad_(True)
    train(model, processor, steps=3)
    assert all(torch.equal(vision[name], w) for name, w in model.model.vision_tower.state_dict().items())
    save_adapter(tmp_path / "run", model, processor)
    parts = load_file(tmp_path / "run/trained_parts.safetensors")
    assert set(parts) == {
        "model.image_newline",
        *(f"model.multi_modal_projector.linear_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")),
    }
    loaded, again = load_adapter_run(tmp_path / "run", torch.float32)
    assert torch.equal(logits_of(model, processor), logits_of(loaded, again))
    (tmp_path / "run/trained_parts.safetensors").unlink()
    with pytest.raises(UserError, match=r"trained_parts\.safetensors: not a whole file of weights"):
        load_adapter_run(tmp_path / "run", torch.float32)


def test_weights_that_were_gathered_from_ranks_are_saved_in_place_of_the_models_own(
    trained: Adapted, tmp_path: Path
) -> None:
    model, processor = trained
    gathered = {name: weight + 1 for name, weight in model.state_dict().items()}
    save_adapter(tmp_path, model, processor, gathered)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    name = "base_model.model.model.language_model.embed_tokens.token_adapter.trainable_tokens_delta"
    assert torch.equal(stored[name], gathered["model.language_model.embed_tokens.trained_rows"])


def test_adapters_have_the_models_dtype_and_a_dropout_sleeps_when_the_model_does(base: Path) -> None:
    config = ModelConfig(path=str(base), lora=LoraConfig(rank=4, dropout=0.5))
    model, processor, _ = load_or_build(config, [], seed=0, precision="bf16")
    add_lora(model.eval(), config, processor.tokenizer)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not any(module.training for module in model.modules())


Edit = Callable[[Path, Path], object]


def _edit_weights(change: Callable[[dict[str, Tensor]], object]) -> Edit:
    def edit(run: Path, _: Path) -> None:
        weights = load_file(run / "adapter_model.safetensors")
        change(weights)
        save_file(weights, run / "adapter_model.safetensors")

    return edit


def _edit_json(file: Path, **fields: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def _edit_base(_: Path, base: Path) -> None:
    weights = load_file(base / "model.safetensors")
    next(iter(weights.values()))[-1] += 1e-3
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})


FIRST = "base_model.model.model.language_model.layers.0.mlp.down_proj.lora_A.weight"
WRONG: list[tuple[Edit, str]] = [
    (_edit_weights(lambda weights: weights.pop(FIRST)), rf"do not fit the model; missing \['{FIRST}'\], un"),
    (_edit_weights(lambda weights: weights.update(x=torch.ones(1))), r"missing \[\], unexpected \['x'\]"),
    (
        _edit_weights(lambda weights: weights.update({FIRST: torch.ones(4, 7)})),
        r"down_proj.lora_A.weight is \[4, 7\], but \[4, 128\] in the model",
    ),
    (
        lambda run, _: (run / "adapter_model.safetensors").write_bytes(b"version https://git-lfs"),
        r"adapter_model\.safetensors: not a whole file of weights",
    ),
    (
        _edit_base,
        r"another base than what is now at .*base \(model\.safetensors is of other content\); put it",
    ),
    (lambda _, base: write_base(base, tied=False, seed=1), "model.safetensors is of other content"),
    (lambda _, base: (base / "more.safetensors").write_text(""), "more.safetensors is new"),
    (lambda _, base: shutil.rmtree(base), "run: adapters without their base, .*base: no such folder; give"),
    (
        lambda _, base: (base / "adapter_config.json").write_text("{}"),
        "holds adapters, not a whole model; make one",
    ),
    (
        lambda _, base: _edit_json(base / "config.json", initializer_range=0.5),
        r"config\.json is of other content",
    ),
    (
        lambda run, _: _edit_json(run / "adapter_config.json", trainable_token_indices={"embed_tokens": [1]}),
        "the base and the tokenizer here have the action tokens in other rows",
    ),
    (lambda run, _: (run / "base.json").unlink(), r"base\.json: no such file; expected the note of the base"),
    (lambda run, _: (run / "adapter_config.json").write_text("{}"), "base_model_name_or_path: Field req"),
    (lambda run, _: (run / "processor_config.json").unlink(), "run: no processor to load"),
]


@pytest.mark.parametrize(("edit", "message"), WRONG)
def test_what_does_not_fit_is_refused_in_one_line(tmp_path: Path, edit: Edit, message: str) -> None:
    base = write_base(tmp_path / "base", tied=False)
    save_adapter(tmp_path / "run", *adapted(base))
    edit(tmp_path / "run", base)
    with pytest.raises(UserError, match=message) as error:
        load_adapter_run(tmp_path / "run", torch.float32)
    assert "\n" not in str(error.value)


def test_a_tokenizer_with_the_tokens_in_other_rows_is_refused(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", tied=False)
    save_adapter(tmp_path / "run", *adapted(base))
    model, other = build_tiny(TinyModel(hidden_size=32, heads=2, vocabulary=300), QUESTIONS)
    add_action_tokens(model, other.tokenizer)
    other.save_pretrained(tmp_path / "run")
    with pytest.raises(UserError, match="have the action tokens in other rows"):
        load_adapter_run(tmp_path / "run", torch.float32)


def test_nf4_without_bitsandbytes_is_refused(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train_llava.quantize.find_spec", lambda _: None)
    config = ModelConfig(path=str(base), lora=LoraConfig(rank=4, alpha=8, quantize="nf4"))
    message = r"^model\.lora\.quantize: nf4 needs bitsandbytes, which is not there"
    with pytest.raises(UserError, match=message):
        load_or_build(config, [], seed=0)


@needs_bitsandbytes
def test_in_nf4_are_the_language_models_linear_layers_and_they_stay_while_adapters_learn(base: Path) -> None:
    config = ModelConfig(path=str(base), lora=LoraConfig(rank=4, alpha=8, quantize="nf4"))
    model, processor, _ = load_or_build(config, [], seed=0, precision="bf16")
    in_4_bits = {name for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"}
    assert len(in_4_bits) == 14
    assert all(name.startswith("model.language_model.layers.") for name in in_4_bits)
    add_lora(model, config, processor.tokenizer)
    assert {p.dtype for name, p in model.named_parameters() if is_adapter(name)} == {torch.bfloat16}
    before = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    logits_of(model, processor)  # before training, as every run does
    losses = train(model, processor)
    assert losses[-1] < losses[0] / 3
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)
