"""A local S3 store (moto's) behind a proxy that counts requests, limits the bandwidth and injects faults."""

import http.client
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Self
from unittest.mock import patch
from urllib.request import Request, urlopen

from pipeline.shards.index_file import INDEX_FILES
from pipeline.shards.manifest import MANIFEST_NAME

CHUNK_BYTES = 1 << 16
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}  # fmt: skip
ERROR_CODES = {"500": "InternalError", "503": "SlowDown", "403": "ExpiredToken"}
HOP_HEADERS = ("connection", "transfer-encoding", "date", "server", "content-length")  # the proxy writes its own
Fault = Callable[[int, str], str]
"""The fault of a request, by its number from 1 and its path: a key of ERROR_CODES, `cut` (half of the body), or "" for none."""


@contextmanager
def moto_server() -> Iterator[str]:
    """Yield the URL of a moto server with the bucket `photos`, on a background thread."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    url = "http://{}:{}".format(*server.get_host_and_port())
    try:
        put(url, "photos")
        yield url
    finally:
        server.stop()


def environment(url: str) -> AbstractContextManager[object]:
    """Set the variables with which s3fs, boto3 and subprocesses find the store at `url`; restore the old ones on exit."""
    return patch.dict(os.environ, CREDENTIALS | {"AWS_ENDPOINT_URL": url})


def put(endpoint: str, name: str, content: bytes = b"") -> None:
    """Create a bucket, or an object `BUCKET/KEY`, that requests without credentials can read and write."""
    headers = {"Content-Type": "application/octet-stream", "x-amz-acl": "public-read-write"}
    urlopen(Request(f"{endpoint}/{name}", content, headers, method="PUT"), timeout=60).close()


def put_folder(endpoint: str, folder: Path, prefix: str) -> str:
    """Upload a folder's tars, index and manifest, and return its URL."""
    for path in sorted(folder.iterdir()):
        if path.suffix == ".tar" or path.name in (*INDEX_FILES, MANIFEST_NAME):
            put(endpoint, f"photos/{prefix}/{path.name}", path.read_bytes())
    return f"s3://photos/{prefix}"


class ThrottledProxy:
    """Forwards requests to `target`, with `bytes_per_s` for all responses together. `requests` lists methods and paths."""

    def __init__(self, target: str, bytes_per_s: float = float("inf")) -> None:
        self.bytes_per_s, self.fault, self.requests = bytes_per_s, no_fault, list[str]()
        self._host, self._lock, self._free_at = target.removeprefix("http://"), threading.Lock(), 0.0
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                try:
                    proxy._forward(self)
                except ConnectionError:
                    self.close_connection = True  # the client hung up

            do_PUT = do_POST = do_HEAD = do_DELETE = do_GET

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _forward(self, request: BaseHTTPRequestHandler) -> None:
        # Count the request and decide its fault in one go: clients send requests from several threads.
        with self._lock:
            self.requests.append(f"{request.command} {request.path}")
            fault = self.fault(len(self.requests), request.path)
        body = request.rfile.read(int(request.headers.get("Content-Length", 0)))
        if code := ERROR_CODES.get(fault):
            status, headers = int(fault), {"Content-Type": "application/xml"}
            content = f"<Error><Code>{code}</Code><Message>{code} on purpose</Message></Error>".encode()
            size = str(len(content))
        else:
            upstream = http.client.HTTPConnection(self._host, timeout=60)
            upstream.request(request.command, request.path, body, dict(request.headers))
            response = upstream.getresponse()
            status, headers, content = response.status, dict(response.getheaders()), response.read()
            size = response.headers.get("Content-Length") or str(len(content))  # of HEAD, with an empty body
            upstream.close()
        request.send_response(status)
        for name, value in headers.items():
            if name.lower() not in HOP_HEADERS:
                request.send_header(name, value)
        request.send_header("Content-Length", size)
        request.end_headers()
        if request.command != "HEAD":
            self._send(request, content[: len(content) // 2] if fault == "cut" else content)
        request.close_connection = request.close_connection or fault == "cut"

    def _send(self, request: BaseHTTPRequestHandler, content: bytes) -> None:
        for start in range(0, len(content), CHUNK_BYTES):
            chunk = content[start : start + CHUNK_BYTES]
            # All responses share the bandwidth: each chunk reserves the next free interval and waits for its end.
            if self.bytes_per_s < float("inf"):
                with self._lock:
                    self._free_at = max(self._free_at, time.monotonic()) + len(chunk) / self.bytes_per_s
                    wait_s = self._free_at - time.monotonic()
                time.sleep(max(0.0, wait_s))
            request.wfile.write(chunk)


def no_fault(number: int, path: str) -> str:
    return ""
