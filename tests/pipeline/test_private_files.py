"""Names and files that others control: control characters, folders in /tmp, links, and the limits of a container."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from pipeline import memory
from pipeline.files import open_append, private_folder, write_atomic
from pipeline.memory import memory_limit, peak_memory
from pipeline.shards.cache import CacheSettings, ShardCache
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


@pytest.mark.parametrize("trap", ["a link", "writable by all", "of another user", "a file"])
def test_a_folder_that_others_can_have_filled_is_refused(tmp_path: Path, trap: str) -> None:
    folder = tmp_path / "shared"
    victim = tmp_path / "victim"
    victim.mkdir()
    if trap == "a link":
        folder.symlink_to(victim)
    elif trap == "a file":
        folder.touch()
    else:
        folder.mkdir()
        folder.chmod(0o777 if trap == "writable by all" else 0o755)
    if trap == "of another user":
        if os.geteuid() != 0:
            pytest.skip("only root can give a folder away")
        os.chown(folder, 65534, -1)
    with pytest.raises(ValueError, match="cannot be trusted") as caught:
        private_folder(folder)
    assert "\n" not in str(caught.value)
    assert not any(victim.iterdir())


def test_the_default_cache_is_closed_to_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    cache = ShardCache(CacheSettings())
    cache.make()
    assert cache.folder.stat().st_mode & 0o777 == 0o700
    cache.folder.chmod(0o777)
    with pytest.raises(ValueError, match="cannot be trusted"):
        ShardCache(CacheSettings()).make()


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
