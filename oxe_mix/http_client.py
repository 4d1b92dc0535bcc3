"""The pooled HTTP client that carries the bulk bytes of gs:// and https:// sources.

gcsfs's own reading reaches two thirds of curl's rate, a pool of plain connections all of it.
"""

from __future__ import annotations

import http.client
import os
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from urllib.parse import quote, urlsplit
from urllib.request import getproxies, proxy_bypass

from oxe_mix.source_file import (
    CHUNK,
    FileMissingError,
    SourceError,
    SourceFile,
    Stream,
    TransientError,
    base64_check,
    etag_check,
    scheme,
)

_OVERLOADED = (408, 425, 429, 500, 502, 503, 504)


def media_url(url: str) -> str:
    """The HTTP address that serves the bytes of a gs:// or https:// file."""
    if scheme(url) != "gs":
        parts = urlsplit(url)
        return parts._replace(path=quote(parts.path, safe="/%")).geturl()
    bucket, _, key = url.removeprefix("gs://").partition("/")
    endpoint = os.environ.get("STORAGE_EMULATOR_HOST") or "https://storage.googleapis.com"
    endpoint = endpoint if "://" in endpoint else f"http://{endpoint}"
    return f"{endpoint.rstrip('/')}/download/storage/v1/b/{bucket}/o/{quote(key, safe='')}?alt=media"


_pools_lock = threading.Lock()


@cache
def _pool_for(scheme: str, host: str) -> Any:
    """One pool of connections per host, through the proxy that the environment names; no cookies, no
    netrc.
    """
    import urllib3

    options: dict[str, Any] = {"num_pools": 4, "maxsize": 64, "ssl_context": ssl.create_default_context()}
    proxy = None if proxy_bypass(host) else getproxies().get(scheme)
    return urllib3.ProxyManager(proxy, **options) if proxy else urllib3.PoolManager(**options)


@contextmanager
def open_http(url: str, start: int, end: int | None, stall_s: float) -> Iterator[Stream]:
    """Open a range of a gs:// or https:// file; see `transport.open_range`."""
    import urllib3

    address = media_url(url)
    parts = urlsplit(address)
    with _pools_lock:
        pool = _pool_for(parts.scheme, parts.hostname or "")
    headers = {"Accept-Encoding": "identity", "User-Agent": "oxe-mix"}
    if start or end is not None:
        headers["Range"] = f"bytes={start}-{'' if end is None else end - 1}"
    try:
        response = pool.request(
            "GET",
            address,
            headers=headers,
            preload_content=False,
            timeout=urllib3.Timeout(connect=min(stall_s, 10.0), read=stall_s),
            retries=urllib3.Retry(total=None, connect=0, read=0, status=0, other=0, redirect=5),
        )
    except urllib3.exceptions.HTTPError as error:
        raise TransientError(f"no answer: {_reason(error)}") from error
    try:
        if response.status not in (200, 206):
            raise _refusal(url, response, start)
        yield Stream(_described(response, start), _http_chunks(response, start))
    finally:
        # A body that was read to its end has given its connection back; any other is not worth draining.
        response.close()


def _http_chunks(response: Any, start: int) -> Iterator[bytes]:
    import urllib3

    # A server that does not know ranges sends the file from its first byte.
    skip = start if response.status == 200 else 0
    try:
        # read1: what has come, not a whole chunk, or a broken connection would take up to a chunk with it.
        while chunk := response.read1(CHUNK):
            if skip:
                skip, chunk = max(0, skip - len(chunk)), chunk[skip:]
            if chunk:
                yield chunk
    except urllib3.exceptions.HTTPError as error:
        raise TransientError(_reason(error)) from error


def _reason(error: BaseException) -> str:
    import urllib3

    if isinstance(error, urllib3.exceptions.ReadTimeoutError):
        return "the server fell silent"
    causes = (error, *error.args)
    if any(
        isinstance(cause, (urllib3.exceptions.IncompleteRead, http.client.IncompleteRead)) for cause in causes
    ):
        return "the connection closed early"
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _refusal(url: str, response: Any, start: int) -> Exception:
    """What an HTTP status means for us."""
    status = response.status
    if status in (404, 410):
        return FileMissingError(f"{url}: not there (HTTP {status})")
    if status in (401, 403):
        return SourceError(f"{url}: no permission (HTTP {status}); sources are read without credentials")
    if status == 416:
        return SourceError(f"{url}: ends before byte {start:,}; it changed, or this copy is not complete")
    if status in _OVERLOADED:
        return TransientError(f"HTTP {status}", _retry_after(response.headers.get("Retry-After")))
    return SourceError(f"{url}: unexpected answer (HTTP {status})")


def _retry_after(value: str | None) -> float | None:
    import urllib3

    if value is None:
        return None
    try:
        return float(urllib3.Retry().parse_retry_after(value))
    except urllib3.exceptions.InvalidHeader:
        return None


def _described(response: Any, start: int) -> SourceFile:
    headers = response.headers
    total = headers.get("Content-Range", "").rpartition("/")[2] or headers.get("Content-Length", "")
    marks = (part.strip() for part in headers.get("x-goog-hash", "").split(","))
    crc = next((mark.removeprefix("crc32c=") for mark in marks if mark.startswith("crc32c=")), None)
    check = base64_check(crc) if crc else etag_check(headers["ETag"]) if "ETag" in headers else None
    return SourceFile(int(total) if total.isdigit() else None, check)
