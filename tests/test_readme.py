"""Every command that the README shows, run as it stands; the demo; and what setting up twice costs."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from oxe_mix.cards import load_cards
from oxe_mix.mix import load_mix
from oxe_mix.mix_check import check_mix
from tests.conftest import OXE_MIX, PYTHON, ROOT, run

README = (ROOT / "README.md").read_text()


def _commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


def test_the_readme_shows_only_commands_that_are_run_here() -> None:
    shown = [shlex.split(command)[:2] for command in _commands()]
    assert shown == [
        ["make", "demo"],  # below, and whole by hand: benchmarks/results
        ["make", "test"],  # this
        ["oxe-mix", "download"],
        ["oxe-mix", "convert"],
        ["make", "train"],
        ["python", "inference_action.py"],
        ["oxe-mix", "datasets"],
        ["oxe-mix", "datasets"],
        ["oxe-mix", "mix"],
        ["oxe-mix", "download"],
        ["oxe-mix", "download"],
        ["oxe-mix", "verify"],
        ["oxe-mix", "convert"],
        ["oxe-mix", "check"],
        ["oxe-mix", "doctor"],
        ["oxe-mix", "doctor"],
        ["oxe-mix", "report"],
        ["make", "train"],
        ["oxe-mix", "eval"],
        ["oxe-mix", "act"],
        ["oxe-mix", "replay"],
        ["oxe-mix", "convert"],
    ]


@pytest.fixture(scope="module")
def workplace(tiny_config: Path, llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a fresh clone, but with few training steps, a camera picture and a robot of one's own."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("Makefile", "envs", ".venv", "pyproject.toml", "inference_action.py", "mixtures"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "train_llava/configs").mkdir(parents=True)
    shutil.copy(tiny_config, folder / "train_llava/configs/tiny-cpu.yaml")
    pictures = sorted((llava / "images/viola").rglob("*.jpg"))
    shutil.copy(pictures[0], folder / "camera.jpg")
    (folder / "frames").mkdir()
    for picture in pictures[:2]:
        shutil.copy(picture, folder / "frames")
    return folder


def _run_shown(command: str, folder: Path, *more: str) -> str:
    """Run a line of the README in a folder; the commands are those of the project's environment."""
    environment = {
        **os.environ,
        "PATH": f"{Path(PYTHON).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    words = [*shlex.split(command), *more]
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_commands_run_as_they_stand_on_a_bucket_of_our_own(workplace: Path, bucket26: Path) -> None:
    _, _, download, convert, train, act, list_all, show, check, dry_run, *others = _commands()
    with_budget, verify, to_tars, check_tars, *looking, check_only, score, act_on_all, replay, _ = others
    machine, examine, look = looking
    assert "66 datasets" in _run_shown(list_all, workplace)
    assert "filter_success" in _run_shown(show, workplace)
    assert "fmb" in _run_shown(check, workplace)
    assert "still to fetch" in _run_shown(dry_run, workplace, "--source", str(bucket26))
    assert not (workplace / "data").exists()
    _run_shown(download, workplace, "--source", str(bucket26))
    # The budget is larger than this bucket, so there is nothing left to do.
    assert "nothing to do" in _run_shown(with_budget, workplace, "--source", str(bucket26))
    assert "0 problems" in _run_shown(verify, workplace)
    assert _run_shown(to_tars, workplace).count("(3.8%)") == 26  # of the weight, each
    assert "0 problems" in _run_shown(check_tars, workplace)
    _run_shown(convert, workplace)
    assert "torch" in _run_shown(machine, workplace)
    assert "kuka" in _run_shown(examine, workplace)
    assert "llava/report.html" in _run_shown(look, workplace)
    _run_shown(train, workplace)
    assert "checked; nothing was trained" in _run_shown(check_only, workplace)
    assert "result: runs/first/eval-llava.json" in _run_shown(score, workplace)
    assert "2 answers" in _run_shown(act_on_all, workplace)
    assert "oxe-mix serve --checkpoint runs/first for a robot" in _run_shown(replay, workplace)
    record = json.loads(_run_shown(act, workplace))
    assert record["unnorm_key"] == "bridge_orig"
    assert len(record["actions"][0]) == 7


def test_the_readmes_own_robot_converts(workplace: Path, bucket: Path) -> None:
    """Its card, on data in a layout to match: bridge_orig's, whose first camera it calls image."""
    card = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)[0])
    target = workplace / "my_data/my_robot/1.0.0"
    target.mkdir(parents=True)
    (workplace / "my_cards").mkdir()
    for file in (bucket / "bridge_dataset/1.0.0").iterdir():
        if "-val" not in file.name:
            shutil.copy(file, target / file.name)
    card["cameras"] = {"primary": "image_0"}
    (workplace / "my_cards/my_robot.yaml").write_text(yaml.safe_dump(card))
    said = _run_shown(_commands()[-1], workplace)
    assert "my_robot" in said
    assert (workplace / "my_llava/manifest.json").exists()


