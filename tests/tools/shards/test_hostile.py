"""Archives made to do harm do none."""

import io
import resource
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import pytest
import sources
from reading import run_convert, stored_samples

from pipeline.shards.tar import tar_members
from tools.make_shards import main

GB = 1 << 30


def huge_png(side: int) -> bytes:
    """A valid, tiny file that decodes to side x side black pixels."""
    packer = zlib.compressobj(9)
    data = b"".join([packer.compress(bytes(1 + 3 * side)) for _ in range(side)]) + packer.flush()

    def chunk(kind: bytes, body: bytes) -> bytes:
        return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")

    head = side.to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0"
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def hostile_tar(path: Path) -> None:
    """Every trick at once, around four honest images; the ten gigabytes are a hole in a sparse file."""
    with tarfile.open(path, "w") as tar:
        for name in ("/etc/evil.jpg", "../../evil.jpg", "a/../../b.jpg", "fine.jpg"):
            info = tarfile.TarInfo(name)
            content = sources.picture(1, len(name))
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        for name, kind in (("s", tarfile.SYMTYPE), ("l", tarfile.LNKTYPE), ("c", tarfile.CHRTYPE), ("p", tarfile.FIFOTYPE)):
            info = tarfile.TarInfo(f"{name}.jpg")
            info.type, info.linkname, info.devmajor = kind, "/etc/passwd", 1
            tar.addfile(info)
        info = tarfile.TarInfo("bomb.png")
        content = huge_png(14_200)
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
    with path.open("r+b") as file:
        end = next(start for start in range(0, path.stat().st_size, 512) if _is_end(path, start))
        info = tarfile.TarInfo("sparse.jpg")
        info.size = 10 * GB
        file.seek(end)
        file.write(info.tobuf(tarfile.GNU_FORMAT))
        file.truncate(end + 512 + 10 * GB + 1024)


def _is_end(path: Path, start: int) -> bool:
    with path.open("rb") as file:
        file.seek(start)
        if file.read(1024) != bytes(1024):
            return False
    return start >= max(member.offset + member.size for member in tar_members(path))


