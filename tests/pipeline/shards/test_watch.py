"""The limit of open files."""

import resource
import subprocess
import sys

from pipeline.shards.watch import allow_open_files


def test_the_limit_of_open_files_is_raised_to_what_is_needed() -> None:
    code = (
        "import resource; from pipeline.shards.watch import allow_open_files\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (256, 4000))\n"
        "allow_open_files(1000); print(resource.getrlimit(resource.RLIMIT_NOFILE))\n"
        "allow_open_files(10); print(resource.getrlimit(resource.RLIMIT_NOFILE))\n"
        "try: allow_open_files(5000)\n"
        "except ValueError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, second, refused = done.stdout.splitlines()
    assert (first, second) == ("(1512, 4000)", "(1512, 4000)")
    assert "5512 open files are needed, the limit is 4000" in refused
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    allow_open_files(0)
    assert resource.getrlimit(resource.RLIMIT_NOFILE) >= before
