"""Names and files that others control: control characters, links, and the limits of a container."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import memory
from pipeline.files import open_append, write_atomic
from pipeline.memory import memory_limit, peak_memory
from pipeline.text import printable

HOSTILE = "\x1b]0;title\x07\x1b[2Jcat\r\n\u202egpj.\udcff"


def test_a_name_cannot_move_the_cursor_and_stays_readable() -> None:
    assert printable(HOSTILE) == r"\x1b]0;title\x07\x1b[2Jcat\r\n\u202egpj.\udcff"
    for name in ("Ä b  c.jpg", "猫", "a\\b", ""):
        assert printable(name) == name
    assert printable("a\nb\t", keep="\n") == "a\nb\\t"


def test_the_error_line_of_a_command_holds_no_control_character(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tools.make_shards", "index", str(tmp_path / HOSTILE.replace("\udcff", ""))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 2  # the name holds one line break
    assert done.stderr.replace("\n", "").isprintable()


def test_links_are_replaced_or_refused_and_never_written_through(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    for name in ("state.json", f".state.json.{os.getpid()}.partial"):
        (tmp_path / name).symlink_to(victim)
    write_atomic(tmp_path / "state.json", "new")
    assert (tmp_path / "state.json").read_text() == "new"
    (tmp_path / "log").symlink_to(victim)
    with pytest.raises(OSError, match="log"):
        open_append(tmp_path / "log")
    assert victim.read_text() == "mine"


def cgroup(root: Path, **limits: str) -> None:
    for path, limit in limits.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(f"{limit}\n")


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/a/b\n", {"a/b/memory.max": "max", "a/memory.max": "3000000"}, 3_000_000),
        ("0::/a/b\n", {"a/b/memory.max": "2000000", "a/memory.max": "3000000"}, 2_000_000),
        ("0::/host/only\n", {"memory.max": "1500000"}, 1_500_000),
        ("4:cpu,memory:/job\n0::/\n", {"memory/job/memory.limit_in_bytes": "1000000"}, 1_000_000),
        ("4:memory:/docker/1\n", {"memory/memory.limit_in_bytes": "1600000"}, 1_600_000),
        ("4:memory:/\n", {"memory/memory.limit_in_bytes": "9223372036854771712"}, None),
        ("5:cpu:/a\n", {"a/memory.max": "5"}, None),
    ],
)
def test_the_memory_of_a_cgroup_is_the_memory_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, groups: str, files: dict[str, str], expected: int | None
) -> None:
    (tmp_path / "own").write_text(groups)
    cgroup(tmp_path / "fs", **files)
    (tmp_path / "fs").mkdir(exist_ok=True)
    monkeypatch.setattr(memory, "CGROUPS", tmp_path / "fs")
    monkeypatch.setattr(memory, "OWN_CGROUPS", tmp_path / "own")
    assert memory_limit() == (expected or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    assert 1 << 20 < peak_memory() < 1 << 40