def test_the_demo_runs_all_stages_and_ends_with_its_table(tiny_config: Path, tmp_path: Path) -> None:
    options = ("--episodes", "60", "--config", tiny_config, "--out", tmp_path / "demo")
    said = run(PYTHON, "-m", "train_llava.demo", *options).stdout
    shown = re.findall(r"^\$ (\S+ \S+)", said, re.MULTILINE)
    assert shown == [
        "oxe-mix synth",
        "oxe-mix download",
        "oxe-mix convert",
        "make train",
        "python inference_action.py",
    ]
    table = said[said.index("the whole line") :]
    for row in (
        "steps in = ",
        "frames copied",
        "training loss",
        "mean action",
        "repeat last",
        "predicted action",
    ):
        assert row in table
    total, parts = re.findall(r"steps in = written \+ held out \+ dropped\s+([\d,]+) = ([\d, +]+)", table)[0]
    assert int(total.replace(",", "")) == sum(int(part.replace(",", "")) for part in parts.split(" + "))
    look = re.findall(r"^next: oxe-mix (report .*?) --open to look at it", table, re.MULTILINE)[0]
    assert "report.html" in run(OXE_MIX, *look.split()).stdout


def test_setting_up_again_does_nothing() -> None:
    ready = ROOT / ".venv/.ready"
    if not ready.exists():
        pytest.skip("this environment was not made by make setup")
    before = ready.stat().st_mtime_ns
    processes = [
        subprocess.Popen(
            ["make", "--no-print-directory", "setup"], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    assert [process.communicate()[0] for process in processes] == ["", ""]
    assert [process.returncode for process in processes] == [0, 0]
    assert ready.stat().st_mtime_ns == before


def test_what_the_readme_says_of_the_default_mix_is_what_the_cards_come_to() -> None:
    cards = load_cards()
    mix = load_mix(Path("default.yaml"), cards)
    sizes = [share.gib for share in check_mix(mix, cards, Path("default.yaml")).shares]
    known = [size for size in sizes if size is not None]
    assert (
        f"the 26 datasets and fractions of the system that this one replaces, {sum(known):.0f} GiB" in README
    )
    assert (len(sizes), len(known)) == (26, 25)
    assert f"`datasets` lists {len(list(cards))} datasets" in README


def test_the_readmes_mix_is_one(tmp_path: Path) -> None:
    text = next(block for block in re.findall(r"```text\n(.*?)```", README, re.DOTALL) if "max_gb" in block)
    (tmp_path / "mine.yaml").write_text(text)
    assert load_mix(tmp_path / "mine.yaml", load_cards()).max_gb == 100


def test_the_readmes_rates_are_the_recorded_ones() -> None:
    recorded = json.loads((ROOT / "benchmarks/results/2026-11-21-transfer.json").read_text())
    assert f"\n{recorded['http']['rate beside curl']} times the rate of `curl`" in README
    assert f"{recorded['file']['rate beside cp']} times that of `cp`" in README
    assert f"needs {recorded['memory']['above_mb']} MB above its imports" in README
    assert f"takes\n{sorted(recorded['dry_run']['seconds'])[2]} s" in README
    assert recorded["http"]["rate beside curl"] >= 0.8
    assert recorded["file"]["rate beside cp"] >= 0.7


def test_the_readmes_scores_are_the_recorded_ones() -> None:
    recorded = json.loads((ROOT / "benchmarks/results/2026-11-21-three-seeds.json").read_text())["seeds"]
    shown = re.findall(
        r"^\| (\d) \| (0\.\d+) \| (0\.\d+) \| (0\.\d+) \| (0\.\d+) \| (0\.\d+) \|", README, re.MULTILINE
    )
    assert len(shown) == len(recorded) == 3
    for seed, *figures, ratio in shown:
        l1 = recorded[seed]["held_out"]["l1"]
        order = ("model", "shuffled_images", "mean_action", "repeat_last")
        assert [float(figure) for figure in figures] == [round(l1[name], 3) for name in order]
        assert float(ratio) == round(l1["model"] / l1["mean_action"], 2) <= 0.6
        assert l1["shuffled_images"] > l1["mean_action"]


@pytest.mark.parametrize("name", ["parallel", "parallel-chunk4"])
def test_the_readmes_accuracies_of_both_ways_of_decoding_are_the_recorded_ones(name: str) -> None:
    reports = json.loads((ROOT / f"benchmarks/results/2026-11-21-{name}.json").read_text())["reports"]
    exact = {way: report["held_out"]["accuracy"]["model"]["exact"] for way, report in reports.items()}
    text = f"{exact['one pass']:.1%} exact bins, token by token {exact['token by token']:.1%}"
    assert text.replace("%", " %") in README
    assert exact["one pass"] > exact["token by token"] - 0.02


def test_the_readmes_rates_of_acting_are_the_recorded_ones() -> None:
    found = json.loads((ROOT / "benchmarks/results/2026-11-21-act-cpu.json").read_text())

    def beside(shape: str, way: str) -> float:
        figures = found[shape]["256x256"]
        rate: float = figures[way]["actions_per_s"] / figures["generate, anyres_max_9"]["actions_per_s"]
        return rate

    single, whole = (
        [beside(shape, way) for shape in ("narrow", "wide")]
        for way in ("token by token", "one pass, chunk 8")
    )
    assert f"{single[0]:.2f} and {single[1]:.2f} times the actions a second" in README
    assert f"with chunks of eight {whole[0]:.1f} and {whole[1]:.1f} times" in README


def test_the_readmes_rates_of_conversion_are_the_recorded_ones() -> None:
    results = ROOT / "benchmarks/results"
    large = json.loads((results / "2026-11-21-convert-jpeg240k.json").read_text())["figures"]
    name = "2026-11-21-convert-jpeg24k-png-resize-workers-memory-reader.json"
    small = json.loads((results / name).read_text())["figures"]

    def beside(figures: dict[str, dict[str, float]], what: str) -> str:
        return f"{figures[f'{what}: beside the usual way']['value']:.1f}"

    text = " ".join(README.split())
    assert f"frames go {beside(large, 'large, files')} times as fast into files" in text
    assert f"and {beside(large, 'large, tar')} times into tars, 24,000 frames" in text
    assert f"24,000 frames {beside(small, 'small, files')} and {beside(small, 'small, tar')} times." in text
    shares = [large[f"large, {layout}: share of the rate of cp"]["value"] for layout in ("files", "tar")]
    assert f"Into files is {shares[0]:.1f} times the rate of `cp`, into tars {shares[1]:.2f} times." in text
    peaks = [figure["value"] for name, figure in small.items() if "peak MB" in name]
    assert f"A worker needs {max(peaks):.0f} MB, for 100 frames or 100,000." in text
    rates = [small[f"reader, {layout}: samples/s"]["value"] for layout in ("files", "tar")]
    assert f"{rates[0]:,} random samples a second from files, {rates[1]:,} from tars." in text
