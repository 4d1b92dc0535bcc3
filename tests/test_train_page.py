"""What docs/train.md says is what is there: commands, options, messages and estimates."""

from __future__ import annotations

import re
import shlex

import pytest
import yaml
from typer.main import get_command

from oxe_mix.cli import app
from tests.conftest import ROOT
from tests.test_memory import LARGE, SMALL
from train_llava.activations import Longest
from train_llava.batch import plan_batch
from train_llava.config import CheckpointConfig, DataConfig, EvaluationConfig, LoggingConfig, load_config
from train_llava.memory import estimate, oom_advice

PAGE = (ROOT / "docs/train.md").read_text()
CONFIGS = ROOT / "train_llava/configs"
COMMANDS = [
    shlex.split(line)
    for block in re.findall(r"^ *```bash\n(.*?)```", PAGE, re.DOTALL | re.MULTILINE)
    for line in block.splitlines()
    if line.strip()
]


def test_it_is_short_and_says_what_was_not_measured() -> None:
    assert len(PAGE.splitlines()) <= 130
    assert "No GPU was measured so far" in PAGE


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_each_command_is_one(words: list[str]) -> None:
    if words[0] == "make":
        known = set(re.findall(r"^(\w+) \?=", (ROOT / "Makefile").read_text(), re.MULTILINE))
        given = dict(word.split("=", 1) for word in words[2:])
        assert set(given) <= known
        file = given.get("CONFIG", given.get("CONSTRAINTS", ""))
        assert (ROOT / file).is_file()
    elif words[0] == "sbatch":
        script, config, *others = words[1:]
        assert (ROOT / script).is_file()
        assert (ROOT / config).is_file()
        assert len(others) == 2
        assert "config=$1 llava=$2 run=$3" in (ROOT / script).read_text()
    else:
        command = get_command(app).commands[words[1]]  # type: ignore[attr-defined]
        assert command.make_context("here", words[2:], resilient_parsing=False)


def _estimate(config: str, ranks: int) -> str:
    own = load_config(CONFIGS / config)
    # A frame of one view and its newline, 64 tokens of words, an action of seven dimensions.
    shapes, longest = SMALL if "0.5b" in config else LARGE, Longest(729 + 1 + 64 + 7)
    guess = estimate(own, shapes, plan_batch(own, ranks), longest)
    return f"{guess.total / 1e9:.1f} GB"


def test_the_estimates_are_the_commands() -> None:
    rows = re.findall(r"^\| `(\S+)` \| .* \| (\d+\.\d GB) \| one GPU of \d+ GB \|$", PAGE, re.MULTILINE)
    assert {name: _estimate(name, 1) for name, _ in rows} == dict(rows)
    assert len(rows) == 3
    assert f"estimate is {_estimate('ov-7b.yaml', 8)} per GPU, of eight" in PAGE
    assert f"of one it would be {float(_estimate('ov-7b.yaml', 1).split()[0]):.0f} GB" in PAGE


def test_the_advice_is_the_commands() -> None:
    text = " ".join(PAGE.split()).replace("`", "")
    advice = oom_advice(load_config(CONFIGS / "ov-7b-lora.yaml")).removeprefix("try, in this order: ")
    places = [text.index(part) for part in advice.split("; ")]
    assert places == sorted(places)


def test_the_batches_are_the_commands() -> None:
    config = load_config(CONFIGS / "ov-7b.yaml")
    assert f"batch: {plan_batch(config, 8)}" in PAGE
    assert plan_batch(config, 16).samples == 512
    halved = config.train.model_copy(update={"accumulate": 8})
    assert plan_batch(config.model_copy(update={"train": halved}), 4).samples == 256


def test_the_names_of_settings_are_theirs() -> None:
    assert EvaluationConfig().samples == 512
    for name, section in (("keep", CheckpointConfig), ("every", EvaluationConfig), ("every", LoggingConfig)):
        assert name in section.model_fields
    script = (ROOT / "examples/slurm/train.sbatch").read_text()
    assert "STOP_SECONDS:-540" in script
    assert "TERM@600" in script


def test_the_settings_of_several_sources_are_ones() -> None:
    (shown,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    data = DataConfig.model_validate(yaml.safe_load(shown)["data"])
    assert [(source.name, source.weight) for source in data.sources] == [("more_robots", 0.5), ("chat", 0.1)]
    assert data.augment is not None
