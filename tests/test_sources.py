"""Sources over real HTTP: an object store and a web server on loopback, and a proxy that injures answers."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from oxe_mix.cards import load_cards
from oxe_mix.fetch import fetch_shard
from oxe_mix.lock import read_lock
from oxe_mix.mix import DatasetSpec, Mix
from oxe_mix.plan import plan_download
from oxe_mix.schedule import schedule
from oxe_mix.source_file import Patience, SourceFile, TransientError, pause
from oxe_mix.target import open_target
from oxe_mix.tfrecord import TFRecordError, frame
from tests.conftest import OXE_MIX
from tests.loopback import BUCKET, FaultProxy, fault_at, seeded_faults, upload, web_server
from tests.servers import s3_server, strict_bucket, upload_s3
from tests.test_download import _content, _download, _mix, _payloads

PASSING = ("503", "429", "reset", "truncated", "wrong_bytes", "stall")


@pytest.fixture(scope="module")
def store(bucket: Path) -> Iterator[str]:
    """The synthetic bucket in an object store."""
    with strict_bucket() as endpoint:
        upload(endpoint, bucket)
        yield endpoint


def _from_store(
    endpoint: str, mix: Path, out: Path, *more: str, code: int = 0, source: str = f"gs://{BUCKET}"
) -> str:
    command = [OXE_MIX, "download", "--mix", mix, "--source", source, "--out", out, "--workers", "1", *more]
    env = {**os.environ, "STORAGE_EMULATOR_HOST": endpoint}
    done = subprocess.run(list(map(str, command)), env=env, capture_output=True, text=True, check=False)
    assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def _same_data(one: Path, two: Path) -> None:
    """The same files; their locks name different sources."""
    first, second = _content(one), _content(two)
    assert first.pop("oxe-mix.lock.json") != second.pop("oxe-mix.lock.json")
    assert first == second


@pytest.fixture(scope="module")
def whole(bucket: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What every one of these downloads must come to."""
    folder = tmp_path_factory.mktemp("whole")
    _download(_mix(folder, viola=0.7, bridge=1.0), bucket, folder / "data")
    return folder / "data"


@pytest.fixture
def mix(tmp_path: Path) -> Path:
    """Whole shards, one in part, and another split."""
    return _mix(tmp_path, viola=0.7, bridge=1.0)


def test_a_bucket_gives_the_same_bytes_as_a_folder_and_its_checksums_are_in_the_lock(
    store: str, mix: Path, whole: Path, tmp_path: Path
) -> None:
    _from_store(store, mix, tmp_path / "data")
    _same_data(tmp_path / "data", whole)
    lock = read_lock(tmp_path / "data")
    assert lock is not None
    for dataset in lock.datasets:
        assert dataset.source.startswith(f"gs://{BUCKET}/")
        for split in dataset.splits:
            for shard in split.shards:
                assert (shard.source_check or "").startswith("crc32c:")
                if shard.taken == shard.of_episodes:
                    assert shard.source_check == f"crc32c:{shard.crc32c}"


@pytest.mark.parametrize("fault", PASSING)
def test_a_fault_that_passes_costs_a_retry_and_no_byte(
    store: str, mix: Path, whole: Path, tmp_path: Path, fault: str
) -> None:
    plan = fault_at("bridge_dataset-train.tfrecord-00002", fault, times=1)
    with FaultProxy(store, plan) as proxy:
        said = _from_store(proxy.endpoint, mix, tmp_path / "data", "--stall", "1")
    assert [request.fault for request in proxy.media if request.fault] == [fault]
    assert re.search(r", retries [1-3]$", said, re.MULTILINE), said
    _same_data(tmp_path / "data", whole)


def test_a_broken_transfer_goes_on_inside_the_shard(store: str, mix: Path, tmp_path: Path) -> None:
    plan = fault_at("bridge", "reset", times=1)
    with FaultProxy(store, plan) as proxy:
        _from_store(proxy.endpoint, mix, tmp_path / "data")
    again = [request for request in proxy.media if "bridge" in request.path and request.fault is None]
    starts = [int(r.headers.get("Range", "bytes=0-")[6:].split("-")[0]) for r in again]
    assert len(starts) == 5
    assert all(start > 0 for start in starts)


