"""Stages 1 and 2 on Beam's portable protocol: job service, workers and target are all somewhere else."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from oxe_mix.files import BUSY_FILE
from tests.conftest import OXE_MIX, run
from tests.converting import content_of
from tests.loopback import BUCKET, upload
from tests.servers import beam_job_service, strict_bucket
from tests.test_download import _content, _download, _mix

OUT = f"gs://{BUCKET}/mine/openx"


def _command(mix: Path, *more: str) -> list[str]:
    return [OXE_MIX, "download", "--mix", str(mix), "--source", f"gs://{BUCKET}", "--out", OUT, *more]


def _fetch_all(endpoint: str, out: Path) -> None:
    """The target bucket as a folder."""
    import urllib3

    pool = urllib3.PoolManager()
    listing = pool.request("GET", f"{endpoint}/storage/v1/b/{BUCKET}/o?prefix=mine/openx/").json()
    for item in listing["items"]:
        name = item["name"].removeprefix("mine/openx/")
        url = f"{endpoint}/download/storage/v1/b/{BUCKET}/o/{item['name'].replace('/', '%2F')}?alt=media"
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(pool.request("GET", url).data)
    pool.clear()


def test_a_cluster_writes_into_a_bucket_what_one_machine_writes_into_a_folder(
    bucket: Path, tmp_path: Path
) -> None:
    """Fetched, refused while somebody writes, grown, found whole: the target is never this machine's."""
    small, large = tmp_path / "small.yaml", tmp_path / "large.yaml"
    small.write_text(_mix(tmp_path, viola=0.3, bridge=0.2).read_text())
    large.write_text(_mix(tmp_path, viola=0.7, bridge=0.4).read_text())
    with strict_bucket() as endpoint:
        upload(endpoint, bucket)
        env = {**os.environ, "STORAGE_EMULATOR_HOST": endpoint, "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}
        with beam_job_service(env) as flags:
            cluster = ("--runner", "PortableRunner", "--jobs", "3", "--", *flags)
            done = subprocess.run(
                _command(small, *cluster), env=env, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stderr
            assert f"result: {OUT}" in done.stdout
            # The second run is this machine's alone: it grows what the cluster made.
            subprocess.run(_command(large, "--workers", "1"), env=env, capture_output=True, check=True)
        again = subprocess.run(_command(large), env=env, capture_output=True, text=True, check=True)
        assert "nothing to do" in again.stdout
        run_verify = subprocess.run(
            [OXE_MIX, "verify", OUT], env=env, capture_output=True, text=True, check=False
        )
        assert run_verify.returncode == 0, run_verify.stdout + run_verify.stderr
        _fetch_all(endpoint, tmp_path / "data")
    _download(large, bucket, tmp_path / "folder")
    one, two = _content(tmp_path / "data"), _content(tmp_path / "folder")
    assert one.pop("oxe-mix.lock.json") != two.pop("oxe-mix.lock.json")  # it names the source
    assert one == two


def test_a_bucket_that_somebody_writes_into_is_refused_by_name(bucket: Path, tmp_path: Path) -> None:
    with strict_bucket() as endpoint:
        upload(endpoint, bucket)
        env = {**os.environ, "STORAGE_EMULATOR_HOST": endpoint}
        held = tmp_path / "held" / "mine/openx" / BUSY_FILE
        held.parent.mkdir(parents=True)
        held.write_text('{"host": "node7", "pid": 12}')
        upload(endpoint, tmp_path / "held")
        done = subprocess.run(_command(_mix(tmp_path)), env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"{OUT}: another download is writing here" in done.stderr
    assert "node7" in done.stderr
    assert f"delete {OUT}/{BUSY_FILE}" in done.stderr


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--", "--region=x"], "--region=x: options for Beam need a --runner"),
        (["--runner", "NoSuchRunner", "--", "--x=1"], "--runner NoSuchRunner:"),
    ],
)
def test_a_runner_that_cannot_be_is_one_line(
    bucket: Path, tmp_path: Path, more: list[str], message: str
) -> None:
    place = ("--source", str(bucket), "--out", str(tmp_path / "data"))
    done = run(OXE_MIX, "download", "--mix", _mix(tmp_path), *place, *more, code=2)
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_cluster_converts_to_the_bytes_of_one_machine(data: Path, llava: Path, tmp_path: Path) -> None:
    """Its workers reach data and target under the same path; where the command was typed they do not know."""
    (tmp_path / "data").symlink_to(data)
    with beam_job_service(dict(os.environ)) as flags:
        cluster = ("--runner", "PortableRunner", "--", *flags)
        run(OXE_MIX, "convert", "--val-fraction", "0.1", *cluster, cwd=tmp_path)
    assert content_of(tmp_path / "llava") == content_of(llava)