def test_a_hostile_tar_does_no_harm_within_a_gigabyte(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    hostile_tar(tmp_path / "in/x.tar")
    before = sorted(path.name for path in tmp_path.parent.iterdir())
    command = ["convert", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--max-bad-fraction", "0.5", "--verify", "full"]
    code = (
        # Its own peak from /proc: ru_maxrss of a process still counts the parent that it was forked from, here the tests.
        "import re, resource, sys; from tools.make_shards import main; code = main(sys.argv[1:]);"
        "own = int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]);"
        "print(max(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss));"
        "sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) * 1024 < GB
    assert [sample.label for sample in stored_samples(tmp_path / "out/train")] == [-1] * 4
    rejected = (tmp_path / "out/train/rejected.jsonl").read_text()
    assert "14200x14200 pixels, allowed 50,000,000" in rejected
    assert "10,737,418,240 bytes, allowed" in rejected
    assert before == sorted(path.name for path in tmp_path.parent.iterdir())
    assert not Path("/etc/evil.jpg").exists()


def test_a_long_name_header_of_a_gigabyte_is_refused_unread(tmp_path: Path) -> None:
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, GB
    with (tmp_path / "x.tar").open("wb") as file:
        file.write(info.tobuf(tarfile.GNU_FORMAT))
        file.seek(GB, 1)
        file.write(sources.tar_bytes([("a.jpg", b"x")]))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"x.tar: a header of 1,073,741,824 bytes"):
        list(tar_members(tmp_path / "x.tar"))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


def test_long_names_are_read_as_tarfile_reads_them(tmp_path: Path) -> None:
    names = ["a" * 90 + ".jpg", "b/" * 70 + "c.jpg", "é" * 80 + ".jpg", "d/" * 200 + "e.jpg"]
    for kind in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        path = tmp_path / f"{kind}.tar"
        with tarfile.open(path, "w", format=kind) as tar:
            for name in names:
                tar.addfile(tarfile.TarInfo(name))
        with tarfile.open(path) as tar:
            expected = [(member.name, member.offset_data, member.size) for member in tar]
        assert [tuple(member) for member in tar_members(path)] == expected


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "no such file or folder"),
        (lambda path: path.mkdir(), "no train images found"),
        (lambda path: path.write_bytes(b"no tar" * 1000), "no train images found"),
        (lambda path: sources.class_folders(path, 2, ("Dog", "dog ")), "two classes with one name, 'Dog' and 'dog '"),
    ],
)
def test_a_source_that_cannot_be_read_is_one_clean_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], make: object, message: str
) -> None:
    assert callable(make)
    make(tmp_path / "in")
    assert main(["convert", str(tmp_path / "in"), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_truncated_archive_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    archive = sources.imagenet_archives(tmp_path / "in") / "ILSVRC2012_img_train.tar"
    archive.write_bytes(archive.read_bytes()[:9_000])
    assert main(["convert", str(archive), "--out", str(tmp_path / "out")]) == 2
    assert "truncated or forged" in capsys.readouterr().err


def test_a_val_archive_without_its_devkit_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (sources.imagenet_archives(tmp_path / "in") / "ILSVRC2012_devkit_t12.tar.gz").unlink()
    assert main(["convert", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--split", "val"]) == 2
    assert "put it next to the tar" in capsys.readouterr().err


def test_a_devkit_with_another_checksum_is_refused_in_one_clean_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = sources.imagenet_archives(tmp_path / "in")
    assert main(["convert", str(root), "--out", str(tmp_path / "out"), "--split", "val"]) == 2
    error = capsys.readouterr().err
    assert "its checksum is not that of ImageNet's devkit" in error
    assert error.count("\n") == 1


def test_names_that_try_to_leave_the_folder_stay_labels_in_json(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/x.tar").write_bytes(sources.tar_bytes([("../../../../up.jpg", sources.picture(0, 0))]))
    samples = stored_samples(run_convert(tmp_path / "in", tmp_path / "out"))
    assert [(sample.key, sample.name) for sample in samples] == [("000000000", "../../../../up.jpg")]


@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("kind", ["header", "zeros", "cut"])
def test_a_tar_damaged_in_the_middle_is_refused_not_shortened(inner: bool, kind: str, tmp_path: Path) -> None:
    content = bytearray(sources.tar_bytes([(f"{n}.jpg", bytes([n + 1]) * 700_000) for n in range(4)]))
    third = 2 * (512 + 700_416)
    if kind == "cut":
        content = content[: third + 300_000]
    else:
        content[third : third + 512] = b"\1" * 512 if kind == "header" else bytes(512)
    path, start, stop = tmp_path / "x.tar", 0, None
    path.write_bytes(sources.tar_bytes([("in.tar", bytes(content)), ("z.jpg", b"x" * 9_000)]) if inner else content)
    if inner:
        start, stop = 512, 512 + len(content)
    with pytest.raises(ValueError, match=f"^{path}: .*(damaged|truncated)"):
        list(tar_members(path, start, stop))


def test_the_members_of_a_tar_in_a_tar_end_where_it_ends(tmp_path: Path) -> None:
    inner = sources.tar_bytes([("a.jpg", b"a" * 600), ("b.jpg", b"b")])[: 512 + 1024 + 1024]  # without its end marker
    path = tmp_path / "x.tar"
    path.write_bytes(sources.tar_bytes([("in.tar", inner), ("c.jpg", b"c")]))
    assert [member.name for member in tar_members(path)] == ["in.tar", "c.jpg"]
    found = list(tar_members(path, 512, 512 + len(inner)))
    assert [(member.name, member.size) for member in found] == [("a.jpg", 600), ("b.jpg", 1)]
    assert [path.read_bytes()[member.offset] for member in found] == [ord("a"), ord("b")]