@pytest.mark.parametrize("seed", range(3))
def test_seeded_faults_of_all_kinds_leave_no_trace(
    store: str, mix: Path, whole: Path, tmp_path: Path, seed: int
) -> None:
    with FaultProxy(store, seeded_faults(seed, PASSING, rate=0.7)) as proxy:
        _from_store(proxy.endpoint, mix, tmp_path / "data", "--stall", "1")
    assert len({request.fault for request in proxy.media}) >= 4
    _same_data(tmp_path / "data", whole)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("404", "not there (HTTP 404)"),
        ("403", "no permission (HTTP 403); sources are read without credentials"),
        ("503", "not fetched: HTTP 503 (1 more try)"),
        ("wrong_bytes", "the checksum of the data is wrong"),
        ("truncated", "not fetched: the connection closed early (1 more try)"),
    ],
)
def test_a_shard_that_stays_bad_is_named_and_the_next_run_fetches_only_that(
    store: str, mix: Path, whole: Path, tmp_path: Path, fault: str, message: str
) -> None:
    out = tmp_path / "data"
    plan = fault_at("bridge_dataset-train.tfrecord-00002", fault)
    with FaultProxy(store, plan) as proxy:
        said = _from_store(proxy.endpoint, mix, out, "--retries", "1", code=1)
        errors = [line for line in said.splitlines() if line.startswith("error:")]
        assert len(errors) == 1
        assert "bridge_dataset-train.tfrecord-00002-of-00005" in errors[0]
        assert message in errors[0]
        assert "the next run fetches only the missing" in said
        proxy.plan = fault_at("bridge", fault, times=0)
        before = len(proxy.media)
        assert "fetched 1 shard," in _from_store(proxy.endpoint, mix, out)
        assert len(proxy.media) == before + 1
    _same_data(out, whole)


def test_no_credential_is_read_or_sent(store: str, mix: Path, tmp_path: Path) -> None:
    """Keys, tokens and a .netrc lie about; none of it reaches the wire, and none of the files is opened."""
    home = tmp_path / "home"
    home.mkdir()
    (home / ".netrc").write_text("default login me password secret\n")
    (home / ".netrc").chmod(0o600)
    keys = {"GOOGLE_APPLICATION_CREDENTIALS": str(home / "no-such-key.json"), "AWS_ACCESS_KEY_ID": "AKIA"}
    keys |= {"AWS_SECRET_ACCESS_KEY": "secret", "HOME": str(home), "NETRC": str(home / ".netrc")}
    with FaultProxy(store) as proxy:
        env = {**os.environ, "STORAGE_EMULATOR_HOST": proxy.endpoint, **keys}
        command = [
            OXE_MIX,
            "download",
            "--mix",
            mix,
            "--source",
            f"gs://{BUCKET}",
            "--out",
            tmp_path / "data",
        ]
        subprocess.run(list(map(str, command)), env=env, check=True, capture_output=True)
    assert len(proxy.requests) > 10
    for request in proxy.requests:
        names = {name.lower() for name in request.headers}
        assert not names & {"authorization", "cookie", "x-goog-user-project", "proxy-authorization"}
        assert "secret" not in str(request)


def test_a_web_server_that_lists_nothing_is_read_by_names(
    bucket: Path, mix: Path, whole: Path, tmp_path: Path
) -> None:
    with web_server(bucket) as endpoint, FaultProxy(endpoint, seeded_faults(5, PASSING)) as proxy:
        said = _from_store("", mix, tmp_path / "data", "--stall", "1", source=proxy.endpoint)
    assert "retries" in said
    _same_data(tmp_path / "data", whole)
    assert all(not request.path.endswith("/") for request in proxy.requests)


