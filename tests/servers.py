"""What `tests.loopback` lacks: a bucket as strict as the real one, an S3 server, Beam workers that start.

Each is a process of its own on loopback. Run as a program, this module is the bucket.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import quote

import urllib3

from tests.loopback import BUCKET, free_port, server_process

_ROOT = Path(__file__).parent.parent
_MOVE = r"^/storage/v1/b/(?P<bucket_name>[-.\w]+)/o/(?P<object_id>.+)/moveTo/o/(?P<dest_object_id>.+)$"

Handler = Callable[[Any, Any, Any], None]  # (request, response, storage) of the emulator


@contextmanager
def strict_bucket(page: int = 1000, bucket: str = BUCKET) -> Iterator[str]:
    """A GCS emulator with one empty bucket, in memory; yields its endpoint.

    gcp-storage-emulator as it comes serves one request at a time over HTTP/1.0, lists everything at once,
    answers 206 past the end, ignores `ifGenerationMatch` and does not know `moveTo`, which gcsfs then tries
    for half a minute. This one does as the real service does.

    Args:
        page: objects in one answer to a listing; small ones prove that clients ask for the rest.
    """
    port = free_port()
    command = ("tests.servers", str(port), str(page), bucket)
    with server_process(port, *command, env={"PYTHONPATH": str(_ROOT)}):
        yield f"http://127.0.0.1:{port}"


@contextmanager
def s3_server(bucket: str = BUCKET) -> Iterator[str]:
    """An S3 server (moto) with one empty bucket that anybody may read; yields its endpoint.

    s3fs finds it by AWS_ENDPOINT_URL_S3 in the environment.
    """
    port = free_port()
    with server_process(port, "moto.server", "-H", "127.0.0.1", "-p", str(port)):
        endpoint = f"http://127.0.0.1:{port}"
        _put(urllib3.PoolManager(), f"{endpoint}/{bucket}", b"", {"x-amz-acl": "public-read"})
        yield endpoint


def upload_s3(endpoint: str, folder: Path, bucket: str = BUCKET) -> None:
    """Put a folder tree into a bucket of `s3_server`."""
    pool = urllib3.PoolManager(maxsize=4)

    def put(file: Path) -> None:
        url = f"{endpoint}/{bucket}/{quote(str(file.relative_to(folder)))}"
        # Without a type of its own moto takes the content for a form.
        _put(pool, url, file.read_bytes(), {"Content-Type": "application/octet-stream"})

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(put, [file for file in folder.rglob("*") if file.is_file()]))
    pool.clear()


def _put(pool: urllib3.PoolManager, url: str, content: bytes, headers: dict[str, str]) -> None:
    answer = pool.request("PUT", url, body=content, headers=headers)
    assert answer.status == 200, answer.data
    pool.clear()


@contextmanager
def beam_job_service(env: dict[str, str] | None = None) -> Iterator[list[str]]:
    """A Beam job service and a pool of workers; yields the options that make a pipeline use both.

    The pool starts one worker process for each job; it ends soon after the two do, even in mid-job.
    """
    jobs, workers = free_port(), free_port()
    # The pool runs its workers as plain `python`; with any other Python than ours a job waits for ever.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    env = {**(env or {}), "PATH": path}
    service = ("apache_beam.runners.portability.local_job_service_main", "-p", str(jobs))
    pool = ("apache_beam.runners.worker.worker_pool_main", "--service_port", str(workers))
    with server_process(jobs, *service, env=env), server_process(workers, *pool, env=env):
        yield [
            f"--job_endpoint=localhost:{jobs}",
            "--environment_type=EXTERNAL",
            f"--environment_config=localhost:{workers}",
        ]


def _serve_bucket(port: str, page: str, bucket: str) -> None:
    """The emulator with threads, connections that stay open, and the real service's answers."""
    from http.server import ThreadingHTTPServer

    # Neither has types.
    from gcp_storage_emulator import server  # type: ignore[import-untyped]
    from gcp_storage_emulator.handlers import buckets, objects  # type: ignore[import-untyped]
    from gcp_storage_emulator.storage import Storage  # type: ignore[import-untyped]

    ours: dict[Handler, Handler] = {
        objects.ls: partial(_in_pages, objects.ls, int(page)),
        objects.download: partial(_download, objects.download),
        objects.insert: partial(_insert, objects.insert),
    }
    objects.download = ours[objects.download]  # `objects.get` calls it by name
    move = partial(_move, objects.copy, objects.delete)
    lock = threading.Lock()
    server.HANDLERS = [
        (
            pattern,
            {method: partial(_alone, lock, ours.get(handler, handler)) for method, handler in by.items()},
        )
        for pattern, by in ((_MOVE, {"POST": move}), *server.HANDLERS)
    ]
    server.RequestHandler.protocol_version = "HTTP/1.1"
    server.RequestHandler.disable_nagle_algorithm = True  # else each answer waits 40 ms for an ACK
    # Without a disk to keep it on: else every upload writes down all objects there are.
    Storage._write_config_to_file = lambda _: None
    storage = Storage(use_memory_fs=True)
    buckets.create_bucket(bucket, storage)
    ThreadingHTTPServer.request_queue_size = 128
    handler = partial(server.RequestHandler, storage)
    ThreadingHTTPServer(("127.0.0.1", int(port)), handler).serve_forever()


