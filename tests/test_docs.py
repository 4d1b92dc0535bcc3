"""The pages in docs/: their commands, excerpts and links. Training, serving and adding a robot have tests of
their own.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from tests.check_links import broken
from tests.command_lines import parse
from tests.conftest import OXE_MIX, PYTHON, ROOT, run

DOCS = ROOT / "docs"
FILES = (DOCS / "files.md").read_text()


def _blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)


def _real_files(data: Path, llava: Path, checkpoint: Path) -> list[Any]:
    """What the excerpts of the page are of, in its order."""
    lines = next((llava / "conversations").glob("bridge_orig-*.jsonl")).read_text().splitlines()
    metrics = (checkpoint / "metrics.jsonl").read_text().splitlines()
    return [
        json.loads((data / "oxe-mix.lock.json").read_text()),
        json.loads(lines[0]),
        json.loads((llava / "action_codec.json").read_text()),
        json.loads((llava / "manifest.json").read_text()),
        json.loads(metrics[1]),
        json.loads((checkpoint / "evaluation.json").read_text()),
    ]


def _misfits(shown: Any, real: Any, place: str) -> list[str]:
    """Where an excerpt says what the real file does not: a key that is not there, another kind of value."""
    if isinstance(shown, dict) and isinstance(real, dict):
        wrong = [f"{place}.{key}: not in the file" for key in shown if key not in real]
        both = [key for key in shown if key in real]
        return wrong + [one for key in both for one in _misfits(shown[key], real[key], f"{place}.{key}")]
    if isinstance(shown, list) and isinstance(real, list):
        return [one for value in shown for one in _misfits(value, real[0], f"{place}[]")] if real else []
    numbers = (int, float)
    same = isinstance(real, numbers) if isinstance(shown, numbers) else type(shown) is type(real)
    return [] if same else [f"{place}: {shown!r} is shown, {real!r} is there"]


def test_each_excerpt_of_a_file_is_what_such_a_file_holds(data: Path, llava: Path, checkpoint: Path) -> None:
    shown = [json.loads(block) for block in _blocks("files.md", "json")]
    real = _real_files(data, llava, checkpoint)
    wrong = [one for i, pair in enumerate(zip(shown, real, strict=True)) for one in _misfits(*pair, str(i))]
    assert wrong == []
    # A page that shows nothing would be right, too.
    assert _misfits({"a": [1, {"b": "x"}]}, {"a": [2]}, "0") == ["0.a[]: {'b': 'x'} is shown, 2 is there"]
    assert _misfits({"a": 1}, {}, "0") == ["0.a: not in the file"]


def test_each_file_that_the_page_names_is_there(llava: Path, checkpoint: Path) -> None:
    names = (
        "config.yaml",
        "versions.json",
        "README.md",
        "curves.png",
        "data_manifest.json",
        "action_codec.json",
    )
    for name in names:
        assert f"`{name}`" in FILES
        assert (checkpoint / name).exists(), name
    for name in ("data.yaml", "dataset_statistics.json", "val", "images"):
        assert (llava / name).exists(), name


def test_the_commands_about_mixing_run_as_they_stand(bucket26: Path, tmp_path: Path) -> None:
    (mix,) = _blocks("mix.md", "yaml")
    (tmp_path / "two-robots.yaml").write_text(mix)
    commands = [line for block in _blocks("mix.md", "bash") for line in block.splitlines()]
    assert [command.split()[1] for command in commands] == ["mix", "download", "download", "convert"]
    for command in commands:
        words = shlex.split(command)[1:]
        more = ("--source", str(bucket26)) if words[0] == "download" else ()
        said = run(OXE_MIX, *words, *more, cwd=tmp_path).stdout
    assert "viola" in said
    assert "share" in said


def _commands(page: Path) -> list[list[str]]:
    """Each `oxe-mix …` of a page's blocks, with the lines that a backslash joins to it."""
    blocks = re.findall(r"```\w*\n(.*?)```", page.read_text(), re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    found = [re.match(r"(?:\w+=\S+ )?oxe-mix (.+)", line) for line in lines]
    return [shlex.split(one[1], comments=True) for one in found if one]


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted(DOCS.glob("*.md"))], ids=lambda page: page.name)
def test_each_command_of_a_page_has_the_options_that_it_names(page: Path) -> None:
    for words in _commands(page):
        parse(words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["dwnload"], "No such command"),
        (["serve", "--checkpoint", "runs/first", "--prot", "1"], "No such option"),
        (["download", "--mix", "default.yaml", "--jobs", "N"], "valid integer"),
    ],
)
def test_a_command_or_an_option_that_is_not_there_would_be_found(words: list[str], said: str) -> None:
    assert len(_commands(DOCS / "scale.md")) == 4
    with pytest.raises(Exception, match=said):
        parse(words)


