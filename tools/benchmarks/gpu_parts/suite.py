"""The part of `bench.py gpu` that runs the tests marked `gpu`."""

import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from tools.benchmarks.gpu_parts.part import Case, Line, part
from tools.own_process import die_with_parent

ROOT = Path(__file__).parents[3]
OPTIONS = ("-v", "-rfE", "--tb=no", "-p", "no:cacheprovider", "-m", "gpu and not slow")
OUTCOMES = {
    "PASSED": "passed",
    "FAILED": "failed",
    "SKIPPED": "skipped",
    "ERROR": "errors",
    "XFAIL": "failed as expected",
}
RESULT = re.compile(rf"^(tests/\S+\.py)::(.+?) ({'|'.join(OUTCOMES)})\b")
REASON = re.compile(r"^(?:FAILED|ERROR) (tests/\S+\.py.*?)(?: - (.*))?$")


@part("tests", 0.3)
def suite(case: Case) -> Iterator[Line]:
    """Those that are not `slow`, a row for each file as soon as it is through; without a GPU all of them are skipped."""
    files = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text()]
    if not files:
        raise FileNotFoundError(f"{ROOT / 'tests'}: no tests marked gpu; run this from a clone of the repository")
    command = [sys.executable, "-m", "pytest", *OPTIONS, *(str(path.relative_to(ROOT)) for path in files)]
    python_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": python_path, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, preexec_fn=die_with_parent,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert process.stdout is not None
    last: list[str] = []
    rows = list[Line]()
    for row in rows_of(process.stdout, last):
        rows.append(row)
        yield row
    if process.wait() and not any(row.error for row in rows):
        yield Line("pytest", error=f"exit code {process.returncode}: {' '.join(last) or 'no output'}"[:200])


def rows_of(output: Iterable[str], last: list[str]) -> Iterator[Line]:
    """A row for each file of pytest's verbose output, then one for each failure. `last` keeps the last line."""
    file, counts, failed = "", Counter[str](), list[str]()

    def finished() -> Iterator[Line]:
        if file:
            yield Line(file, {kind: float(count) for kind, count in counts.items()}, " ".join(failed))
        counts.clear()
        failed.clear()

    for text in output:
        last[:] = [text.strip()] if text.strip() else last
        if found := RESULT.match(text):
            if found[1] != file:
                yield from finished()
                file = found[1]
            counts[OUTCOMES[found[3]]] += 1
            if found[3] in ("FAILED", "ERROR"):
                failed.append(found[2])
        elif reason := REASON.match(text):
            yield from finished()
            file = ""
            yield Line(reason[1], error=reason[2] or "failed")
    yield from finished()
