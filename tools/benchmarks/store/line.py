"""An S3 store on the loopback, moto's, and a line to it: counted, as slow as wanted, and failing on request."""

import http.client
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Self
from urllib.request import Request, urlopen

from pipeline.shards.index_file import INDEX_FILES, INDEX_NAME
from pipeline.shards.manifest import MANIFEST_NAME

PIECE = 1 << 16
START_S = 120
SETTINGS = {
    "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}  # fmt: skip
ERRORS = {
    "500": ("InternalError", 500), "503": ("SlowDown", 503), "403": ("ExpiredToken", 403),
}  # fmt: skip
Fault = Callable[[int, str], str]
"""What to do with a request, by its number, from 1, and path: refuse it (500, 503, 403), `cut` it half-way, or "" for nothing."""


@contextmanager
def moto_server() -> Iterator[str]:
    """The URL of a server in a process of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    arguments = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", url.rpartition(":")[2]]
    server = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(START_S * 10):
            try:
                put(url, "photos")
                break
            except OSError:
                if server.poll() is not None:
                    raise ValueError("moto's server does not start: pip install -e '.[dev]'") from None
                time.sleep(0.1)
        yield url
    finally:
        server.terminate()
        server.wait()


def put(endpoint: str, name: str, content: bytes = b"") -> None:
    """Make a bucket, or an object `BUCKET/KEY`."""
    headers = {
        "Content-Type": "application/octet-stream",
        "x-amz-acl": "public-read-write",
    }  # for requests without keys
    urlopen(Request(f"{endpoint}/{name}", content, headers, method="PUT"), timeout=60).close()


def put_folder(endpoint: str, folder: Path, prefix: str) -> str:
    """Upload the tars, the index and the manifest of a folder; returns its URL. Raises ValueError without an index."""
    if not (folder / INDEX_NAME).exists():
        raise ValueError(f"{folder}: no {INDEX_NAME}. Write it with `python tools/make_shards.py index {folder}`")
    for path in sorted(folder.iterdir()):
        if path.suffix == ".tar" or path.name in (*INDEX_FILES, MANIFEST_NAME):
            put(endpoint, f"photos/{prefix}/{path.name}", path.read_bytes())
    return f"s3://photos/{prefix}"


class Line:
    """Forwards requests to `target`. `bytes_per_s`: of all answers together; `fault`: see `Fault`. `requests`: their paths."""

    def __init__(self, target: str, bytes_per_s: float = float("inf")) -> None:
        self.bytes_per_s, self.fault, self.requests = bytes_per_s, no_fault, list[str]()
        self._lock, self._free_at = threading.Lock(), 0.0
        line = self
        host = target.removeprefix("http://")

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                line.forward(self, host)

            do_PUT = do_POST = do_HEAD = do_DELETE = do_GET

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def forward(self, request: BaseHTTPRequestHandler, host: str) -> None:
        with self._lock:
            self.requests.append(f"{request.command} {request.path}")
            fault = self.fault(len(self.requests), request.path)
        body = request.rfile.read(int(request.headers.get("Content-Length", 0)))
        if fault in ERRORS:
            self._refuse(request, *ERRORS[fault])
            return
        upstream = http.client.HTTPConnection(host, timeout=60)
        try:
            upstream.request(request.command, request.path, body, dict(request.headers))
            answer = upstream.getresponse()
            size = int(answer.headers.get("Content-Length", 0))
            request.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("connection", "transfer-encoding", "date", "server", "content-length"):
                    request.send_header(name, value)
            content = None if answer.headers.get("Content-Length") else answer.read()
            request.send_header("Content-Length", str(size if content is None else len(content)))
            request.end_headers()
            if content is not None:
                request.wfile.write(content)
            elif request.command != "HEAD":
                self._send(request, answer, size // 2 if fault == "cut" else size)
            request.close_connection = request.close_connection or fault == "cut"
        except ConnectionError:
            request.close_connection = True  # the client has gone
        finally:
            upstream.close()

    def _send(self, request: BaseHTTPRequestHandler, answer: http.client.HTTPResponse, size: int) -> None:
        while size > 0 and (piece := answer.read(min(PIECE, size))):
            if self.bytes_per_s < float("inf"):
                with self._lock:
                    self._free_at = max(self._free_at, time.monotonic()) + len(piece) / self.bytes_per_s
                    wait = self._free_at - time.monotonic()
                time.sleep(max(0.0, wait))
            request.wfile.write(piece)
            size -= len(piece)

    @staticmethod
    def _refuse(request: BaseHTTPRequestHandler, code: str, status: int) -> None:
        body = f"<Error><Code>{code}</Code><Message>{code} on purpose</Message></Error>".encode()
        request.send_response(status)
        request.send_header("Content-Type", "application/xml")
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(body)


def no_fault(number: int, path: str) -> str:
    return ""


@contextmanager
def environment(url: str) -> Iterator[None]:
    """The settings with which s3fs, boto3 and child processes find the store at `url`."""
    settings = SETTINGS | {"AWS_ENDPOINT_URL": url}
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})
