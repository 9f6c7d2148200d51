"""Objects on `s3://`, read by DALI's own S3 client, so that no other one is needed.

The client takes its settings from the environment when a process first uses it (`AWS_ENDPOINT_URL` for anything but Amazon's own,
credentials and region as for any AWS tool) and keeps them. Every read is a range request: correct, but slow. Where the disk is
large enough, shards copied to it beforehand feed a GPU better.
"""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

SCHEME = "s3://"
BLOCK = 512  # DALI reads from multiples of a tar's block alone
Range = tuple[int, int]  # offset and size in bytes


def is_s3(place: Path | str) -> bool:
    return isinstance(place, str) and place.startswith(SCHEME)


def download(url: str) -> bytes:
    """A whole object, held in memory. Raises FileNotFoundError that says what to set."""
    fn, pipeline_def = _dali()

    @pipeline_def(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1)
    def graph() -> Any:
        return fn.readers.file(files=[_checked(url)], prefetch_queue_depth=1)[0]

    return _run(graph, url)[0]


def read_ranges(urls: Sequence[str], ranges: Sequence[Sequence[Range]]) -> list[list[bytes]]:
    """The given ranges of each object, whose offsets are multiples of BLOCK.

    Raises FileNotFoundError for an object that cannot be read, or that ends before one of its ranges does.
    """
    fn, pipeline_def = _dali()
    with tempfile.TemporaryDirectory(prefix="multicrop-hjepa-") as folder:
        paths = [os.path.join(folder, f"{i}.idx") for i in range(len(urls))]
        for path, parts in zip(paths, ranges, strict=True):
            lines = [f"part {offset} {size} {k}.part" for k, (offset, size) in enumerate(parts)]
            Path(path).write_text("\n".join([f"v1.2 {len(lines)}", *lines, ""]))
        count = sum(map(len, ranges))

        @pipeline_def(batch_size=count, num_threads=1, device_id=None, prefetch_queue_depth=1)
        def graph() -> Any:
            return fn.readers.webdataset(
                paths=list(map(_checked, urls)),
                index_paths=paths,
                ext=["part"],
                missing_component_behavior="error",
                dont_use_mmap=True,
                prefetch_queue_depth=1,
            )

        found = iter(_run(graph, urls[0] if len(urls) == 1 else f"{len(urls)} objects from {urls[0]} on"))
    return [[next(found) for _ in parts] for parts in ranges]


def _dali() -> tuple[Any, Any]:
    # On first use: DALI takes a second to import, and most indices lie on a disk.
    from nvidia.dali import fn, pipeline_def

    return fn, pipeline_def


def _checked(url: str) -> str:
    bucket, _, key = url.removeprefix(SCHEME).partition("/")
    if not bucket or not key.strip("/"):
        raise FileNotFoundError(f"{url}: not a place on S3; write s3://BUCKET/PREFIX")
    return url


def _run(graph: Any, what: str) -> list[bytes]:
    try:
        built = graph()
        built.build()
        (output,) = built.run()
        return [bytes(np.asarray(output.at(i))) for i in range(len(output))]
    except RuntimeError as error:
        raise FileNotFoundError(f"{what}: {_explain(str(error))}") from None


def _explain(message: str) -> str:
    """DALI's error as one line that names the settings; S3 often does not say whether a key is absent or forbidden."""
    reason = message.split("encountered:")[-1].strip()
    if "current_wds_shard->Read" in reason or "outside of the archive" in reason:
        return "the object ends before the bytes that the index names: truncated, or of another data set"
    detail = reason.partition("curlCode")[2]
    found = f"curl error{detail.splitlines()[0]}" if detail else "no such bucket or key, or no permission to read it"
    if "S3" not in reason:
        found = reason.splitlines()[0]
    endpoint = os.environ.get("AWS_ENDPOINT_URL")
    keys = "set" if os.environ.get("AWS_ACCESS_KEY_ID") and os.environ.get("AWS_SECRET_ACCESS_KEY") else "not set"
    return (
        f"cannot be read from S3 ({found}). Check the name; AWS_ENDPOINT_URL (is "
        f"{endpoint or 'not set: Amazon itself'}), AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (are {keys}; AWS_PROFILE "
        "or a machine's role serve as well) and AWS_DEFAULT_REGION must be set before the process starts"
    )
