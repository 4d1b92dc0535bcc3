"""The servers that other tests stand on do what they say: a strict bucket, S3, faults, Beam workers."""

from __future__ import annotations

import base64
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import google_crc32c
import pytest
import urllib3

from tests.loopback import BUCKET, FaultProxy, Plan, seeded_faults, upload, web_server
from tests.servers import beam_job_service, s3_server, strict_bucket, upload_s3

SHARD = "viola/0.1.0/viola-train.tfrecord-00000-of-00002"
CONTENT = bytes(range(256)) * 2000
PAGE = 7  # objects in an answer to a listing
GSFS = """
import sys, gcsfs
fs = gcsfs.GCSFileSystem(token="anon")
for line in sys.stdin.read().splitlines():
    try:
        print(eval(line))
    except OSError as error:
        print(type(error).__name__)
"""
PIPELINE = """
import sys
import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions

def work(number, folder=sys.argv[1], seconds=float(sys.argv[2])):
    import os, pathlib, time
    pathlib.Path(folder, f"{number}.part").write_text(f"{os.getpid()} {os.getppid()}")
    pathlib.Path(folder, f"{number}.part").rename(pathlib.Path(folder, str(number)))
    time.sleep(seconds)

with beam.Pipeline(runner="PortableRunner", options=PipelineOptions(sys.argv[3:])) as pipeline:
    _ = pipeline | beam.Create(range(4)) | beam.Reshuffle() | beam.Map(work)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shard, an empty file, and more small files than two pages of a listing hold."""
    root = tmp_path_factory.mktemp("tree")
    (root / SHARD).parent.mkdir(parents=True)
    (root / SHARD).write_bytes(CONTENT)
    (root / "many").mkdir()
    for number in range(2 * PAGE + 1):
        (root / "many" / f"{number:02}").write_bytes(b"x" * number)
    return root


@pytest.fixture(scope="module")
def store(folder: Path) -> Iterator[str]:
    with strict_bucket(page=PAGE) as endpoint:
        upload(endpoint, folder)
        yield endpoint


def _media(endpoint: str, name: str = SHARD) -> str:
    return f"{endpoint}/download/storage/v1/b/{BUCKET}/o/{quote(name, safe='')}?alt=media"


def _get(url: str, timeout: float = 60.0, **headers: str) -> urllib3.BaseHTTPResponse:
    """Ask once, and leave nothing open."""
    pool = urllib3.PoolManager()
    try:
        return pool.request("GET", url, headers=headers, timeout=timeout, retries=False)
    finally:
        pool.clear()


