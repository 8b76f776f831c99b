"""An S3 server on this machine: moto's, with refusals and listings that are out of date.

It listens on a free port of the loopback and is reached by HTTP, as any S3 is.
"""

from __future__ import annotations

import os
import threading
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs, unquote
from xml.sax.saxutils import escape

import pytest

BUCKET = "runs"
REFUSAL = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
ACCOUNT = "123456789012"
"""moto's own."""


@dataclass(frozen=True, slots=True)
class Request:
    """A request that the server got."""

    method: str
    path: str
    """Bucket and key."""
    range: str
    """The header of a read by ranges, as "bytes=0-99"; empty without."""


class S3Server:
    """The WSGI application: moto's behind a log, refusals and frozen listings."""

    def __init__(self, application: Any) -> None:
        self.url = ""
        self.requests: list[Request] = []
        self.refuses: Callable[[int, Request], bool] = lambda number, request: False
        """Whether the request of this number, counted from the last `forget`, gets a 503."""
        self.refused = 0
        self._application = application
        self._listed: dict[str, int] | None = None
        """Keys and sizes that listings show; None: those that are there."""
        self._lock = threading.Lock()

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        path = unquote(environ["PATH_INFO"]).strip("/")
        request = Request(environ["REQUEST_METHOD"], path, environ.get("HTTP_RANGE", ""))
        with self._lock:
            self.requests.append(request)
            is_refused = self.refuses(len(self.requests), request)
            self.refused += is_refused
        query = parse_qs(environ.get("QUERY_STRING", ""))
        if is_refused:
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            answer = b"" if request.method == "HEAD" else REFUSAL
            start_response("503 Slow Down", headers_of(answer))
            return [answer]
        if self._listed is not None and "list-type" in query:
            answer = listing_xml(self._listed, query)
            start_response("200 OK", headers_of(answer))
            return [answer]
        answers: Iterable[bytes] = self._application(environ, start_response)
        return answers

    def objects(self) -> dict[str, int]:
        """The keys of the bucket, with their sizes."""
        from moto.backends import get_backend

        found = get_backend("s3")[ACCOUNT]["aws"].buckets[BUCKET].keys
        return {str(name): int(key.size) for name, key in found.items()}

    def freeze_listings(self) -> None:
        """From now on listings show what is there now."""
        self._listed = self.objects()

    def reset(self) -> None:
        """Listings show what is there, nothing is refused, the log is empty."""
        self._listed = None
        self.refuses = lambda number, request: False
        self.forget()

    def forget(self) -> None:
        """Empty the log."""
        with self._lock:
            self.requests.clear()
            self.refused = 0


def headers_of(answer: bytes) -> list[tuple[str, str]]:
    return [("Content-Type", "application/xml"), ("Content-Length", str(len(answer)))]


def listing_xml(keys: dict[str, int], query: dict[str, list[str]]) -> bytes:
    """The answer to ListObjectsV2, in one page."""
    prefix, delimiter = (query.get(name, [""])[0] for name in ("prefix", "delimiter"))
    contents, prefixes = "", set()
    for key, size in sorted(keys.items()):
        if not key.startswith(prefix):
            continue
        head, cut, _ = key[len(prefix) :].partition(delimiter or "\0")
        if cut:
            prefixes.add(prefix + head + cut)
        else:
            contents += (
                f"<Contents><Key>{escape(key)}</Key><Size>{size}</Size><ETag>e</ETag>"
                "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
            )
    shared = "".join(
        f"<CommonPrefixes><Prefix>{escape(one)}</Prefix></CommonPrefixes>"
        for one in sorted(prefixes)
    )
    return (
        f"<ListBucketResult><Name>{BUCKET}</Name><Prefix>{escape(prefix)}</Prefix>"
        f"<IsTruncated>false</IsTruncated>{contents}{shared}</ListBucketResult>"
    ).encode()


@contextmanager
def serve_s3() -> Iterator[S3Server]:
    """A server with an empty bucket, until the block ends."""
    from moto.moto_server.werkzeug_app import (
        DomainDispatcherApplication,
        MotoRequestHandler,
        create_backend_app,
    )
    from werkzeug.serving import make_server

    class Quiet(MotoRequestHandler):  # type: ignore[misc]
        def log(self, kind: str, message: str, *args: Any) -> None:
            """Print nothing."""

    application = S3Server(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, application, threaded=True, request_handler=Quiet)
    thread = threading.Thread(target=server.serve_forever, name="S3 server")
    thread.start()
    try:
        application.url = f"http://127.0.0.1:{server.port}"
        make = urllib.request.Request(f"{application.url}/{BUCKET}", method="PUT")
        with urllib.request.urlopen(make, timeout=60):
            pass
        yield application
    finally:
        server.shutdown()
        thread.join(timeout=60)
        server.server_close()


def set_credentials(patch: pytest.MonkeyPatch, url: str) -> None:
    """Let S3 clients of this process and its children reach the server, and nothing else."""
    for name in list(os.environ):
        if name.startswith("AWS_"):
            patch.delenv(name)
    patch.setenv("AWS_ENDPOINT_URL", url)
    patch.setenv("AWS_ACCESS_KEY_ID", "nothing")
    patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    patch.setenv("AWS_CONFIG_FILE", "/dev/null")
    patch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    # Two tries for each of the client's own five: enough for single refusals, and soon over.
    patch.setenv("AWS_MAX_ATTEMPTS", "2")
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        patch.delenv(name, raising=False)


def close_clients() -> None:
    """End the connections of this process to S3."""
    from s3fs import S3FileSystem

    for fs in list(S3FileSystem._cache.values()):
        if fs._s3 is not None:
            S3FileSystem.close_session(fs.loop, fs._s3)
    S3FileSystem.clear_instance_cache()
