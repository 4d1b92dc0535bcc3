"""A run's config: what it says, and what it refuses."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from oxe_mix.errors import UserError
from tests.conftest import ROOT
from train_llava.batch import deepspeed_json, num_steps, plan_batch
from train_llava.config import DataConfig, RunConfig, load_config

CONFIGS = ROOT / "train_llava/configs"
TINY = (CONFIGS / "tiny-cpu.yaml").read_text()


def _config(**changes: Any) -> RunConfig:
    raw = yaml.safe_load(TINY)
    for section, values in changes.items():
        raw[section] = {**raw.get(section, {}), **values}
    return RunConfig.model_validate(raw)


def test_there_are_five_configs_and_all_of_them_load() -> None:
    loaded = {file.stem: load_config(file) for file in sorted(CONFIGS.glob("*.yaml"))}
    assert sorted(loaded) == ["ov-0.5b", "ov-7b", "ov-7b-lora", "ov-7b-qlora", "tiny-cpu"]
    assert all(config.name == name for name, config in loaded.items())


def test_ov_7b_is_the_replaced_systems_recipe() -> None:
    own = load_config(CONFIGS / "ov-7b.yaml").train
    assert own.learning_rates == {"vision_tower": 2e-6, "projector": 1e-5, "language_model": 1e-5}
    assert (own.schedule, own.warmup_ratio, own.weight_decay) == ("cosine", 0.03, 0.0)
    assert (own.precision, own.gradient_checkpointing, own.epochs) == ("bf16", True, 1)
    batch = plan_batch(load_config(CONFIGS / "ov-7b.yaml"), 8)
    assert batch.micro * batch.accumulate == 32
    assert batch.samples == 256


def test_the_adapters_of_ov_7b_lora_have_rank_32() -> None:
    for name, quantize in (("ov-7b-lora", "none"), ("ov-7b-qlora", "nf4")):
        lora = load_config(CONFIGS / f"{name}.yaml").model.lora
        assert lora is not None
        assert (lora.rank, lora.quantize) == (32, quantize)


def test_each_factor_of_the_batch_says_where_it_comes_from() -> None:
    assert str(plan_batch(_config(), 2)) == (
        "64 (train.global_batch) = 32 (train.micro_batch) x 1 (worked out) x 2 ranks (NPROC x NNODES)"
    )
    given = _config(train={"global_batch": None, "accumulate": 3})
    assert str(plan_batch(given, 2)) == (
        "192 (worked out) = 32 (train.micro_batch) x 3 (train.accumulate) x 2 ranks (NPROC x NNODES)"
    )
    with pytest.raises(UserError, match=r"64 is no multiple of train\.micro_batch 32 x 3 ranks"):
        plan_batch(_config(), 3)
    with pytest.raises(UserError, match="NPROC is 0"):
        plan_batch(_config(), 0)


def test_deepspeeds_json_comes_from_the_config_alone() -> None:
    for ranks, accumulate in ((1, 2), (2, 1)):
        made = deepspeed_json(_config(), plan_batch(_config(), ranks))
        assert made["train_batch_size"] == made["train_micro_batch_size_per_gpu"] * ranks * accumulate
        assert made["gradient_accumulation_steps"] == accumulate
        assert made["zero_optimization"]["stage"] == 2
        assert not made["bf16"]["enabled"]
    split = _config(train={"zero": {"stage": 3, "offload": "all"}, "precision": "bf16"})
    made = deepspeed_json(split, plan_batch(split, 1))
    assert made["zero_optimization"]["offload_param"] == {"device": "cpu"}
    assert made["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}
    assert made["bf16"]["enabled"]


def test_an_epoch_is_as_many_draws_as_there_are_samples_rounded_up_to_steps() -> None:
    config = _config(train={"max_steps": None, "epochs": 1.5})
    assert num_steps(config, plan_batch(config, 2), 100) == 3  # 150 draws, 64 a step
    assert num_steps(_config(), plan_batch(_config(), 2), 100) == 2000


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("max_steps: ", "max_stepps: ", "train.max_stepps: unknown key; did you mean max_steps?"),
        ("vision_tower: 1.5e-3", "vision_tower: -1", "train.learning_rates.vision_tower: "),
        ("vision_tower: 1.5e-3, ", "", "give each of vision_tower, projector, language_model"),
        ("  tiny: {", "  path: x\n  tiny: {", "give either path (a folder or hub id) or tiny"),
        ("  tiny: {", "  lora: {}\n  tiny: {", "lora adapts a model that is somewhere"),
        ("max_steps: 2000", "max_steps: 2000\n  epochs: 1", "give either epochs or max_steps"),
        ("global_batch: 64", "accumulate: 1\n  global_batch: 64", "give either global_batch or accumulate"),
        ("cache_frames: true", "cache_frames: true\n  workers: 2", "no augment, no workers"),
        ("precision: fp32", "zero: {offload: all}", "only stage 3 splits; use offload: optimizer"),
    ],
)
def test_a_wrong_config_is_one_line(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in TINY
    (tmp_path / "c.yaml").write_text(TINY.replace(old, new, 1))
    with pytest.raises(UserError) as error:
        load_config(tmp_path / "c.yaml")
    assert message in str(error.value)
    assert str(error.value).startswith(f"{tmp_path / 'c.yaml'}: ")
    assert "\n" not in str(error.value)


def test_a_run_that_trains_nothing_is_refused() -> None:
    frozen = {"vision_tower": None, "projector": None, "language_model": None}
    with pytest.raises(ValueError, match="all parts are frozen"):
        _config(train={"learning_rates": frozen})


def test_the_sources_that_the_page_shows_are_a_config() -> None:
    page = (ROOT / "docs/train.md").read_text()
    (block,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    data = DataConfig.model_validate(yaml.safe_load(block)["data"])
    assert [source.name for source in data.sources] == ["more_robots", "chat"]
    assert data.augment is not None
