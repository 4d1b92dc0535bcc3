"""What a user meets: help, wrong input, and what a command must not load."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.conftest import OXE_MIX, PYTHON, ROOT, run

GOOD = "name: m\ndatasets:\n- {name: viola, version: 0.1.0, fraction: 0.5}\n"


def _one_line(*command: str | Path) -> str:
    """A command that must fail with exit 2, one `error:` line and no traceback; returns the line."""
    done = run(*command, code=2)
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line]
    assert len(lines) == 1, done.stderr
    return lines[0]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("viola", "voila", "datasets.0.name: no dataset called 'voila'; did you mean viola?"),
        ("0.5", "0", "datasets.0.fraction: 0 is not in (0, 1]"),
        ("0.5", "1.5", "datasets.0.fraction: 1.5 is not in (0, 1]"),
        ("fraction: 0.5", "fraction: 0.5, wait: 2", "datasets.0.wait: unknown key; did you mean weight?"),
    ],
)
def test_a_wrong_mix_is_one_line_and_exit_2(
    bucket: Path, tmp_path: Path, old: str, new: str, message: str
) -> None:
    (tmp_path / "mix.yaml").write_text(GOOD.replace(old, new, 1))
    where = ("--source", bucket, "--out", tmp_path / "data")
    said = _one_line(OXE_MIX, "download", "--mix", tmp_path / "mix.yaml", *where)
    assert said.startswith(f"error: {tmp_path / 'mix.yaml'}: {message}")
    assert not (tmp_path / "data").exists()


def test_what_is_not_there_is_one_line_and_exit_2(bucket: Path, data: Path, tmp_path: Path) -> None:
    mix = tmp_path / "mix.yaml"
    mix.write_text(GOOD)
    out = ("--out", tmp_path / "out")
    assert "no such file here or in mixtures/" in _one_line(OXE_MIX, "download", "--mix", "demmo.yaml", *out)
    said = _one_line(OXE_MIX, "download", "--mix", mix, "--source", tmp_path / "nowhere", *out)
    assert "viola 0.1.0: no dataset_info.json in" in said
    assert "is --source right?" in said
    assert "no such folder" in _one_line(OXE_MIX, "convert", "--data", tmp_path / "nowhere", *out)
    (tmp_path / "empty").mkdir()
    said = _one_line(OXE_MIX, "convert", "--mix", mix, "--data", tmp_path / "empty", *out)
    assert "holds none of the mix's datasets; missing: viola" in said
    assert "no NAME/VERSION/dataset_info.json" in _one_line(
        OXE_MIX, "convert", "--data", tmp_path / "empty", *out
    )
    mix.write_text(GOOD.replace("0.5}", "0.5, split: val}"))
    said = _one_line(OXE_MIX, "convert", "--mix", mix, "--data", data, *out)
    assert "no split 'val'; it has: train" in said
    assert "--to lava: unknown format" in _one_line(OXE_MIX, "convert", "--to", "lava", "--data", data, *out)
    said = _one_line(OXE_MIX, "convert", "--val-fraction", "1", "--data", data, *out)
    assert "--val-fraction 1 is not in [0, 1)" in said


def test_a_source_of_another_kind_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "mix.yaml").write_text(GOOD)
    command = (OXE_MIX, "download", "--mix", tmp_path / "mix.yaml", "--out", tmp_path / "data", "--source")
    assert "cannot be read (ValueError: Protocol not known: floppy)" in _one_line(*command, "floppy://a")


def test_help_names_the_commands_and_loads_nothing_heavy() -> None:
    assert "download" in run(OXE_MIX, "--help").stdout
    assert run(OXE_MIX, "--version").stdout.startswith("oxe-mix 0.")
    heavy = ("apache_beam", "torch", "transformers", "tensorflow", "tensorflow_datasets", "numpy", "pydantic")
    code = f"import sys, oxe_mix.cli; print([m for m in {heavy} if m in sys.modules])"
    assert run(PYTHON, "-c", code).stdout.strip() == "[]"


def test_no_stage_imports_tensorflow_or_compiles(
    bucket: Path, checkpoint: Path, llava: Path, tiny_config: Path, tmp_path: Path
) -> None:
    """Every stage, and its workers, beside a TensorFlow that refuses to be imported, without a compiler."""
    (tmp_path / "tensorflow").mkdir()
    (tmp_path / "tensorflow/__init__.py").write_text("raise AssertionError('TensorFlow was imported')")

    def refusing(*command: str | Path) -> None:
        environment = {
            "PATH": str(Path(PYTHON).parent),
            "PYTHONPATH": str(tmp_path),
            "TORCH_EXTENSIONS_DIR": str(tmp_path / "compiled"),
        }
        done = subprocess.run(
            list(map(str, command)), capture_output=True, text=True, env=environment, check=False
        )
        assert done.returncode == 0, done.stderr

    short = tmp_path / "short.yaml"
    short.write_text(tiny_config.read_text().replace("max_steps: 12", "max_steps: 1"))
    refused = subprocess.run(
        [PYTHON, "-c", "import tensorflow"],
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        check=False,
    )
    assert refused.returncode != 0  # the refusal works
    (tmp_path / "mix.yaml").write_text(GOOD)
    refusing(OXE_MIX, "synth", "--out", tmp_path / "bucket", "--episodes", "12")
    where = ("--mix", tmp_path / "mix.yaml", "--source", bucket, "--workers", "2")
    refusing(OXE_MIX, "download", *where, "--out", tmp_path / "data")
    refusing(OXE_MIX, "convert", "--data", tmp_path / "data", "--out", tmp_path / "llava", "--workers", "2")
    launch = (PYTHON, "-m", "train_llava.launch", "--config", short, "--llava", tmp_path / "llava")
    refusing(*launch, "--run", tmp_path / "run")
    # A compiler is not on every machine, and a rank killed while it builds would leave torch's lock behind.
    assert not (tmp_path / "compiled").exists()
    image = next((llava / "images/viola").rglob("*.jpg"))
    act = (ROOT / "inference_action.py", "--checkpoint", checkpoint, "--image", image)
    refusing(PYTHON, *act, "--instruction", "pick up the red block", "--unnorm-key", "viola")


def test_a_file_in_the_users_folder_does_not_stand_in_for_a_package(bucket: Path, tmp_path: Path) -> None:
    (tmp_path / "mix.yaml").write_text(GOOD)
    for name in ("proto", "grpc", "google"):
        (tmp_path / f"{name}.py").write_text("raise AssertionError('the wrong module')")
    where = ("--mix", "mix.yaml", "--source", bucket, "--out", "data", "--workers", "2")
    run(OXE_MIX, "download", *where, cwd=tmp_path)
    run(OXE_MIX, "convert", "--data", "data", "--out", "llava", "--workers", "2", cwd=tmp_path)


def test_a_worker_prints_nothing_of_its_own(bucket: Path, tmp_path: Path) -> None:
    (tmp_path / "mix.yaml").write_text(GOOD)
    where = ("--mix", tmp_path / "mix.yaml", "--source", bucket, "--out", tmp_path / "data", "--workers", "2")
    done = run(OXE_MIX, "download", *where)
    assert all(line.startswith("download: ") for line in done.stderr.splitlines()), done.stderr
