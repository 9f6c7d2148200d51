"""Samples that cannot be decoded: found once, remembered, and replaced without moving any other sample."""

import json
from pathlib import Path

from pipeline.defaults import MAX_BAD_SHARE
from pipeline.files import open_append
from pipeline.shards.index import ShardIndex
from pipeline.shards.manifest import read_json_lines

MAX_LISTED = 10  # bad samples that an error names
SMALL_SET_BAD = 5  # bad samples that a set of fifty or more can have, whatever the share


def allowed_bad(total: int, share: float) -> int:
    """Return how many of `total` samples can be bad: the share or, in a small set, up to five and a tenth; 0 if the share is 0.

    In a set of 50 images one bad image is already 2 %, which should not stop a run.
    """
    return max(int(share * total), min(SMALL_SET_BAD, total // 10)) if share > 0 else 0


class Quarantine:
    """The bad rows of one index, with the reason for each.

    `path`: a file of JSON lines `{row, shard, key, offset, reason, data}`, with the index's digest as `data`. It is read at the
    start and appended to; the first line makes it, in a folder that must exist by then. None keeps the rows in memory only.
    """

    def __init__(self, index: ShardIndex, path: Path | None = None, max_share: float = MAX_BAD_SHARE) -> None:
        self.index, self.path, self.max_share = index, path, max_share
        self.reasons: dict[int, str] = {}
        self.reload()

    def __len__(self) -> int:
        return len(self.reasons)

    def reload(self) -> None:
        """Read what this run, or another rank of it, has found so far. Lines about other data are ignored."""
        if self.path is None or not self.path.exists():
            return
        for entry in read_json_lines(self.path):
            row, is_ours = entry.get("row"), entry.get("data") == self.index.digest
            if is_ours and isinstance(row, int) and 0 <= row < len(self.index):  # else cut off by a crash, for example
                self.reasons.setdefault(row, str(entry.get("reason")))

    def add(self, faults: dict[int, str]) -> None:
        """Remember these rows with their reasons. Raises ValueError when there are more than `allowed_bad`."""
        self.reload()  # another rank may have found them already
        new = {row: reason for row, reason in faults.items() if row not in self.reasons}
        self.reasons |= new
        if self.path is not None and new:
            with open_append(self.path) as file:
                for row, reason in new.items():
                    sample, key = self.index.samples[row], self.index.key(row)
                    place = {"shard": self.index.shards[sample["shard"]], "key": key, "offset": int(sample["offset"])}
                    file.write(json.dumps({"row": row, **place, "reason": reason, "data": self.index.digest}) + "\n")
        allowed = allowed_bad(len(self.index), self.max_share)
        if len(self) > allowed:
            last = list(self.reasons.items())[-MAX_LISTED:]
            listed = [f"{self.index.describe(row)} ({reason})" for row, reason in last]
            where = f"all are listed in {self.path}" if self.path else f"the last {len(listed)} follow"
            raise ValueError(
                f"{self.index.folder}: {len(self)} samples cannot be decoded, more than the {allowed} that "
                f"data.max_bad_share {self.max_share:g} allows; {where}: {'; '.join(listed)}. Repair the shards "
                "(`python tools/make_shards.py verify` names every damaged sample) or raise data.max_bad_share"
            )
