"""`oxe-mix export`: what comes out is the run's model, whole, as transformers' own classes read it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlavaOnevisionForConditionalGeneration

from convert.action_codec import ActionCodec, write_codec
from convert.statistics import action_stats
from oxe_mix.errors import UserError
from tests.conftest import OXE_MIX, run
from tests.test_lora import LORA, adapted, batch, logits_of, needs_bitsandbytes, train, write_base
from train_llava import export
from train_llava.action_tokens import prove_action_tokens
from train_llava.config import LoraConfig
from train_llava.decode import ActionDecoder
from train_llava.export import run_export
from train_llava.loading import load_checkpoint, save_checkpoint
from train_llava.lora import load_adapter_run, save_adapter
from train_llava.model import OneViewLlava

pytest.importorskip("peft", reason="peft is in the extra `lora`")

STATS = action_stats(
    np.random.default_rng(0).normal(size=(50, 7)).astype(np.float32), (True,) * 6 + (False,), 1
)
CODEC = ActionCodec(action_dim=7, datasets={"viola": STATS})


def write_run(folder: Path, *, tied: bool, steps: int = 20, dtype: torch.dtype = torch.float32) -> Path:
    """A run beside its base, with what a trainer leaves."""
    base = write_base(folder / "base", tied=tied)
    if dtype != torch.float32:
        loaded: Any = OneViewLlava.from_pretrained(base, dtype=dtype)
        save_checkpoint(base, loaded, load_checkpoint(base)[1])
    model, processor = adapted(base)
    if steps:
        train(model, processor, steps)
    out = folder / "run"
    save_adapter(out, model, processor)
    write_codec(out, CODEC)
    (out / "cards").mkdir()
    (out / "cards/viola.yaml").write_text("name: viola\n")
    for name in ("config.yaml", "evaluation.json", "data_manifest.json"):
        (out / name).write_text(f"{name} of the run\n")
    return out


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("export"), tied=request.param)


def _is_tied(checkpoint: Path) -> bool:
    adapters = json.loads((checkpoint / "adapter_config.json").read_text())
    return "lm_head" not in adapters["trainable_token_indices"]


@pytest.mark.parametrize("trained", [True], indirect=True, ids=["tied"])
def test_the_command_says_what_was_asked_and_done_and_what_comes_next(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    said = run(OXE_MIX, "export", "--checkpoint", trained, "--out", out).stdout.splitlines()
    base = trained.parent / "base"
    assert said[0] == f"asked: {trained} merged into {base}, weights in fp32"
    assert said[1].startswith("done: 14 of 14 linear layers changed, 256 rows of embedding and head; read ag")
    assert said[1].endswith("(limit 1e-04), same action token at 8 of 8 positions")
    assert said[2].startswith(f"result: {out} (")
    assert said[3] == (f"next: python inference_action.py --checkpoint {out} --image IMG --instruction TEXT")
    assert len(said) == 4


def test_what_comes_out_is_a_whole_model_that_the_stock_classes_load(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    assert run_export(trained, out) == 0
    loaded: Any = LlavaOnevisionForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    stock, report = loaded
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert (stock.lm_head.weight is stock.get_input_embeddings().weight) == _is_tied(trained)
    prove_action_tokens(AutoTokenizer.from_pretrained(out))
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == ["LlavaOnevisionForConditionalGeneration"]
    names = {str(file.relative_to(out)) for file in out.rglob("*") if file.is_file()}
    kept = {"action_codec.json", "data_manifest.json", "cards/viola.yaml", "config.yaml"}
    assert kept | {"evaluation.json", "config.json", "model.safetensors", "processor_config.json"} <= names
    assert not any("adapter" in name or name.startswith(".") for name in names)
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_merged_and_adapters_act_alike_and_the_base_does_not(trained: Path, tmp_path: Path) -> None:
    assert run_export(trained, tmp_path / "merged") == 0
    model, processor = load_adapter_run(trained, torch.float32)
    merged, again = load_checkpoint(tmp_path / "merged")
    base, _ = load_checkpoint(trained.parent / "base")
    expected = logits_of(model, processor)
    assert torch.allclose(logits_of(merged, again), expected, atol=1e-4)
    for name, weight in base.state_dict().items():
        touched = "language_model.layers" in name and "_proj.weight" in name
        now = merged.state_dict()[name][: len(weight)] if weight.dim() else merged.state_dict()[name]
        assert torch.equal(now, weight) != touched, name
    frame = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    from PIL import Image

    asked = "<image>\nWhat action should the robot take to pick up the red block?"
    views = [processor.view(Image.fromarray(frame))]
    both = [ActionDecoder(m, processor, CODEC).predict([asked], views, ["viola"]) for m in (model, merged)]
    assert (both[0].bins == both[1].bins).all()


def test_weights_are_merged_in_fp32_and_rounded_once(trained: Path, tmp_path: Path) -> None:
    assert run_export(trained, tmp_path / "fp32") == 0
    assert run_export(trained, tmp_path / "bf16", "bf16") == 0
    exact, rounded = (load_file(tmp_path / name / "model.safetensors") for name in ("fp32", "bf16"))
    assert {weight.dtype for weight in rounded.values()} == {torch.bfloat16}
    assert all(torch.equal(exact[name].to(torch.bfloat16), weight) for name, weight in rounded.items())
    assert json.loads((tmp_path / "bf16/config.json").read_text())["dtype"] == "bfloat16"


def test_the_dtype_is_that_of_the_bases_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = write_run(tmp_path, tied=True, dtype=torch.bfloat16)
    assert run_export(checkpoint, tmp_path / "merged") == 0
    assert "weights in bf16" in capsys.readouterr().out
    weights = load_file(tmp_path / "merged/model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}


def test_a_projector_that_was_trained_beside_is_in_the_result(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", tied=False)
    model, processor = adapted(base)
    model.model.multi_modal_projector.requires_grad_(True)
    train(model, processor)
    write_codec(tmp_path / "run", CODEC)
    save_adapter(tmp_path / "run", model, processor)
    assert run_export(tmp_path / "run", tmp_path / "merged") == 0
    merged, again = load_checkpoint(tmp_path / "merged")
    assert torch.allclose(logits_of(merged, again), logits_of(model, processor), atol=1e-4)


def test_adapters_that_change_nothing_are_refused(tmp_path: Path) -> None:
    checkpoint = write_run(tmp_path, tied=False, steps=0)
    with pytest.raises(UserError, match="run: the adapters change nothing in fp32; was the run trained at"):
        run_export(checkpoint, tmp_path / "merged")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "run"}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_result_that_acts_otherwise_gets_no_name(
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    dtype: str,
) -> None:
    def save_another(folder: Path, model: OneViewLlava, processor: Any) -> None:
        with torch.no_grad():
            model.model.language_model.layers[0].self_attn.o_proj.weight *= 1.5
        save_checkpoint(folder, model, processor)

    monkeypatch.setattr(export, "save_checkpoint", save_another)
    assert run_export(trained, tmp_path / "merged", dtype) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: the merged model's logits differ from the adapters' by ")
    assert said.endswith("nothing was written" + ("; try --dtype fp32\n" if dtype == "bf16" else "\n"))
    assert not list(tmp_path.iterdir())


def test_another_best_token_counts_unless_it_is_a_tie(trained: Path) -> None:
    probe = export._Probe(load_adapter_run(trained, torch.float32)[1])
    expected = torch.zeros(8, probe._action_ids[-1] + 1)
    expected[:, probe._action_ids[3]] = 1.0
    got = expected.clone()
    assert probe.compare(expected, got) == export.Agreement(0.0, 8, 8, 0)
    expected[0, probe._action_ids[4]], got[0, probe._action_ids[4]] = 1 - 1e-3, 1 + 1e-3  # a tie
    got[1, probe._action_ids[5]] = 1.5
    agreement = probe.compare(expected, got)
    assert (agreement.difference, agreement.same_token, agreement.apart) == (1.5, 6, 1)
    with pytest.raises(export._NotTheSameError, match=r"differ from the adapters' by 1\.5e"):
        export._require(agreement, "bf16")
    with pytest.raises(export._NotTheSameError, match="prefers other action tokens at 1 of 8 positions"):
        export._require(export.Agreement(1e-6, 8, 7, 1), "fp32")


def test_a_killed_exports_remains_are_swept(trained: Path, tmp_path: Path) -> None:
    (tmp_path / ".merged.exporting/cards").mkdir(parents=True)
    (tmp_path / ".merged.exporting/junk.safetensors").write_text("half")
    (tmp_path / "merged").mkdir()  # an empty folder is as good as none
    assert run_export(trained, tmp_path / "merged") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]
    assert not (tmp_path / "merged/junk.safetensors").exists()


def test_what_cannot_be_exported_is_refused_in_one_line(trained: Path, tmp_path: Path) -> None:
    def refused(checkpoint: Path, out: Path = tmp_path / "merged", dtype: str | None = None) -> str:
        with pytest.raises(UserError) as error:
            run_export(checkpoint, out, dtype)
        assert "\n" not in str(error.value)
        return str(error.value)

    base = trained.parent / "base"
    assert refused(base).startswith(f"{base}: is a whole model already; copy it: cp -r {base} {tmp_path}")
    assert refused(tmp_path / "none").endswith(
        "none: no adapters here; give the folder that training with LoRA wrote"
    )
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    assert refused(trained, tmp_path / "full").endswith(
        "is there already; choose a new folder, or an empty one"
    )
    assert refused(trained, tmp_path / "merged", "fp16") == "--dtype fp16: expected bf16 or fp32"
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run/action_codec.json").unlink()
    assert "action_codec.json: no such file" in refused(tmp_path / "run")
    shutil.copy(trained / "action_codec.json", tmp_path / "run")
    about = tmp_path / "run/adapter_config.json"
    about.write_text(about.read_text().replace(str(base), "/nowhere/base"))
    assert "adapters without their base, /nowhere/base: no such folder" in refused(tmp_path / "run")
    assert {path.name for path in tmp_path.iterdir()} == {"full", "run"}


def test_the_command_says_what_is_wrong_and_exits_2(tmp_path: Path) -> None:
    done = run(OXE_MIX, "export", "--checkpoint", tmp_path, "--out", tmp_path / "merged", code=2)
    assert (
        done.stderr == f"error: {tmp_path}: no adapters here; give the folder that training with LoRA wrote\n"
    )
    assert not done.stdout


def _as_nf4(checkpoint: Path, out: Path) -> Path:
    """A run that says that it was trained in 4 bits."""
    shutil.copytree(checkpoint, out)
    record = json.loads((out / "base.json").read_text())
    (out / "base.json").write_text(json.dumps(record | {"quantize": "nf4"}))
    return out


def test_a_run_in_nf4_is_merged_into_the_base_as_it_is(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(export, "find_spec", lambda _: None)
    checkpoint = _as_nf4(trained, tmp_path / "run")
    assert run_export(checkpoint, tmp_path / "merged") == 0
    said = capsys.readouterr().out
    assert (
        "note: trained over the base in nf4, merged into the base as it is: not the same model; by how"
        in said
    )
    assert run_export(trained, tmp_path / "other") == 0
    assert "note: " not in capsys.readouterr().out
    both = [load_file(tmp_path / name / "model.safetensors") for name in ("merged", "other")]
    assert all(torch.equal(both[0][name], both[1][name]) for name in both[1])


@needs_bitsandbytes
def test_the_difference_to_a_run_in_nf4_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Below 64 columns, its block, bitsandbytes is four times as coarse on a CPU.
    base = write_base(tmp_path / "base", tied=False, hidden=64)
    model, processor = adapted(base, LoraConfig(rank=LORA.rank, alpha=LORA.alpha, quantize="nf4"))
    assert model.is_quantized
    losses = train(model, processor)
    assert losses[-1] < losses[0] / 3
    write_codec(tmp_path / "run", CODEC)
    save_adapter(tmp_path / "run", model, processor)
    loaded, again = load_adapter_run(tmp_path / "run", torch.float32)
    assert torch.equal(logits_of(model, processor), logits_of(loaded, again))
    assert run_export(tmp_path / "run", tmp_path / "merged") == 0
    said = capsys.readouterr().out
    assert "not the same model; logits differ by " in said
    merged, _ = load_checkpoint(tmp_path / "merged")
    ids, pixels, at = batch(processor)
    with torch.no_grad():
        both = [m.eval()(ids, pixels, logits_at=at).logits for m in (model, merged)]
    assert 1e-3 < (both[0] - both[1]).abs().max() / both[0].abs().max() < 0.5
