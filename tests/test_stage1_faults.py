"""What stage 1 does with folders, files, buckets and words that are not as they should be."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from oxe_mix import bucket as bucket_module
from oxe_mix import interrupt
from oxe_mix.bucket import BucketTarget
from oxe_mix.cards import Cards
from oxe_mix.errors import UserError
from oxe_mix.files import BUSY_FILE, sweep
from oxe_mix.mix import load_mix
from oxe_mix.mix_check import check_mix
from oxe_mix.progress import Goal, Pace, Sample
from oxe_mix.rlds import parse_dataset_info, parse_features
from oxe_mix.synth.bucket import run_synth
from oxe_mix.synth.plan import SynthOptions
from oxe_mix.target import next_step, open_target
from oxe_mix.writing import TargetError, writing
from tests.conftest import OXE_MIX, ROOT, run
from tests.loopback import BUCKET, FaultProxy, upload, web_server
from tests.servers import strict_bucket
from tests.test_download import _mix

INFO = {"name": "viola", "version": "0.1.0", "splits": [{"name": "train", "shardLengths": ["3"]}]}
STEPS: dict[str, Any] = {"sequence": {"feature": {"featuresDict": {"features": {}}}}}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 training episodes of six datasets, three shards each."""
    out = tmp_path_factory.mktemp("small") / "B"
    run(OXE_MIX, "synth", "--out", out, "--episodes", "24", "--shards", "3")
    return out


@pytest.fixture
def folder(small: Path, tmp_path: Path) -> Path:
    """Two of its datasets, one of them a link."""
    out = tmp_path / "S"
    out.mkdir()
    shutil.copytree(small / "kuka", tmp_path / "kuka")
    (out / "kuka").symlink_to(tmp_path / "kuka")
    shutil.copytree(small / "viola", out / "viola")
    return out