def test_a_source_out_of_reach_is_told_from_one_without_the_dataset(mix: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with web_server(tmp_path / "empty") as endpoint:
        said = _from_store("", mix, tmp_path / "data", "--retries", "0", code=2, source=endpoint)
        assert "viola 0.1.0: no dataset_info.json in" in said
    said = _from_store("", mix, tmp_path / "data", "--retries", "0", code=2, source=endpoint)
    assert "cannot be read (no answer: " in said


def test_an_object_that_changed_since_the_lock_is_refused(bucket: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "bucket", tmp_path / "data"
    shutil.copytree(bucket / "viola", source / "viola")
    mix = tmp_path / "mix.yaml"
    text = "name: m\ndatasets:\n- {name: viola, version: 0.1.0, fraction: 0.5}\n"
    mix.write_text(text)
    with strict_bucket() as endpoint:
        upload(endpoint, source)
        _from_store(endpoint, mix, out)
        before = _content(out)
        lock = read_lock(out)
        assert lock is not None
        shard = source / "viola/0.1.0" / lock.datasets[0].splits[0].shards[0].source_file
        shard.write_bytes(shard.read_bytes()[::-1])
        upload(endpoint, source)
        mix.write_text(text.replace("0.5", "0.8"))
        said = _from_store(endpoint, mix, out, code=2)
    assert f"{shard.name}: changed at the source since {out} was downloaded" in said
    assert "choose another --out" in said
    assert _content(out) == before


def test_an_s3_bucket_gives_the_same_bytes_without_keys(
    bucket: Path, mix: Path, whole: Path, tmp_path: Path
) -> None:
    pytest.importorskip("moto", reason="needs the extra dev")
    with s3_server() as endpoint:
        upload_s3(endpoint, bucket)
        env = {**os.environ, "AWS_ENDPOINT_URL_S3": endpoint}
        command = [
            OXE_MIX,
            "download",
            "--mix",
            mix,
            "--source",
            f"s3://{BUCKET}",
            "--out",
            tmp_path / "data",
        ]
        done = subprocess.run(
            [*map(str, command), "--workers", "1"], env=env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    _same_data(tmp_path / "data", whole)
    lock = read_lock(tmp_path / "data")
    assert lock is not None
    assert all(
        (s.source_check or "").startswith("etag:") for d in lock.datasets for p in d.splits for s in p.shards
    )


def test_a_shard_whose_bytes_are_not_what_the_bucket_says_is_refused_though_every_record_is_sound(
    bucket: Path, tmp_path: Path
) -> None:
    cards = load_cards()
    spec = DatasetSpec(name="viola", version="0.1.0", fraction=1.0)
    plans = plan_download(Mix(name="m", source=str(bucket), datasets=(spec,)), cards, Patience())
    task = schedule(plans, open_target(tmp_path / "data"), None)[0].task
    said = SourceFile(task.expected.size, "crc32c:00000000")
    with pytest.raises(TFRecordError, match=r"come to crc32c:[0-9a-f]{8}, the bucket says crc32c:00000000"):
        fetch_shard(replace(task, expected=said), Patience())
    assert not list((tmp_path / "data").rglob("*.tfrecord"))
    report = fetch_shard(task, Patience())
    again = replace(task, expected=SourceFile(task.expected.size, f"crc32c:{report.crc32c}"))
    (tmp_path / "data" / task.name).unlink()
    assert fetch_shard(again, Patience()).crc32c == report.crc32c


def test_waits_grow_and_are_spread_and_a_server_that_names_its_own_is_heard(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)
    for attempt in range(1, 12):
        pause(attempt, TransientError("HTTP 503"))
    assert all(0.25 * 2**i <= wait <= 0.375 * 2**i for i, wait in enumerate(waits[:8]))
    assert max(waits) <= 90
    first = [waits[0]]
    for _ in range(5):
        waits.clear()
        pause(1, TransientError("HTTP 503"))
        first.append(waits[0])
    assert len(set(first)) > 1
    waits.clear()
    pause(1, TransientError("HTTP 429", retry_after=7))
    assert 7 <= waits[0] <= 10.5


def test_a_file_that_changed_between_two_runs_is_not_spliced(bucket: Path, tmp_path: Path) -> None:
    """The first run leaves half of a shard; before the second the source puts other records in its place."""
    source, out = tmp_path / "bucket", tmp_path / "data"
    shutil.copytree(bucket / "viola", source / "viola")
    mix = tmp_path / "mix.yaml"
    mix.write_text("name: m\ndatasets:\n- {name: viola, version: 0.1.0, fraction: 1}\n")
    shard = sorted((source / "viola/0.1.0").glob("viola-train*"))[3]
    with web_server(source) as endpoint, FaultProxy(endpoint, fault_at(shard.name, "truncated")) as proxy:
        _download(mix, proxy.endpoint, out, "--retries", "0", code=1)
        assert list(out.rglob("*.part"))
        payloads = _payloads(shard)
        payloads[0] = payloads[0][:-1] + bytes([payloads[0][-1] ^ 1])
        shard.write_bytes(b"".join(map(frame, payloads)))
        proxy.plan = fault_at(shard.name, "truncated", times=0)
        _download(mix, proxy.endpoint, out)
    got = {tuple(_payloads(file)) for file in (out / "viola/0.1.0").glob("*.tfrecord-*")}
    assert tuple(payloads) in got
