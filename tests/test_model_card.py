"""The model card of a run, made of real pieces: a converted folder's codec, manifest and cards, and a report
of scored bins.
"""

from __future__ import annotations

import json
import math
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from PIL import Image

from convert.action_codec import CODEC_FILE, NUM_BINS, ActionCodec, decode, read_codec
from convert.manifest import read_manifest
from oxe_mix.errors import UserError
from oxe_mix.files import write_json
from tests.conftest import PYTHON, ROOT
from train_llava.card_source import read_source
from train_llava.config import TinyModel, load_config
from train_llava.curves import draw_curves, smoothed
from train_llava.markdown import block, code, front_matter, items, plain, table
from train_llava.metrics import Scored, rows, score
from train_llava.model_card import card, write_card

MARKDOWN = MarkdownIt("commonmark").enable(["table", "strikethrough"])
STEPS = 40


def _scored(codec: ActionCodec) -> list[Scored]:
    rng, out = np.random.default_rng(0), []
    for name, stats in codec.datasets.items():
        target = rng.integers(NUM_BINS // 2, NUM_BINS, (6, codec.chunk, codec.action_dim))
        predicted, other = np.clip(target + rng.integers(-3, 4, target.shape), 128, 255), target[::-1]
        recorded = decode(target[:, 0], stats, codec.binning)[:, None]
        first = np.array([True] + 5 * [False])
        out.append(Scored(name, stats, stats, recorded, target, predicted, other, target[:, 0], first))
    return out


def _lines(report: dict[str, Any], shares: dict[str, float]) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    for step in range(1, STEPS + 1):
        rate = 1e-3 * (1 + math.cos(math.pi * step / STEPS)) / 2
        line: dict[str, Any] = {
            "step": step,
            "loss": 5 / step + 0.5,
            "grad_norm": 1.0,
            "samples_per_s": 100.0 + step,
        }
        line |= {"learning_rate": dict.fromkeys(("vision_tower", "projector", "language_model"), rate)}
        lines.append(line | {"data_wait_share": 0.01, "tokens_per_s": 1e4, "seconds": 2.0, "shares": shares})
        lines += [{"step": step, "evaluation": report}] if step % 10 == 0 else []
    return lines


@pytest.fixture(scope="module")
def finished(llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder as training leaves it, but for the weights."""
    run = tmp_path_factory.mktemp("card") / "run"
    run.mkdir()
    codec, config = read_codec(llava), load_config(ROOT / "train_llava/configs/tiny-cpu.yaml")
    shutil.copy(llava / CODEC_FILE, run)
    shutil.copy(llava / "manifest.json", run / "data_manifest.json")
    shutil.copytree(llava / "cards", run / "cards")
    (run / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    write_json(run / "versions.json", {"oxe-mix": "0.1.0", "torch": "2.13.0+cpu"})
    loss = {"model": 0.51, "shuffled_images": 1.93}
    held_out = score(codec.binning, _scored(codec)) | {"loss": loss}
    report = {"config": config.model_dump(mode="json"), "ranks": 2, "zero_stage": 2, "train_seconds": 4000.0}
    report |= {"steps": STEPS, "global_batch": 64, "samples": 746, "mean_loss": 1.25, "final_loss": 0.625}
    write_json(run / "evaluation.json", report | {"held_out": held_out})
    shares = {own.name: own.share for own in read_manifest(llava).datasets}
    lines = [json.dumps(line) + "\n" for line in _lines(held_out, shares)]
    (run / "metrics.jsonl").write_text("".join(lines))
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def _card(run: Path) -> str:
    """Without the picture, which takes the time."""
    return card(read_source(run))


def _head(text: str) -> dict[str, Any]:
    head: dict[str, Any] = yaml.safe_load(text.split("---\n")[1])
    return head


def _section(text: str, title: str) -> str:
    return text.split(f"\n## {title}\n")[1].partition("\n## ")[0]


def _tables(text: str) -> list[list[list[str]]]:
    """Each table's rows of cells as a reader sees them."""
    found: list[list[list[str]]] = []
    in_cell = False
    for token in MARKDOWN.parse(text):
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            found[-1].append([])
        elif in_cell:
            found[-1][-1].append("".join(child.content for child in token.children or []))
        in_cell = token.type in {"th_open", "td_open"}
    return found


def _edit(file: Path, **values: Any) -> None:
    write_json(file, json.loads(file.read_text()) | values)


def test_the_hub_can_read_its_head(run: Path, llava: Path) -> None:
    head = _head(_card(run))
    assert head == {
        "license": "other",
        "library_name": "transformers",
        "pipeline_tag": "robotics",
        "tags": ["vision-language-action", "robotics", "llava-onevision"],
        "datasets": list(read_codec(llava).datasets),
    }


@pytest.mark.parametrize(
    ("path", "base"),
    [("llava-hf/some-base", "llava-hf/some-base"), ("../models/base", None), ("/data/base", None)],
)
def test_a_base_is_named_to_the_hub_only_when_it_is_of_the_hub(
    run: Path, path: str, base: str | None
) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"] |= {"tiny": None, "path": path}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    text = _card(run)
    assert _head(text).get("base_model") == base
    assert f"started from `{path}`" in text
    assert "licence of the weights that training started from is not recorded here" in text


def test_a_folder_that_looks_like_a_hub_id_is_none(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"] |= {"tiny": None, "path": "models/base"}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.chdir(run.parent)
    assert _head(_card(run))["base_model"] == "models/base"
    (run.parent / "models/base").mkdir(parents=True)
    assert "base_model" not in _head(_card(run))


def test_the_figures_are_the_reports(run: Path) -> None:
    report = json.loads((run / "evaluation.json").read_text())["held_out"]
    overall, datasets, dimensions = _tables(_section(_card(run), "Figures on held-out episodes"))
    assert [tuple(row) for row in overall[1:]] == rows(report)
    assert overall[0] == [
        "policy",
        "L1",
        "of mean's",
        "exact bin",
        "within 1",
        "within 5",
        "gripper F1",
        "loss",
    ]
    viola = report["datasets"]["viola"]
    shown = dict(zip(datasets[0], next(row for row in datasets if row[0] == "viola"), strict=True))
    assert shown["L1"] == f"{viola['l1']['model']:.3f}"
    assert shown["within 5"] == f"{viola['accuracy']['model']['within_5']:.1%}"
    assert shown["F1 open"] == f"{viola['gripper_f1']['model']['open']:.2f}"
    assert dimensions[0][2:] == ["x", "y", "z", "rotation 1", "rotation 2", "rotation 3", "gripper"]
    mean = next(row for row in dimensions if row[:2] == ["viola", "mean action"])
    units = viola["l1_robot_units"]["mean_action"]
    assert mean[2:] == [f"{v:.3g}" if a in viola["moving"] else "—" for a, v in enumerate(units)]
    assert "—" in mean  # the synthetic robots do not turn


def test_training_is_told_with_its_arithmetic(run: Path) -> None:
    text = _section(_card(run), "Training")
    assert "40 of 64 samples, 2,560 drawn: 3.43 epochs of 746" in text
    assert "64 (train.global_batch) = 32 (train.micro_batch) x 1 (worked out) x 2 ranks" in text
    assert "vision tower 0.0015, projector 0.0015, language model 0.0015" in text
    assert "2 ranks, DeepSpeed ZeRO stage 2" in text
    assert "1.2500 on average, 0.6250 at the end" in text
    assert "**Time:** 67 min of training\n" in text
    _edit(run / "evaluation.json", train_seconds=60)
    assert "**Time:** 80 s of training, 60 s of it since the last start\n" in _section(_card(run), "Training")
    assert "120.5 samples/s, 1.0% of the time waiting" in text
    assert "![Curves of the run](curves.png)" in text


def test_the_data_is_the_manifests(run: Path, llava: Path) -> None:
    own = next(own for own in read_manifest(llava).datasets if own.name == "bridge_orig")
    text = _section(_card(run), "Data")
    header, *lines = _tables(text)[0]
    shown = dict(zip(header, next(line for line in lines if line[0] == "bridge_orig"), strict=True))
    assert shown["trained on"] == f"{own.steps.written:,}"
    assert shown["held out"] == f"{own.steps.held_out:,}"
    assert shown["asked"] == shown["drawn"] == f"{own.share:.1%}"
    assert f"`bridge_orig`: steps: `recipe` {own.steps.dropped['recipe']} of {own.steps.total}" in text
    hashes = dict(_tables(_section(_card(run), "Versions and hashes"))[1])
    sums = subprocess.run(
        ["sha256sum", "data_manifest.json", CODEC_FILE], cwd=run, capture_output=True, text=True, check=True
    )
    for line in sums.stdout.splitlines():
        digest, name = line.split()
        assert hashes[name] == digest


def test_what_an_action_means_is_the_cards(run: Path) -> None:
    header, *lines = _tables(_section(_card(run), "What it is"))[0]
    by_key = {line[0]: dict(zip(header, line, strict=True)) for line in lines}
    bridge = by_key["bridge_orig"]
    assert bridge["robot"] == "WidowX"
    assert (bridge["control rate"], bridge["encoding"], bridge["movements"]) == ("5 Hz", "EEF_POS", "delta")
    assert bridge["gripper"] == "0 closed to 1 open"
    assert by_key["language_table"]["gripper"] == "always 1"
    licences = dict(_tables(_section(_card(run), "Licences"))[0])
    assert licences["viola"].startswith("unknown (")


def test_same_files_same_bytes(run: Path, finished: Path, tmp_path: Path) -> None:
    elsewhere = Path(shutil.copytree(finished, tmp_path / "elsewhere"))
    for folder in (run, run, elsewhere):
        write_card(folder)
        assert (folder / "README.md").read_bytes() == (run / "README.md").read_bytes()
        assert (folder / "curves.png").read_bytes() == (run / "curves.png").read_bytes()
    assert str(tmp_path) not in (run / "README.md").read_text()


def test_the_picture_is_what_it_says_and_changes_with_the_run(run: Path, tmp_path: Path) -> None:
    write_card(run)
    with Image.open(run / "curves.png") as picture:
        assert picture.size == (1200, 800)
        assert "Software" not in picture.info
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    draw_curves([line for line in lines if "loss" in line], tmp_path / "unscored.png")
    draw_curves([line for line in lines if line["step"] == 1], tmp_path / "one.png")
    pictures = {file.read_bytes() for file in (run / "curves.png", *tmp_path.glob("*.png"))}
    assert len(pictures) == 3


def test_smoothing_is_not_late() -> None:
    assert smoothed(np.arange(500.0)) == pytest.approx(np.arange(500))
    rough = smoothed(np.random.default_rng(0).normal(size=500))
    assert np.abs(rough[10:-10]).max() < 1


def test_the_drawing_library_is_loaded_only_to_draw() -> None:
    loads = "import sys, train_llava.curves; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([PYTHON, "-c", loads], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize(
    ("file", "section"),
    [
        ("evaluation.json", "Figures on held-out episodes"),
        ("metrics.jsonl", "Training"),
        ("config.yaml", "What it is"),
        ("versions.json", "Versions and hashes"),
        ("action_codec.json", "How to act with it"),
        ("data_manifest.json", "Data"),
        ("cards", "Licences"),
    ],
)
def test_a_file_that_is_missing_is_said_to_be(run: Path, file: str, section: str) -> None:
    whole = _card(run)
    (run / file).rename(run / ".away")
    write_card(run)
    without = (run / "README.md").read_text()
    sentence = f"There is no `{file}{'/' if file == 'cards' else ''}` in this folder"
    assert sentence in _section(without, section)
    assert re.findall(r"^## .*", without, re.M) == re.findall(r"^## .*", whole, re.M)
    assert (run / "curves.png").exists() == ("](curves.png)" in without) == (file != "metrics.jsonl")


def test_an_empty_folder_has_a_card_that_says_what_is_missing(tmp_path: Path) -> None:
    text = _card(tmp_path)
    for file in ("evaluation.json", "metrics.jsonl", "config.yaml", "versions.json", "action_codec.json"):
        assert f"There is no `{file}`" in text
    with pytest.raises(UserError, match="no such folder"):
        write_card(tmp_path / "none")


def test_a_run_without_held_out_episodes_says_so(run: Path) -> None:
    _edit(run / "evaluation.json", held_out=None)
    text = _card(run)
    assert "The data holds no held-out episodes, so the model was not scored." in text
    assert "recorded frames" not in _section(text, "Limits")


def test_a_broken_file_is_named(run: Path) -> None:
    (run / "evaluation.json").write_text("{")
    with pytest.raises(UserError, match=r"evaluation\.json: not valid JSON"):
        write_card(run)


def _one_line(text: str) -> str:
    """What a reader sees of a text that fits into a line."""
    words = ("".join(filter(str.isprintable, word)) for word in text.split())
    return " ".join(word for word in words if word)


NASTY = "| # <b>x</b> `a` *b* _c_ [d](e) ![f](g) \\ --- $h$ ~~i~~ &lt; ```\n\n## j\n- k: {l}\u202em"


def test_foreign_text_breaks_neither_tables_nor_head(run: Path) -> None:
    clean = MARKDOWN.parse(_card(run).split("---\n", 2)[2])
    file = run / "cards/viola.yaml"
    changed = yaml.safe_load(file.read_text()) | {"robot": NASTY, "license": NASTY, "notes": [NASTY]}
    away = run.parent / "other"
    shutil.copytree(run, away)
    (away / "cards/viola.yaml").write_text(yaml.safe_dump(changed))
    manifest = json.loads((away / "data_manifest.json").read_text())
    manifest["datasets"][0]["instructions"]["most_repeated"] = {NASTY: 1}
    manifest["datasets"][0]["steps"]["dropped"] = {NASTY: 86}
    manifest |= {"mix": NASTY}
    write_json(away / "data_manifest.json", manifest)
    write_json(away / "versions.json", {NASTY: NASTY})
    text = _card(away)
    tokens = MARKDOWN.parse(text.split("---\n", 2)[2])

    def headings(tokens: list[Any]) -> list[str]:
        return [tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "heading_open"]

    assert headings(tokens) == headings(clean)
    inline = [child for token in tokens for child in token.children or []]
    assert not [token for token in (*tokens, *inline) if "html" in token.type]
    assert [child.attrs["src"] for child in inline if child.type == "image"] == ["curves.png"]
    assert not [child for child in inline if child.type in {"em_open", "link_open", "s_open"}]
    said = _one_line(NASTY)
    assert dict(_tables(_section(text, "Licences"))[0])["viola"] == said
    assert _tables(_section(text, "Versions and hashes"))[0][1] == [said, said]
    assert {len(row) for row in _tables(_section(text, "What it is"))[0]} == {8}
    command = shlex.split(re.findall(r"```bash\n(.*)\n```", text)[0])
    assert command[command.index("--instruction") + 1].startswith("| # <b>x</b> `a` *b*")


WORDS = st.text(st.characters(codec="utf-8") | st.sampled_from("`*_[]()<>!#&~|\\-+=: 1.ab\n"), max_size=30)


@settings(max_examples=300, deadline=None)
@given(WORDS, WORDS)
def test_any_text_reads_as_it_is(text: str, other: str) -> None:
    def shown(value: str) -> str:
        return _one_line(value) or "(empty)"

    # Before a pipe a backslash reads differently from one Markdown to the next.
    text, other = text.replace("\\|", "|"), other.replace("\\|", "|")
    cells = _tables(table(("a", "b"), [(plain(text), code(other))]))[0][1]
    assert [shown(cell) for cell in cells] == [shown(text), shown(other)]
    tokens = MARKDOWN.parse(items([plain(text)]))
    assert [token.type for token in tokens if token.type == "inline"] == ["inline"]
    assert [token.type for token in tokens][:3] == ["bullet_list_open", "list_item_open", "paragraph_open"]
    body = front_matter({"a": text, "b": [other]})
    assert yaml.safe_load(body.removeprefix("---\n").removesuffix("---")) == {"a": text, "b": [other]}


def test_code_in_a_block_stays_there() -> None:
    assert MARKDOWN.parse(block("bash", ["echo '```'"]))[0].content == "echo '```'\n"


def _config(run: Path, **model: Any) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"] |= model
    (run / "config.yaml").write_text(yaml.safe_dump(config))


def test_adapters_are_exported_before_stock_classes_load_them(run: Path) -> None:
    lora = {"rank": 32, "alpha": 64.0, "dropout": 0.0, "quantize": "nf4"}
    _config(run, tiny=None, path="llava-hf/base", lora=lora)
    (run / "adapter_config.json").write_text("{}")
    text = _card(run)
    assert "LoRA of rank 32, alpha 64, over a language model frozen in 4 bits (nf4)" in text
    assert "oxe-mix export --checkpoint RUN --out MERGED" in text
    assert 'from_pretrained("MERGED")' in text
    assert 'from_pretrained("RUN")' not in text


def test_of_several_cameras_each_is_named_and_the_state_is_given(run: Path) -> None:
    codec = json.loads((run / CODEC_FILE).read_text())
    states = {name: own | {"mean": [0.25, *own["mean"][1:]]} for name, own in codec["datasets"].items()}
    asking = codec["asking"] | {"cameras": ["primary", "wrist"], "state": True}
    _edit(run / CODEC_FILE, asking=asking, states=states)
    text = _card(run)
    assert "--image primary=primary.jpg --image wrist=wrist.jpg --state '0.25 " in text


def test_what_it_says_to_type_works(
    run: Path, llava: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    import inference_action
    from train_llava.action_tokens import add_action_tokens
    from train_llava.loading import save_checkpoint
    from train_llava.tiny import build_tiny

    torch.manual_seed(0)
    model, processor = build_tiny(TinyModel(hidden_size=32, text_layers=1, vision_layers=1), ["user"])
    add_action_tokens(model, processor.tokenizer)
    save_checkpoint(run, model, processor)
    text = (
        _card(run)
        .replace("RUN", str(run))
        .replace("camera.jpg", str(next((llava / "images").rglob("*.jpg"))))
    )
    command = shlex.split(re.findall(r"```bash\n(.*)\n```", text)[0])
    assert command[0] == "python"
    monkeypatch.setattr(sys, "argv", command[1:])
    with pytest.raises(SystemExit, match="0"):
        inference_action.main()
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["unnorm_key"] == next(
        iter(read_codec(llava).datasets)
    )
    (lines,) = re.findall(r"```python\n(.*?)\n```", text, re.S)
    assert len(lines.splitlines()) == 3
    loaded: dict[str, Any] = {}
    exec(lines, loaded)
    assert type(loaded["model"]).__name__ == "LlavaOnevisionForConditionalGeneration"
    assert torch.equal(loaded["model"].lm_head.weight, model.lm_head.weight)
    assert loaded["tokenizer"].convert_tokens_to_ids("<ACTION_255>") is not None