def _error(*command: str | Path, code: int = 2, env: dict[str, str] | None = None) -> str:
    """The one `error:` line of a command that must fail."""
    done = subprocess.run(
        list(map(str, command)),
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


# --- verify ---


def test_verify_reads_datasets_that_are_links(folder: Path, tmp_path: Path) -> None:
    (folder / "round").symlink_to(folder)
    said = run(OXE_MIX, "verify", folder).stdout
    assert [line.split()[0] for line in said.splitlines()[2:4]] == ["kuka/0.1.0", "viola/0.1.0"]
    assert "11 records in 8 shards" in said
    shard = sorted((tmp_path / "kuka/0.1.0").glob("*.tfrecord-*"))[0]
    shard.write_bytes(shard.read_bytes()[:-1])
    errors = run(OXE_MIX, "verify", folder, code=1).stderr
    assert f"{folder}/kuka/0.1.0/{shard.name}: record 0 at byte 0: the file ends inside" in errors


def test_a_link_that_leads_nowhere_is_a_problem(folder: Path) -> None:
    (folder / "kuka").unlink()
    (folder / "kuka").symlink_to("gone")
    assert _error(OXE_MIX, "verify", folder, code=1) == f"{folder}/kuka: a link that leads nowhere"


def test_one_level_too_deep_is_said(small: Path) -> None:
    said = _error(OXE_MIX, "verify", small / "kuka")
    assert said == (
        f"{small}/kuka: no NAME/VERSION/dataset_info.json here; "
        "it is the folder of one dataset, give the one above"
    )
    assert _error(OXE_MIX, "verify", small / "kuka/0.1.0").endswith("here; give the folder two above")


@pytest.mark.parametrize("name", ["dataset_info.json", "features.json"])
def test_metadata_that_is_no_text_is_a_problem_of_its_dataset(folder: Path, name: str) -> None:
    (folder / "viola/0.1.0" / name).write_bytes(b"\xff\x00")
    done = run(OXE_MIX, "verify", folder, code=1)
    assert f"error: {folder}/viola/0.1.0/{name}: is no text" in done.stderr
    assert re.search(r"kuka/0.1.0 .* ok", done.stdout)
    assert re.search(r"viola/0.1.0 .* 1 problem\n", done.stdout)


def test_stray_folders_do_not_end_it(folder: Path) -> None:
    for stray in (".cache/hub", "saved", "my viola/0.1.0"):
        (folder / stray).mkdir(parents=True)
        (folder / stray / "dataset_info.json").write_text("{}")
    done = run(OXE_MIX, "verify", folder, code=1)
    assert done.stderr.splitlines() == [
        f"error: {folder}/my viola/0.1.0: no name for a dataset; only letters, digits, '-', '_' and '.'"
    ]
    assert re.search(r"^\.cache/hub .* hidden, not read$", done.stdout, re.MULTILINE)
    assert re.search(r"^saved .* not NAME/VERSION, not read$", done.stdout, re.MULTILINE)
    assert re.search(r"^viola/0.1.0 .* ok$", done.stdout, re.MULTILINE)


def test_a_first_download_that_is_not_finished_is_told_so(small: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "data"
    shutil.copytree(small / "viola", source / "viola")
    next((source / "viola/0.1.0").glob("*train*")).unlink()
    mix = tmp_path / "mix.yaml"
    mix.write_text("name: m\ndatasets:\n- {name: viola, version: 0.1.0, fraction: 1}\n")
    run(OXE_MIX, "download", "--mix", mix, "--source", source, "--out", out, code=1)
    assert _error(OXE_MIX, "verify", out, code=1) == (
        f"{out}/oxe-mix.lock.json: the download is not finished; run oxe-mix download again"
    )


# --- buckets as targets ---


def _start(mix: Path, endpoint: str, source: str) -> subprocess.Popen[str]:
    command = [OXE_MIX, "download", "--mix", str(mix), "--source", source, "--workers", "1"]
    return subprocess.Popen(
        [*command, "--out", f"gs://{BUCKET}/mine"],
        env={**os.environ, "STORAGE_EMULATOR_HOST": endpoint},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_after_ctrl_c_and_after_a_kill_the_same_command_goes_on_in_a_bucket(
    small: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    with strict_bucket() as endpoint, web_server(small) as source, FaultProxy(source) as proxy:
        upload(endpoint, tmp_path / "empty")
        proxy.bytes_per_s = 30e3
        for number, code in ((signal.SIGINT, 130), (signal.SIGKILL, -9)):
            seen = len(proxy.media)
            process = _start(_mix(tmp_path, 1.0, 1.0), endpoint, proxy.endpoint)
            while len(proxy.media) <= seen and process.poll() is None:
                time.sleep(0.02)
            process.send_signal(number)
            said = process.communicate(timeout=60)[1]
            assert process.returncode == code, said
            assert "writing here" not in said
        proxy.bytes_per_s = None
        last = _start(_mix(tmp_path, 1.0, 1.0), endpoint, proxy.endpoint)
        said = "".join(last.communicate(timeout=60))
        assert last.returncode == 0, said
        assert f"result: gs://{BUCKET}/mine" in said


def _who(**other: Any) -> bytes:
    return json.dumps({**bucket_module._here(), "pid": 2**22 + 1, **other}).encode()


def test_only_a_process_of_this_machine_that_is_no_more_is_known_to_be_dead() -> None:
    assert bucket_module._is_dead(_who())
    for alive in (
        _who(pid=os.getpid()),
        _who(host="node7"),
        _who(boot="x"),
        _who(pid=0),
        b"{}",
        b"\xff",
        b"[]",
    ):
        assert not bucket_module._is_dead(alive)


def test_what_cannot_be_let_go_of_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails() -> None:
        raise TargetError("no network")

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(os, "_exit", lambda code: None)
    with interrupt.held("gs://b/.oxe-mix.busy", fails):
        interrupt.end_at_once()
    interrupt.end_at_once()
    signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err.splitlines() == [
        "error: interrupted; delete gs://b/.oxe-mix.busy, then the same command goes on from here",
        "error: interrupted; the same command goes on from here",
    ]


def test_a_bucket_that_cannot_be_written_is_one_line(small: Path) -> None:
    away = {"AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": os.devnull, "HOME": "/nowhere"}
    away["AWS_ENDPOINT_URL_S3"] = "http://127.0.0.1:9"
    command = (OXE_MIX, "download", "--mix", "demo.yaml", "--source", small, "--out")
    said = _error(*command, "s3://nobucket/x", env=away)
    assert said.startswith("s3://nobucket/x: cannot be reached or written (NoCredentialsError: ")
    for web in ("http://a/b", "https://a/b"):
        words = f"{web}: a web server is neither listed nor written; give a folder, gs:// or s3://"
        assert _error(*command, web) == _error(OXE_MIX, "verify", web) == words


@pytest.mark.parametrize("command", ["verify", "download"])
def test_a_bucket_without_a_network_is_one_line(command: str, small: Path) -> None:
    words = ["verify", "gs://b/x"]
    if command == "download":
        words = ["download", "--mix", "demo.yaml", "--source", str(small), "--out", "gs://b/x"]
    # As patient as gcsfs is, it would take a minute.
    code = (
        "import gcsfs.retry\n"
        "async def soon(_): pass\n"
        "gcsfs.retry.asyncio = type('soon', (), {'sleep': soon})\n"
        "from oxe_mix.cli import main; main()"
    )
    said = _error(sys.executable, "-c", code, *words, env={"STORAGE_EMULATOR_HOST": "http://127.0.0.1:9"})
    assert said.startswith("gs://b/x: cannot be reached or written (Client")


def test_only_a_folder_may_lose_what_was_not_flushed(tmp_path: Path) -> None:
    assert open_target("gs://b/x").durable
    assert not open_target(tmp_path).durable
    assert isinstance(open_target("s3://b/x/"), BucketTarget)


# --- metadata ---


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": 5},
        {"version": None},
        {"splits": [{"name": 7}]},
        {"splits": [3]},
        {"splits": [{"name": "train", "shardLengths": ["-1", "4"]}]},
        {"splits": [{"name": "train", "shardLengths": "12"}]},
        {"splits": [{"name": "train", "shardLengths": [float("inf")]}]},
        {"splits": [{"name": "train", "numBytes": "-5"}]},
    ],
    ids=str,
)
def test_a_dataset_info_of_another_shape_is_one_line(wrong: dict[str, Any]) -> None:
    assert parse_dataset_info(json.dumps(INFO), "here").splits["train"].shard_lengths == (3,)
    with pytest.raises(UserError, match=r"^here: .*$"):
        parse_dataset_info(json.dumps({**INFO, **wrong}), "here")


def _features_with(leaf: Any) -> str:
    return json.dumps({"featuresDict": {"features": {"steps": STEPS, "a": leaf}}})


@pytest.mark.parametrize(
    "wrong",
    [
        '{"featuresDict": []}',
        "[" * 100_000,
        *map(_features_with, (3, "x", [], {"image": 3}, {"tensor": {"dtype": 5}}, {"tensor": []})),
    ],
    ids=lambda text: text[-30:],
)
def test_features_of_another_shape_are_one_line(wrong: str) -> None:
    with pytest.raises(UserError, match=r"^here: not the features\.json of an RLDS dataset"):
        parse_features(wrong, "here")


# --- strange targets ---


@pytest.mark.parametrize(
    ("name", "is_file"), [(".partial", True), ("kuka", True), ("oxe-mix.lock.json", False)]
)
def test_a_file_for_a_folder_or_a_folder_for_a_file_is_one_line(
    small: Path, tmp_path: Path, name: str, is_file: bool
) -> None:
    out = tmp_path / "data"
    out.mkdir()
    (out / name).write_text("mine") if is_file else (out / name).mkdir()
    mix = tmp_path / "mix.yaml"
    mix.write_text("name: m\ndatasets:\n- {name: kuka, version: 0.1.0, fraction: 1}\n")
    command = (OXE_MIX, "download", "--mix", mix, "--source", small, "--out", out, "--workers", "1")
    done = run(*command, code=2)
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {out / name}")
    assert (out / name).exists()
    if not is_file:
        assert "cannot be read (Is a directory)" in _error(OXE_MIX, "convert", "--data", out)


def test_a_name_that_is_too_long_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="too long"), writing("x"):
        (tmp_path / ("n" * 300)).write_text("")
    with pytest.raises(TargetError, match="too long"):
        open_target(tmp_path / ("n" * 300)).free_bytes()


def test_only_our_own_temporary_files_are_swept(tmp_path: Path) -> None:
    for name in (".notes.tmp", ".a.12.tmp", "b.12.tmp", ".12.tmp"):
        (tmp_path / name).write_text("")
    (tmp_path / ".mine.tmp").mkdir()
    (tmp_path / ".mine.7.tmp").mkdir()
    (tmp_path / ".link.7.tmp").symlink_to(tmp_path / ".notes.tmp")
    sweep(tmp_path)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {".notes.tmp", "b.12.tmp", ".12.tmp", ".mine.tmp", ".mine.7.tmp", ".link.7.tmp"}


# --- synth ---


def test_synth_tells_in_a_line_what_it_cannot_do(tmp_path: Path) -> None:
    def said(out: str, seed: int = 0) -> str:
        with pytest.raises(UserError) as error:
            run_synth(SynthOptions(tmp_path / out, episodes=6, shards=1, seed=seed))
        return str(error.value)

    (tmp_path / "file").write_text("mine")
    assert "/file: something is in the way here (Not a directory)" in said("file")
    assert "/file/b: something is in the way here (Not a" in said("file/b")
    assert said("b", seed=-1) == "--seed -1: a seed is 0 or more"
    for note in ("{}", "[", "[]"):
        (tmp_path / "b").mkdir(exist_ok=True)
        (tmp_path / "b/synth.json").write_text(note)
        assert "not empty, and not this bucket" in said("b")
    settings = {"episodes": 6, "seed": 0, "shards": 1}
    (tmp_path / "b/synth.json").write_text(json.dumps({"settings": settings}))
    assert "this bucket, but not finished" in said("b")


def test_synth_on_a_full_disk_is_one_line_and_then_knows_its_own(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        synth = (OXE_MIX, "synth", "--episodes", "24", "--shards", "3", "--out", disk / "b")
        assert _error(*synth).startswith(f"{disk}/b: the disk is full; ")
        assert "this bucket, but not finished" in _error(*synth)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# --- words ---

ENTRY = "{name: kuka, version: 0.1.0, fraction: 0.1}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            f"name: m\ndatasets: [{ENTRY}]\nname: n\n",
            ":3: not valid YAML ('name' is written twice, the first",
        ),
        (f"datasets: [{ENTRY[:-1]}, fraction: 1}}]", ":1: not valid YAML ('fraction' is written twice"),
        (f"datasets: [{ENTRY.replace('0.1}', 'true}')}]", ": datasets.0.fraction: true is no number"),
        (f"datasets: [{ENTRY[:-1]}, weight: yes}}]", ": datasets.0.weight: true is no number"),
        (
            f"datasets: [{ENTRY.replace('.0,', ',')}]",
            ': datasets.0.version: 0.1 is no text in YAML; quote it: "0.1"',
        ),
        ("datasets: 5", ": datasets: expected a list, one `- ` line each"),
        ("datasets: [kuka]", ": datasets.0: expected names with values, as in {name: kuka, "),
        (f"datasets: [{ENTRY}]\nsource: 'http://[bad'", ": source: http://[bad: is no address"),
        (f"datasets: [{ENTRY}]\nsource: ['gs://a', 'http://[bad']", ": source.1: http://[bad: is no address"),
    ],
)
def test_a_mix_that_says_something_else_than_it_seems_to_is_refused(
    tmp_path: Path, cards: Cards, text: str, message: str
) -> None:
    file = tmp_path / "mix.yaml"
    file.write_text(text if text.startswith("name") else f"{text}\nname: m\n")
    with pytest.raises(UserError) as error:
        load_mix(file, cards)
    assert str(error.value).startswith(f"{file}{message}")