def test_the_words_of_the_glossary_are_in_order_and_each_once() -> None:
    words = re.findall(r"^\| ([^|]+?) \|", (DOCS / "glossary.md").read_text(), re.MULTILINE)[2:]
    assert words == sorted(words, key=str.lower)
    assert len(words) == len(set(words)) > 25


def test_a_link_that_leads_nowhere_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A title, here\n[a](page.md#a-title-here) [b](none.md) [c](#none) ![d](none.png)\n")
    assert [problem.split(": ")[1] for problem in broken(page)] == ["none.md", "#none", "none.png"]


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_each_page_is_found_from_the_first(page: Path) -> None:
    if page.name != "README.md":
        assert f"({page.name})" in (DOCS / "README.md").read_text()


def test_the_scaling_law_study_draws_nested_fractions(tiny_config: Path, tmp_path: Path) -> None:
    config = yaml.safe_load(tiny_config.read_text())
    config["train"] |= {"max_steps": 2, "global_batch": 16, "micro_batch": 16}
    (tmp_path / "short.yaml").write_text(yaml.safe_dump(config))
    (command,) = _blocks("scaling-law.md", "bash")
    _, script, *words = shlex.split(command)
    small = ("--episodes", "60", "--fractions", "0.3", "0.9", "--config", "short.yaml", "--ranks", "1")
    out = tmp_path / "study"
    said = run(PYTHON, ROOT / script, *words, "--out", "study", *small, cwd=tmp_path).stdout
    assert said.splitlines()[-1] == f"result: {out / 'scaling.png'}"
    points = json.loads((out / "points.json").read_text())
    assert points[0]["episodes"] < points[1]["episodes"]
    assert all(point["loss"] > 0 for point in points)
    with Image.open(out / "scaling.png") as picture:
        assert picture.size == (900, 600)
    # Nested, and what all are scored on nobody was trained on.
    few, many = (_episodes(out / name / "llava", "conversations") for name in ("0.3", "0.9"))
    assert few < many
    assert _episodes(out / "0.9/llava", "val").isdisjoint(few | many)
    another = (*small, "--mix", "bridge.yaml")
    refused = run(PYTHON, ROOT / script, *words, "--out", "study", *another, cwd=tmp_path, code=2).stderr
    assert "mix.yaml: an earlier study had another mix; choose another --out" in refused


def test_the_pages_study_is_the_recorded_one() -> None:
    found = json.loads((ROOT / "benchmarks/results/2026-11-21-scaling-law.json").read_text())["points"]
    first, last = found[0], found[-1]
    text = (
        f"falls from {first['loss']:.3f} with {first['episodes']:,} episodes to {last['loss']:.3f} with "
        f"{last['episodes']:,}"
    )
    assert text in (DOCS / "scaling-law.md").read_text()


def _episodes(llava: Path, part: str) -> set[str]:
    lines = [line for file in (llava / part).glob("*.jsonl") for line in file.read_text().splitlines()]
    return {json.loads(line)["id"].rpartition("/")[0] for line in lines}
