"""One writer per folder, in real processes."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipeline.lock import exclusive

# Holds the lock until its input ends; with `orphan`, a forked child goes on holding it for a moment after the parent is killed.
HOLD = (
    "import os, sys, time; from pathlib import Path; from pipeline.lock import exclusive\n"
    "with exclusive(Path(sys.argv[1]), 'go'):\n"
    "    parent = os.getpid()\n"
    "    if sys.argv[2:] and not os.fork():\n"
    "        while os.getppid() == parent: time.sleep(0.01)\n"
    "        time.sleep(0.2); os._exit(0)\n"
    "    print('held', flush=True); sys.stdin.read()\n"
)


@contextmanager
def holder(folder: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", HOLD, str(folder), *options]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_the_second_writer_is_told_who_the_first_is_until_that_one_ends(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        message = rf"in use by process {process.pid} on {socket.gethostname()} since 2.* Wait for it, stop it, or go$"
        with pytest.raises(ValueError, match=message), exclusive(tmp_path, "go"):
            pass
    with exclusive(tmp_path, "go"):
        assert (tmp_path / ".lock").read_text().split()[1] == str(os.getpid())


def test_a_killed_writer_leaves_no_lock_behind_even_if_its_child_lives_a_moment_longer(tmp_path: Path) -> None:
    with holder(tmp_path, "orphan") as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        with exclusive(tmp_path, "go"):
            pass


def test_a_lock_is_not_written_through_a_link_and_other_names_do_not_exclude_each_other(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("whole")
    (tmp_path / ".lock").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match="symbolic"), exclusive(tmp_path, "go"):
        pass
    assert (tmp_path / "victim").read_text() == "whole"
    with exclusive(tmp_path, "go", "a"), exclusive(tmp_path, "go", "b"):
        pass
