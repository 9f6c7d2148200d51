"""Where shards lie: a folder of files, or a prefix on `s3://`, `gs://`, `az://`, `hf://` or `https://`, read through fsspec.

A store takes its settings from the environment as its own tools do (`AWS_ENDPOINT_URL` and `AWS_PROFILE`,
`GOOGLE_APPLICATION_CREDENTIALS`, `AZURE_STORAGE_ACCOUNT_NAME`, `HF_TOKEN`). Failed requests are retried with exponential
backoff, by this module only: the clients' own retries are switched off.
"""

import logging
import os
import random
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

log = logging.getLogger(__name__)
Result = TypeVar("Result")

# The scheme, the extra that installs its client, and what the client needs to know.
STORES = {
    "s3": ("s3", "AWS_ENDPOINT_URL (of another store than Amazon's), AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE"),
    "gs": ("gs", "GOOGLE_APPLICATION_CREDENTIALS, or `gcloud auth application-default login`"),
    "az": ("az", "AZURE_STORAGE_ACCOUNT_NAME with AZURE_STORAGE_ACCOUNT_KEY, or AZURE_STORAGE_CONNECTION_STRING"),
    "hf": ("hf", "HF_TOKEN, for a data set that is not public"),
    "https": ("https", "the proxy and the server's permissions"),
    "http": ("https", "the proxy and the server's permissions"),
}  # fmt: skip
SETTINGS = ("AWS_", "GOOGLE_", "STORAGE_EMULATOR_HOST", "AZURE_", "HF_", "FSSPEC_")  # prefixes of environment variables
FIRST_PAUSE_S, MAX_PAUSE_S = 0.25, 30.0
INTERACTIVE_RETRY_S = 10.0  # where somebody waits at a terminal: for an index, a listing
STALLED_S = 30.0  # without a byte
PERMANENT_ERRORS = (NotADirectoryError, IsADirectoryError, ValueError)  # retrying cannot fix a wrong URL
# The clients raise OSError, most of fsspec's errors, and some of their own, which are told by their module: importing them
# would pull in every client.
CLIENT_MODULES = (
    "aiohttp", "botocore", "aiobotocore", "gcsfs", "google", "azure", "huggingface_hub", "httpx", "requests",
)  # fmt: skip
SPARE_FILES = 512  # for everything but shards: libraries, sockets, logs


class StoreError(OSError):
    """A store does not give what the run needs, after all retries."""


class MissingObject(StoreError, FileNotFoundError):
    """A store says that there is no such object."""


def scheme(place: Path | str) -> str:
    """`s3` for `s3://...`; "" for a local path."""
    name = place.partition("://")[0] if isinstance(place, str) and "://" in place else ""
    return name if name in STORES else ""


def is_remote(place: Path | str) -> bool:
    return scheme(place) != ""


def join(folder: Path | str, name: str) -> str:
    """The path or URL of `name` in a folder or under a prefix."""
    return f"{str(folder).rstrip('/')}/{name}" if is_remote(folder) else os.path.join(folder, name)


def check_prefix(url: str) -> None:
    """Raise ValueError for a URL of a store that does not name a bucket."""
    kind, _, path = url.partition("://")
    if not path.strip("/").partition("/")[0]:
        raise ValueError(f"{url}: not a place in a store; write {kind}://BUCKET/PREFIX")


def read_bytes(place: Path | str, offset: int = 0, size: int | None = None) -> bytes:
    """Return the content of a file or object, or `size` bytes of it from `offset` on, fewer where it ends.

    Raises FileNotFoundError, StoreError, and ValueError for an unreadable file.
    """
    if is_remote(place):
        start, stop = offset or None, None if size is None else offset + size
        return _request(str(place), INTERACTIVE_RETRY_S, lambda system, path: system.cat_file(path, start=start, end=stop))
    try:
        with open(place, "rb") as file:
            file.seek(offset)
            return file.read(size)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"{place}: cannot be read ({error.strerror}). Check its permissions") from None


def read_whole(place: Path | str, limit: int, retry_s: float = INTERACTIVE_RETRY_S) -> bytes:
    """Return the content of a file or object. Raises as `read_bytes`; ValueError or StoreError above `limit` bytes."""
    if not is_remote(place):
        content = read_bytes(place, 0, limit + 1)
        if len(content) > limit:
            raise ValueError(_too_long(place, limit))
        return content
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "object")
        retry(lambda fresh: download(str(place), path, limit, fresh), str(place), retry_s)
        return path.read_bytes()


def sizes(folder: str) -> dict[str, int] | None:
    """Return the size of each object directly under the prefix, by name; None where the store does not list them."""
    if scheme(folder) in ("http", "https"):
        return None
    try:
        entries = _request(folder, INTERACTIVE_RETRY_S, lambda system, path: system.ls(path, detail=True))
    except StoreError:
        return None
    return {entry["name"].rpartition("/")[2]: int(entry["size"] or 0) for entry in entries if entry["type"] == "file"}