def test_a_source_that_is_no_address_is_one_line(tmp_path: Path) -> None:
    command = (OXE_MIX, "download", "--mix", "demo.yaml", "--out", tmp_path / "d", "--source", "http://[bad")
    assert _error(*command) == "--source http://[bad: is no address (Invalid IPv6 URL)"


@pytest.mark.parametrize("words", [["--out", ""], ["--out="], ["--source", "x", "--out", ""]])
def test_an_empty_word_is_refused(words: list[str]) -> None:
    said = _error(OXE_MIX, "download", "--mix", "demo.yaml", *words)
    assert said == "--out: followed by nothing; is a shell variable not set?"


def test_the_next_step_can_be_typed_as_it_stands(tmp_path: Path) -> None:
    out = tmp_path / "my data"
    said = run(OXE_MIX, "synth", "--episodes", "6", "--shards", "1", "--out", out).stdout
    assert shlex.split(said.split("next: ")[1])[-2:] == ["--source", str(out)]
    assert shlex.split(next_step(str(out)))[-2:] == ["--data", str(out)]
    said = run(OXE_MIX, "convert", "--data", out, "--out", tmp_path / "a b", "--only", "kuka").stdout
    check, train = said.split("next: ")[1].split(", then ")
    assert shlex.split(train)[-1] == f"LLAVA={tmp_path}/a b"
    said = run(OXE_MIX, *shlex.split(check)[1:]).stdout
    assert shlex.split(said.split("next: ")[1]) == ["make", "train", f"LLAVA={tmp_path}/a b"]


def test_the_readmes_mix_follows_the_cards(tmp_path: Path, cards: Cards) -> None:
    blocks = re.findall(r"```text\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    file = tmp_path / "mine.yaml"
    file.write_text(next(block for block in blocks if "max_gb" in block))
    (budget,) = check_mix(load_mix(file, cards), cards, file).warnings
    assert budget.startswith("max_gb may scale")


def test_a_part_that_is_cut_back_is_no_negative_rate() -> None:
    pace = Pace(Goal("download", "shard", 10, num_bytes=1000))
    pace.after(Sample(3, 500), pace._start + 20)
    assert pace.after(Sample(2, 400), pace._start + 21)["bytes_per_s"] == 0
    assert BUSY_FILE.startswith(".")
