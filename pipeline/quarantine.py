"""Samples that cannot be decoded: found once, remembered, and replaced without moving any other sample."""

import json
from pathlib import Path

import numpy as np

from pipeline.plan import STAND_IN_STREAM, random_words
from pipeline.shards.index import ShardIndex

LISTED = 10  # bad samples that an error line names
FEW_BAD = 5


def allowed_bad(total: int, share: float) -> int:
    """How many of `total` samples may be bad: the share or, in a small set, five and a tenth; none where the share is 0.

    One of fifty is above a hundredth, and no reason to stop.
    """
    return max(int(share * total), min(FEW_BAD, total // 10)) if share > 0 else 0


class Quarantine:
    """The bad rows of one index, with the reason for each.

    `path`: a file of JSON lines `{shard, key, offset, reason, data}`, with the index's digest as `data`, that is read at the
    start and appended to, one line per sample; None keeps them in memory alone. More bad samples than `allowed_bad` are an
    error.
    """

    def __init__(self, index: ShardIndex, path: Path | None = None, max_share: float = 0.01) -> None:
        self.index, self.path, self.max_share = index, path, max_share
        self.reasons: dict[int, str] = {}
        self._sorted = np.empty(0, np.int64)
        self.reload()

    def __len__(self) -> int:
        return len(self.reasons)

    def reload(self) -> None:
        """Read what this run, or another rank of it, has found so far. Lines about other data are ignored."""
        if self.path is None or not self.path.exists():
            return
        numbers = {name: i for i, name in enumerate(self.index.shards)}
        places: dict[tuple[int, int], str] = {}
        for line in self.path.read_text().splitlines():
            try:
                entry = json.loads(line)
                if entry.get("data", self.index.digest) != self.index.digest:
                    continue  # of another data set, whose tars may have the same names
                places[numbers[entry["shard"]], int(entry["offset"])] = str(entry["reason"])
            except (ValueError, KeyError, TypeError, AttributeError):
                continue  # cut off in the middle by a crash, or of another data set
        samples = self.index.samples
        for row in np.flatnonzero(np.isin(samples["offset"], [offset for _, offset in places])).tolist():
            reason = places.get((int(samples["shard"][row]), int(samples["offset"][row])))
            if reason is not None:
                self.reasons.setdefault(row, reason)
        self._sorted = np.array(sorted(self.reasons), np.int64)

    def add(self, found: dict[int, str]) -> None:
        """Remember the rows with their reasons. Raises ValueError when there are more than `max_share` allows."""
        self.reload()  # another rank may have named them already
        new = {row: reason for row, reason in found.items() if row not in self.reasons}
        self.reasons |= new
        self._sorted = np.array(sorted(self.reasons), np.int64)
        if self.path is not None and new:
            with self.path.open("a") as file:
                file.write("".join(json.dumps(self._entry(row)) + "\n" for row in new))
        allowed = allowed_bad(len(self.index), self.max_share)
        if len(self) > allowed:
            listed = [f"{self.index.describe(row)} ({reason})" for row, reason in list(self.reasons.items())[-LISTED:]]
            where = f"all are listed in {self.path}" if self.path else f"the last {len(listed)} follow"
            raise ValueError(
                f"{self.index.folder}: {len(self)} samples cannot be decoded, more than the {allowed} that "
                f"data.max_bad_share {self.max_share:g} allows; {where}: {'; '.join(listed)}. Repair the shards "
                "(`python tools/make_shards.py verify` names every damaged sample) or raise data.max_bad_share"
            )

    def _entry(self, row: int) -> dict[str, str | int]:
        sample = self.index.samples[row]
        return {
            "shard": self.index.shards[sample["shard"]],
            "key": self.index.key(row),
            "offset": int(sample["offset"]),
            "reason": self.reasons[row],
            "data": self.index.digest,
        }

    def replace(self, rows: np.ndarray, seed: int, epoch: int, start: int) -> np.ndarray:
        """`rows` at the positions `start..start + len(rows)` with a stand-in for each bad one.

        The stand-in is the first good one of a random sequence that belongs to the position, so it does not depend on what
        was known to be bad and when: any run over the same shards sees the same samples.
        """
        bad = np.flatnonzero(np.isin(rows, self._sorted)) if len(self) else ()
        if not len(bad):
            return rows
        rows = rows.copy()
        for place in bad:
            block = 0
            while int(rows[place]) in self.reasons:
                words = random_words(seed, epoch, (block, start + int(place)), STAND_IN_STREAM, 4)
                candidates = (int(word % np.uint64(len(self.index))) for word in words)
                rows[place] = next((row for row in candidates if row not in self.reasons), rows[place])
                block += 1
        return rows
