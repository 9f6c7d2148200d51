"""Objects on `s3://`, `gs://`, `az://`, `hf://` and `https://`, read through fsspec.

A store takes its settings from the environment as its own tools do (`AWS_ENDPOINT_URL` and `AWS_PROFILE`,
`GOOGLE_APPLICATION_CREDENTIALS`, `AZURE_STORAGE_ACCOUNT_NAME`, `HF_TOKEN`). A failing one is asked again, with pauses that grow,
by this module alone: the clients' own repetitions are switched off.
"""

import asyncio
import logging
import os
import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

log = logging.getLogger(__name__)
Answer = TypeVar("Answer")

# The scheme, the extra that installs its client, and what the client needs to know.
STORES = {
    "s3": ("s3", "AWS_ENDPOINT_URL (of another store than Amazon's), AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE"),
    "gs": ("gs", "GOOGLE_APPLICATION_CREDENTIALS, or `gcloud auth application-default login`"),
    "az": ("az", "AZURE_STORAGE_ACCOUNT_NAME with AZURE_STORAGE_ACCOUNT_KEY, or AZURE_STORAGE_CONNECTION_STRING"),
    "hf": ("hf", "HF_TOKEN, for a data set that is not public"),
    "https": ("https", "the proxy and the server's permissions"),
    "http": ("https", "the proxy and the server's permissions"),
}  # fmt: skip
SETTINGS = ("AWS_", "GOOGLE_", "STORAGE_EMULATOR_HOST", "AZURE_", "HF_", "FSSPEC_")  # how the variables begin
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.25, 30.0
ONCE_S = 10.0  # of trying again where somebody waits at a terminal: an index, a listing
STALLED_S = 30.0  # without a byte
# Neither a pause nor another request makes a missing name or a wrong URL right.
FINAL = (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError)
# What the clients raise: OSError has most of fsspec's own, and the others are not to be had without importing all of them.
CLIENT_MODULES = (
    "aiohttp",
    "botocore",
    "aiobotocore",
    "gcsfs",
    "google",
    "azure",
    "huggingface_hub",
    "httpx",
    "requests",
)


class StoreError(OSError):
    """A store does not give what the run needs, after all repetitions."""


class MissingObject(StoreError, FileNotFoundError):
    """A store says that there is no such object."""


def scheme(place: Path | str) -> str:
    """`s3` of `s3://...`; "" for a local path."""
    name = place.partition("://")[0] if isinstance(place, str) and "://" in place else ""
    return name if name in STORES else ""


def check_prefix(url: str) -> None:
    """Raise ValueError for a URL of a store that does not name a bucket."""
    kind, _, rest = url.partition("://")
    if not rest.strip("/").partition("/")[0]:
        raise ValueError(f"{url}: not a place in a store; write {kind}://BUCKET/PREFIX")


def is_remote(place: Path | str) -> bool:
    return scheme(place) != ""


def read(url: str, retry_s: float = ONCE_S) -> bytes:
    """A whole small object. Raises MissingObject or StoreError."""
    return repeated(lambda fresh: _open(url, fresh, "cat_file")(), url, retry_s)


def read_range(url: str, offset: int, size: int, retry_s: float = ONCE_S) -> bytes:
    """`size` bytes of an object, fewer when it ends before. Raises MissingObject or StoreError."""
    return repeated(lambda fresh: _open(url, fresh, "cat_file")(start=offset, end=offset + size), url, retry_s)


def sizes(folder: str) -> dict[str, int] | None:
    """The size of each object directly under the prefix, by name; None where the store does not list them."""
    if scheme(folder) in ("http", "https"):
        return None
    try:
        entries = repeated(lambda fresh: _open(folder, fresh, "ls")(detail=True), folder, ONCE_S)
    except StoreError:
        return None
    return {entry["name"].rpartition("/")[2]: int(entry["size"] or 0) for entry in entries if entry["type"] == "file"}


def download(url: str, path: Path, fresh: bool = False) -> None:
    """Stream a whole object into a file, once: for `repeated`, which understands what it raises."""
    _open(url, fresh, "get_file")(str(path))