def _in_gcsfs(endpoint: str, *expressions: str) -> list[str]:
    """What gcsfs says, in a process of its own: it keeps its connections open for good."""
    env = {**os.environ, "STORAGE_EMULATOR_HOST": endpoint, "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}
    command = [sys.executable, "-c", GSFS]
    done = subprocess.run(
        command, input="\n".join(expressions), env=env, capture_output=True, text=True, check=True, timeout=60
    )
    return done.stdout.splitlines()


def _failure_of_get(url: str, timeout: float) -> str:
    with pytest.raises(urllib3.exceptions.HTTPError) as caught:
        _get(url, timeout=timeout)
    return f"{type(caught.value).__name__} {caught.value}"


def _wait_until(true: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _always(fault: str) -> Plan:
    return lambda _path, _before: fault


def test_the_bucket_serves_ranges_as_the_real_one_does(store: str) -> None:
    whole = _get(_media(store))
    assert (whole.status, whole.data) == (200, CONTENT)
    part = _get(_media(store), Range="bytes=256-511")
    assert (part.status, part.data) == (206, CONTENT[256:512])
    assert part.headers["Content-Range"] == f"bytes 256-511/{len(CONTENT)}"
    rest = _get(_media(store), Range=f"bytes={len(CONTENT) - 3}-")
    assert (rest.status, rest.data) == (206, CONTENT[-3:])
    past = _get(_media(store), Range=f"bytes={len(CONTENT)}-")
    assert (past.status, past.data) == (416, b"")
    marks = ("ETag", "X-Goog-Generation", "X-Goog-Hash")
    assert len({tuple(answer.headers[mark] for mark in marks) for answer in (whole, part, rest)}) == 1
    assert _get(_media(store, "nothing")).status == 404


def test_the_bucket_keeps_connections_open_and_serves_many_at_once(store: str) -> None:
    pool = urllib3.PoolManager(maxsize=4)
    with ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(lambda _: pool.request("GET", _media(store), timeout=60), range(20)))
    pool.clear()
    assert {(answer.data, answer.version, answer.headers.get("Connection")) for answer in answers} == {
        (CONTENT, 11, None)
    }


def test_the_bucket_lists_page_by_page(store: str) -> None:
    url, sizes, token = f"{store}/storage/v1/b/{BUCKET}/o?prefix=many/", [], ""
    while token is not None:
        listing = _get(f"{url}&pageToken={token or 0}").json()
        sizes.append([int(item["size"]) for item in listing["items"]])
        token = listing.get("nextPageToken")
    assert [len(page) for page in sizes] == [PAGE, PAGE, 1]
    assert [size for page in sizes for size in page] == list(range(2 * PAGE + 1))


def test_gcsfs_lists_all_pages_moves_and_creates_only_once(store: str) -> None:
    many, crc, copied, moved, where, first, second, kept, empty = _in_gcsfs(
        store,
        f"len(fs.ls('{BUCKET}/many'))",
        f"fs.info('{BUCKET}/{SHARD}')['crc32c']",
        f"fs.cp_file('{BUCKET}/{SHARD}', '{BUCKET}/copy')",
        f"fs.mv('{BUCKET}/copy', '{BUCKET}/moved')",
        f"(fs.exists('{BUCKET}/copy'), fs.size('{BUCKET}/moved'))",
        f"fs.pipe_file('{BUCKET}/lock', b'one', mode='create')['size']",
        f"fs.pipe_file('{BUCKET}/lock', b'other', mode='create')['size']",
        f"fs.cat_file('{BUCKET}/lock')",
        f"fs.size('{BUCKET}/many/00')",
    )
    assert int(many) == 2 * PAGE + 1
    assert base64.b64decode(crc) == google_crc32c.value(CONTENT).to_bytes(4, "big")
    assert (copied, moved, where) == ("None", "None", f"(False, {len(CONTENT)})")
    assert (first, second, kept, empty) == ("3", "FileExistsError", "b'one'", "0")


@pytest.mark.parametrize("fault", ["503", "429", "404", "403"])
def test_a_refusal_is_the_status_it_is_called_after(store: str, fault: str) -> None:
    with FaultProxy(store, _always(fault)) as proxy:
        answer = _get(_media(proxy.endpoint))
    assert answer.status == int(fault)
    assert answer.headers.get("Retry-After") == ("1" if fault == "429" else None)


@pytest.mark.parametrize(
    ("fault", "words"), [("reset", "reset by peer"), ("truncated", "IncompleteRead"), ("stall", "timed out")]
)
def test_a_transfer_broken_in_its_middle_looks_like_it(store: str, fault: str, words: str) -> None:
    with FaultProxy(store, _always(fault)) as proxy:
        assert words in _failure_of_get(_media(proxy.endpoint), 0.4 if fault == "stall" else 60)
        assert [request.fault for request in proxy.media] == [fault]


def test_wrong_bytes_are_one_byte_of_the_right_number(store: str) -> None:
    with FaultProxy(store, _always("wrong_bytes")) as proxy:
        got = _get(_media(proxy.endpoint))
    assert (got.status, len(got.data)) == (200, len(CONTENT))
    assert sum(a != b for a, b in zip(got.data, CONTENT, strict=True)) == 1


def test_seeded_faults_end_and_gcsfs_works_through_the_proxy_without_credentials(store: str) -> None:
    plan = seeded_faults(3, ("503", "429"), per_path=2, rate=1.0)
    with FaultProxy(store, plan) as proxy:
        statuses = [_get(_media(proxy.endpoint)).status for _ in range(4)]
        assert set(statuses[:2]) <= {503, 429}
        assert statuses[2:] == [200, 200]
        assert _in_gcsfs(proxy.endpoint, f"len(fs.ls('{BUCKET}/many'))") == [str(2 * PAGE + 1)]
        sent = {header.lower() for request in proxy.requests for header in request.headers}
    assert not sent & {"authorization", "cookie"}


def test_the_web_server_has_ranges_and_lists_nothing(folder: Path) -> None:
    with web_server(folder) as endpoint, FaultProxy(endpoint) as proxy:
        for host in (endpoint, proxy.endpoint):
            part = _get(f"{host}/{SHARD}", Range="bytes=1-2")
            assert (part.status, part.data) == (206, CONTENT[1:3])
            assert part.headers["ETag"] == _get(f"{host}/{SHARD}").headers["ETag"]
            assert [_get(f"{host}/{path}").status for path in ("many/", "none")] == [403, 404]


def test_s3fs_reads_the_s3_server_without_credentials(folder: Path) -> None:
    pytest.importorskip("moto")
    code = (
        "import fsspec; fs, path = fsspec.core.url_to_fs('s3://openx/many', anon=True);"
        f"f = fs.open('openx/{SHARD}'); f.seek(255); print(len(fs.ls(path)), f.read(2))"
    )
    with s3_server() as endpoint, FaultProxy(endpoint) as proxy:
        upload_s3(endpoint, folder)
        env = {**os.environ, "AWS_ENDPOINT_URL_S3": proxy.endpoint}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=60)
        sent = {header.lower() for request in proxy.requests for header in request.headers}
    assert done.stdout.split(maxsplit=1) == [str(2 * PAGE + 1), "b'\\xff\\x00'\n"]
    assert "authorization" not in sent


def test_a_portable_job_runs_in_the_pool_and_ends_with_it(tmp_path: Path) -> None:
    done, cut = tmp_path / "done", tmp_path / "cut"
    done.mkdir()
    cut.mkdir()
    with beam_job_service() as flags:
        command = [sys.executable, "-c", PIPELINE]
        subprocess.run([*command, str(done), "0", *flags], capture_output=True, check=True, timeout=60)
        worker, parent = (done / "0").read_text().split()
        assert len(list(done.iterdir())) == 4
        assert b"worker_pool_main" in Path(f"/proc/{parent}/cmdline").read_bytes()
        client = subprocess.Popen([*command, str(cut), "60", *flags], stderr=subprocess.DEVNULL)
        _wait_until(lambda: any(file.suffix == "" for file in cut.iterdir()))
        busy = next(file for file in cut.iterdir() if file.suffix == "").read_text().split()[0]
    client.kill()
    client.wait()
    assert busy != worker
    _wait_until(lambda: not Path(f"/proc/{busy}").exists())