def download(url: str, path: Path, limit: int, fresh: bool = False) -> None:
    """Stream an object into a file, once. Call it through `retry`, which understands what the clients raise.

    Raises ValueError, which is not retried, as soon as it has more than `limit` bytes.
    """
    left = limit

    def count(num_bytes: int) -> None:
        nonlocal left
        if (left := left - num_bytes) < 0:
            raise ValueError(_too_long(url, limit))

    system, remote_path = _file_system(url, fresh)
    # A server can announce one size and send another: only what arrives counts.
    meter = SimpleNamespace(set_size=lambda size: None, relative_update=count)
    system.get_file(remote_path, str(path), callback=meter)


def _too_long(place: Path | str, limit: int) -> str:
    return f"{place}: longer than the {limit:,} bytes that it can have"


def _request(url: str, retry_s: float, call: Callable[[Any, str], Result]) -> Result:
    return retry(lambda fresh: call(*_file_system(url, fresh)), url, retry_s)


def retry(request: Callable[[bool], Result], url: str, retry_s: float) -> Result:
    """Return `request(fresh)`, retried for `retry_s` seconds while the store fails.

    `fresh` asks for a new connection and new credentials. Raises MissingObject at once for an object that does not exist, and
    StoreError when the time is over.
    """
    started, pause_s, fresh = time.monotonic(), FIRST_PAUSE_S, False
    what_to_check = f"Check the name, the network and {STORES[scheme(url)][1]}"
    while True:
        try:
            return request(fresh)
        except StoreError:
            raise
        except FileNotFoundError:
            raise MissingObject(f"{url}: no such object, bucket or container. {what_to_check}") from None
        except PERMANENT_ERRORS as error:
            raise StoreError(f"{url}: {_first_line(error)}. {what_to_check}") from None
        except Exception as error:
            if not isinstance(error, OSError) and not type(error).__module__.startswith(CLIENT_MODULES):
                raise
            fresh = any(word in str(error).lower() for word in ("credential", "token"))
            denied = isinstance(error, PermissionError) and not fresh  # no pause will change that
            left_s = 0.0 if denied else retry_s - (time.monotonic() - started)
            if left_s <= 0:
                tried = "" if denied else f", tried for {retry_s:g} s"
                raise StoreError(f"{url}: {_first_line(error)}{tried}. {what_to_check}") from None
            if pause_s > 1:
                log.warning(f"{url}: {_first_line(error)}; trying again in {pause_s:.0f} s")
            time.sleep(min(pause_s * random.uniform(0.75, 1.25), left_s))  # so that many ranks do not come back at once
            pause_s = min(2 * pause_s, MAX_PAUSE_S)


def _first_line(error: BaseException) -> str:
    """Return a client's error in one line."""
    if isinstance(error, TimeoutError):
        return "no answer in time"
    text = (getattr(error, "strerror", None) or str(error)).strip() or type(error).__name__
    return text.splitlines()[0].strip()[:200].rstrip(".")


# By process, since a fork copies no connection, by scheme, and by the environment variables that the client read.
_SYSTEMS: dict[tuple[int, str, frozenset[tuple[str, str]]], Any] = {}


def _file_system(url: str, fresh: bool = False) -> tuple[Any, str]:
    """Return fsspec's file system for a URL, and the URL as it names it. `fresh` makes a new one."""
    kind = scheme(url)
    key = os.getpid(), kind, frozenset(item for item in os.environ.items() if item[0].startswith(SETTINGS))
    if key not in _SYSTEMS or fresh:
        import fsspec  # here, so that shards on a local disk need no client

        try:
            client = fsspec.get_filesystem_class(kind)
            system = client(**_options(kind), use_listings_cache=False, skip_instance_cache=True)
        except ImportError as error:
            missing = str(error).rstrip(".")
            raise ValueError(f"{missing}. For {kind}:// run `pip install -e '.[{STORES[kind][0]}]'`") from None
        if kind == "s3":
            system.retries = 1
        _SYSTEMS[key] = system
    return _SYSTEMS[key], _SYSTEMS[key]._strip_protocol(url)


def _options(kind: str) -> dict[str, Any]:
    if kind == "s3":
        once = {"retries": {"total_max_attempts": 1}, "connect_timeout": STALLED_S, "read_timeout": STALLED_S}
        return {"config_kwargs": once, "max_concurrency": 1}
    if kind in ("http", "https"):
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=STALLED_S, sock_read=STALLED_S)
        return {"client_kwargs": {"timeout": timeout}}
    return {}


def allow_open_files(count: int) -> None:
    """Let this process open `count` files more than the usual few hundred. Raises ValueError if the system forbids it."""
    needed = count + SPARE_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        if hard != resource.RLIM_INFINITY and hard < needed:
            raise ValueError(
                f"reading the shards needs {needed} open files and this system allows {hard}. Raise it "
                "(`ulimit -Hn`, or LimitNOFILE of the service)"
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
