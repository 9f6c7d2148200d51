"""Check that tars match their index, by their length and the headers of two samples in each."""

import os
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from pipeline.shards.scan import IMAGE_EXTENSIONS
from pipeline.shards.tar import head_kind

BLOCK = tarfile.BLOCKSIZE
LONG_NAME = 90  # characters: writers cut longer names off in the header, at 100 bytes or before
# A network file system answers many questions at once; on a local disk threads cost nothing.
THREADS = 16
CHUNK = 32


def check_shards(places: Sequence[str], samples: np.ndarray, counts: np.ndarray, index: str, rebuild: str) -> None:
    """Raise ValueError for the first tar that is not as the index says, with the number of others.

    At most a `stat` and two reads of 512 bytes for each. `places`: the tars. `samples`, `counts`: as in `ShardIndex`. `index`:
    the name of the index. `rebuild`: how to make it again.
    """
    pairs = first_and_last(samples, counts, index, rebuild)
    tasks = [(places[shard], pair) for shard, pair in pairs.items()]
    chunks = [tasks[k : k + CHUNK] for k in range(0, len(tasks), CHUNK)]
    with ThreadPoolExecutor(THREADS) as pool:
        faults = [fault for chunk in pool.map(_faults, chunks) for fault in chunk]
    if faults:
        more = f" ({len(faults) - 1} more shards are not as the index says)" if len(faults) > 1 else ""
        raise ValueError(faults[0] + more)


def first_and_last(samples: np.ndarray, counts: np.ndarray, index: str, rebuild: str) -> dict[int, np.ndarray]:
    """`[2]` of SAMPLE_DTYPE by shard that has samples. Raises ValueError for an index that is not ordered by shard."""
    used = np.flatnonzero(counts)
    ends = np.cumsum(counts)[used]
    pairs = samples[np.stack([ends - counts[used], ends - 1], axis=1)]  # [shards, 2]
    sane = (pairs["shard"] == used[:, None]) & (pairs["offset"] >= BLOCK) & (pairs["offset"] % BLOCK == 0)
    if not (sane & (pairs["size"] >= 0)).all():
        raise ValueError(f"{index}: damaged, or not ordered by shard. {rebuild}")
    return dict(zip(used.tolist(), pairs, strict=True))


def _faults(tasks: list[tuple[str, np.ndarray]]) -> list[str]:
    return [fault for place, pair in tasks if (fault := shard_fault(place, pair))]


def _headers(pair: np.ndarray) -> list[tuple[int, int]]:
    return [(offset - BLOCK, BLOCK) for offset in pair["offset"].tolist()]


def shard_fault(place: str, pair: np.ndarray) -> str | None:
    """What is wrong with a tar whose first and last sample the index has as `pair`."""
    try:
        with open(place, "rb") as file:
            descriptor = file.fileno()
            size, needed = os.fstat(descriptor).st_size, int((pair["offset"] + pair["size"]).max())
            head = os.pread(descriptor, BLOCK, 0)
            blocks = [os.pread(descriptor, count, offset) for offset, count in _headers(pair)]
    except FileNotFoundError:
        return f"{place}: listed in the index but missing. Copy it again, or rebuild the index"
    except OSError as error:
        return f"{place}: cannot be read ({error.strerror}). Check its permissions"
    if fault := _header_fault(place, pair, blocks, head):
        return fault
    if size < needed:
        return f"{place}: {size:,} bytes, and the index needs {needed:,}: truncated. Copy it again"
    return None


def _header_fault(place: str, pair: np.ndarray, blocks: list[bytes], head: bytes) -> str | None:
    """What is wrong with the headers of the first and last sample. `head`: the beginning of the tar, to say what it is."""
    for sample, block in zip(pair, blocks, strict=True):
        if wrong := _not_the_header(block, int(sample["size"])):
            where = int(sample["offset"]) - BLOCK
            return (
                f"{place}: {_kind(head, block)}: {wrong} at byte {where:,}, where the index has a sample. Copy it again"
            )
    return None


def _not_the_header(block: bytes, size: int) -> str | None:
    try:
        member = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.TarError:
        return "nothing" if not block else "zeros" if not any(block) else "no tar header"
    _, dot, extension = member.name.rpartition("/")[2].rpartition(".")
    # What a link leads to may have no extension.
    if not member.isreg() or (dot and extension.lower() not in IMAGE_EXTENSIONS and len(member.name) < LONG_NAME):
        return f"{member.name}, no image,"
    return f"{member.name} of {member.size:,} bytes instead of {size:,}" if member.size != size else None


def _kind(head: bytes, block: bytes) -> str:
    if (kind := head_kind(head)) != "a tar":
        return kind
    if not block:
        return "truncated"
    return "zero-filled in part" if not any(block) else "of another data set, or damaged"