def _alone(lock: threading.Lock, handler: Handler, request: Any, response: Any, storage: Any) -> None:
    """One handler at a time; but slow clients are read before, and written to after."""
    content = request.data
    if content is None and request.query.get("uploadType") == ["media"]:
        request._data = b""  # the emulator stumbles over an empty file
    with lock:
        handler(request, response, storage)


def _in_pages(ls: Handler, page: int, request: Any, response: Any, storage: Any) -> None:
    ls(request, response, storage)
    if response.status != 200:
        return
    listing = json.loads(response._content)
    page = min(page, int(request.query.get("maxResults", [page])[0]))
    start = int(request.query.get("pageToken", ["0"])[0])
    if start:
        del listing["prefixes"]
    if start + page < len(listing["items"]):
        listing["nextPageToken"] = str(start + page)
    listing["items"] = listing["items"][start : start + page]
    response.json(listing)


def _download(download: Handler, request: Any, response: Any, storage: Any) -> None:
    download(request, response, storage)
    if response.status == 404:
        return
    object_ = storage.get_file_obj(request.params["bucket_name"], request.params["object_id"])
    size, spec = int(object_["size"]), request.get_header("Range", "")
    if response.status == 206 and int(spec.split("=")[1].split("-")[0]) >= size:
        response.status = HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE
        response["Content-Range"] = f"bytes */{size}"
    response["X-Goog-Hash"] = f"crc32c={object_['crc32c']},md5={object_['md5Hash']}"
    response["X-Goog-Generation"] = object_["generation"]
    response["ETag"] = f'"{object_["etag"]}"'


def _insert(insert: Handler, request: Any, response: Any, storage: Any) -> None:
    wanted = request.query.get("ifGenerationMatch")
    if wanted and "upload_id" not in request.query:
        content = request.data
        named = content.get("meta", content) if isinstance(content, dict) else {}
        name = request.query.get("name", [named.get("name")])[0]
        if wanted != [_generation(storage, request.params["bucket_name"], name)]:
            response.status = HTTPStatus.PRECONDITION_FAILED
            response.json({"error": {"code": 412, "message": f"{name} is there, of another generation"}})
            return
    insert(request, response, storage)


def _generation(storage: Any, bucket: str, name: str) -> str:
    """The generation of an object, "0" for none."""
    found = [item for item in storage.get_file_list(bucket, name)[0] if item["name"] == name]
    return str(found[0]["generation"]) if found else "0"


def _move(copy: Handler, delete: Handler, request: Any, response: Any, storage: Any) -> None:
    request.params["dest_bucket_name"] = request.params["bucket_name"]
    copy(request, response, storage)
    if response.status == 200 and request.params["dest_object_id"] != request.params["object_id"]:
        delete(request, response, storage)


if __name__ == "__main__":
    _serve_bucket(*sys.argv[1:])
