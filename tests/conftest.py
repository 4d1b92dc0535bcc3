"""Fixtures: a small bucket, its download, its conversion and a briefly trained checkpoint, each made once."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from oxe_mix.cards import Cards, load_cards
from tests.report_pages import Page, report

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"
PYTHON = sys.executable
OXE_MIX = str(Path(sys.executable).parent / "oxe-mix")
DATASETS = (
    "bridge_orig",
    "fractal20220817_data",
    "viola",
    "kuka",
    "language_table",
    "iamlab_cmu_pickup_insert_converted_externally_to_rlds",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--rewrite-golden", action="store_true", help="rewrite tests/golden/ from what comes out"
    )


def run(*command: str | Path, code: int = 0, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run a command as a user would; its exit code is part of what is tested."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=cwd, check=False)
    assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="session")
def cards() -> Cards:
    return load_cards()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of facts and real episodes that stands beside some checkouts."""
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is not there: facts and real episodes are not part of the repository")
    return SHARED


@pytest.fixture(scope="session")
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 training episodes of six datasets."""
    out = tmp_path_factory.mktemp("bucket") / "bucket"
    run(OXE_MIX, "synth", "--out", out, "--episodes", "120", "--seed", "7")
    return out


@pytest.fixture(scope="session")
def bucket26(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default mix's 26 datasets in their true trees, 32 episodes in 16 shards each."""
    out = tmp_path_factory.mktemp("bucket26") / "bucket"
    size = ("--episodes", "32", "--shards", "16")
    run(OXE_MIX, "synth", "--mix", "default.yaml", "--out", out, *size, "--seed", "3")
    return out


@pytest.fixture(scope="session")
def data(bucket: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo mix, downloaded from the bucket."""
    out = tmp_path_factory.mktemp("data") / "data"
    run(OXE_MIX, "download", "--mix", "demo.yaml", "--source", bucket, "--out", out)
    return out


@pytest.fixture(scope="session")
def llava(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The download, converted, with a tenth of the episodes held out."""
    out = tmp_path_factory.mktemp("llava") / "llava"
    run(OXE_MIX, "convert", "--to", "llava", "--data", data, "--out", out, "--val-fraction", "0.1")
    return out


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's config with a few steps instead of many."""
    config = yaml.safe_load((ROOT / "train_llava/configs/tiny-cpu.yaml").read_text())
    config["train"]["max_steps"] = 12
    config |= {"logging": {"every": 1}, "checkpoints": {"every": 5}}
    file = tmp_path_factory.mktemp("config") / "tiny.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


@pytest.fixture(scope="session")
def checkpoint(llava: Path, tiny_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve steps under DeepSpeed ZeRO-2 on two ranks, by the command a user types."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    run("make", "train", f"CONFIG={tiny_config}", "NPROC=2", f"LLAVA={llava}", f"RUN={out}")
    return out


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """A tiny model waits for its threads longer than it computes."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def of_llava(llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Page:
    """The report of the converted folder."""
    return report(llava, tmp_path_factory.mktemp("report") / "llava.html")


@pytest.fixture(scope="session")
def of_data(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Page:
    """The report of the download."""
    return report(data, tmp_path_factory.mktemp("report") / "data.html")
