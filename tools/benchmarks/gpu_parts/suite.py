"""The part of `bench.py gpu` that runs the tests marked `gpu`."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tools.benchmarks.gpu_parts.part import Case, Line, part
from tools.shards.convert import die_with_parent

ROOT = Path(__file__).parents[3]
COUNT = re.compile(r"(\d+) (passed|failed|skipped|errors?)\b")
FAILED = re.compile(r"^(?:FAILED|ERROR) (\S+)", re.MULTILINE)


@part("tests", 0.1)
def suite(case: Case) -> Iterator[Line]:
    """Those that are not `slow`; without a GPU all of them are skipped."""
    files = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text()]
    if not files:
        raise FileNotFoundError(f"{ROOT / 'tests'}: no tests marked gpu; run this from a clone of the repository")
    options = ["-q", "-rfE", "--tb=no", "-p", "no:cacheprovider", "-m", "gpu and not slow"]
    command = [sys.executable, "-m", "pytest", *options, *(str(path.relative_to(ROOT)) for path in files)]
    python_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": python_path}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, preexec_fn=die_with_parent
    )
    counts = {kind: float(number) for number, kind in COUNT.findall(done.stdout.splitlines()[-1])}
    failed = FAILED.findall(done.stdout)
    error = "" if done.returncode == 0 else " ".join(failed) or (done.stderr or done.stdout).strip().splitlines()[-1]
    yield Line(f"{len(files)} files", counts, error)