def upload(path: Path, url: str, retry_s: float) -> None:
    """Write a file to an object, which appears under its name when it is complete. Raises StoreError."""

    def put(fresh: bool) -> None:
        system, place = _file_system(url, fresh)
        system.put_file(str(path), place)

    repeated(put, url, retry_s)


def repeated(ask: Callable[[bool], Answer], url: str, retry_s: float) -> Answer:
    """The answer of `ask(fresh)`, asked again for `retry_s` seconds while the store fails; `fresh`: with a new connection and
    credentials that are read anew.

    Raises MissingObject at once for an object that does not exist, and StoreError when the time is over.
    """
    started, pause, fresh = time.monotonic(), FIRST_PAUSE_S, False
    while True:
        try:
            return ask(fresh)
        except StoreError:
            raise
        except FINAL as error:
            kind = MissingObject if isinstance(error, FileNotFoundError) else StoreError
            raise kind(f"{url}: {explain(error)}. {_what_to_check(url)}") from None
        except Exception as error:
            if not _is_of_the_store(error):
                raise
            denied = isinstance(error, PermissionError) and not _names_credentials(error)  # no pause will change that
            left = 0.0 if denied else retry_s - (time.monotonic() - started)
            if left <= 0:
                tried = "" if denied else f", tried for {retry_s:g} s"
                raise StoreError(f"{url}: {explain(error)}{tried}. {_what_to_check(url)}") from None
            fresh = _names_credentials(error)
            wait = min(pause * random.uniform(0.75, 1.25), left)  # many ranks shall not come back at the same moment
            if pause > 1:
                log.warning(f"{url}: {explain(error)}; trying again in {wait:.0f} s")
            time.sleep(wait)
            pause = min(2 * pause, LONGEST_PAUSE_S)


def explain(error: BaseException) -> str:
    """A client's error in one line."""
    said = getattr(error, "strerror", None) or str(error)
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    if isinstance(error, FileNotFoundError):
        return "no such object, bucket or container"
    if isinstance(error, TimeoutError | asyncio.TimeoutError):
        return "no answer in time"
    return (lines[0][:200] if lines else type(error).__name__).rstrip(".")


def _is_of_the_store(error: Exception) -> bool:
    return isinstance(error, OSError | asyncio.TimeoutError) or type(error).__module__.startswith(CLIENT_MODULES)


def _names_credentials(error: Exception) -> bool:
    return "credential" in str(error).lower() or "token" in str(error).lower()


def _what_to_check(url: str) -> str:
    return f"Check the name, the network and {STORES[scheme(url)][1]}"


def _open(url: str, fresh: bool, method: str) -> Callable[..., Any]:
    system, place = _file_system(url, fresh)
    return partial(getattr(system, method), place)


# By process, as a fork copies no connection, by scheme, and by the settings of the environment that the client read.
_SYSTEMS: dict[tuple[int, str, frozenset[tuple[str, str]]], Any] = {}


def _file_system(url: str, fresh: bool = False) -> tuple[Any, str]:
    """fsspec's file system for a URL, and the URL as it names it; `fresh`: not the one used so far."""
    kind = scheme(url)
    key = os.getpid(), kind, frozenset(item for item in os.environ.items() if item[0].startswith(SETTINGS))
    system = _SYSTEMS.get(key)
    if system is None or fresh:
        import fsspec  # here, so that shards on a local disk need no client

        try:
            client = fsspec.get_filesystem_class(kind)
            system = client(**_settings(kind), use_listings_cache=False, skip_instance_cache=True)
        except ImportError as error:
            missing = str(error).rstrip(".")
            raise ValueError(f"{missing}. For {kind}:// run `pip install -e '.[{STORES[kind][0]}]'`") from None
        if kind == "s3":
            system.retries = 1
        _SYSTEMS[key] = system
    return system, system._strip_protocol(url)


def _settings(kind: str) -> dict[str, Any]:
    if kind == "s3":
        once = {"retries": {"total_max_attempts": 1}, "connect_timeout": STALLED_S, "read_timeout": STALLED_S}
        return {"config_kwargs": once, "max_concurrency": 1}
    if kind in ("http", "https"):
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=STALLED_S, sock_read=STALLED_S)
        return {"client_kwargs": {"timeout": timeout}}
    return {}
