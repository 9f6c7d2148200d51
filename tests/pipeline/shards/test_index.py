"""Every defect of shards and index is one clear line at the start."""

import gzip
import io
import os
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline import build_multicrop_dataset
from pipeline.shards.index import SAMPLE_DTYPE, ShardIndex, open_index, save_index, scan_shard
from pipeline.shards.index_file import INDEX_FILES, INDEX_NAME, SAMPLES_NAME, index_files
from tests.conftest import write_shards
from train.run import main

CONFIG = Path(__file__).parents[3] / "configs" / "quickstart.yaml"
SECOND = "photos-000001.tar"


@pytest.fixture
def folder(data_path: Path, index: ShardIndex, tmp_path: Path) -> Path:
    """A copy of the shards, with their index."""
    folder = Path(shutil.copytree(data_path / "train", tmp_path / "train"))
    save_index(folder, list(index.shards), index.samples)
    return folder


def zeroed(content: bytes, start: int, stop: int) -> bytes:
    return content[:start] + bytes(stop - start) + content[stop:]


def other_tar(content: bytes) -> bytes:
    """A sound WebDataset as long as `content`, of other images."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        image = io.BytesIO()
        Image.new("RGB", (400, 300)).save(image, "JPEG")
        info = tarfile.TarInfo("0.jpg")
        info.size = len(image.getvalue())
        tar.addfile(info, io.BytesIO(image.getvalue()))
    return out.getvalue().ljust(len(content), b"\0")


def tar_of_text(content: bytes) -> bytes:
    """A tar with as many members of the same sizes, none of which is an image."""
    out = io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(content)) as old, tarfile.open(fileobj=out, mode="w") as tar:
        for member in old:
            member.name = member.name.replace(".jpg", ".txt")
            tar.addfile(member, old.extractfile(member))
    return out.getvalue()


# The damage to the second tar, and words of the error.
DAMAGE: dict[str, tuple[Callable[[bytes], bytes | None], str]] = {
    "missing": (lambda _: None, "listed in the index but missing"),
    "empty": (lambda _: b"", "empty"),
    "half": (lambda c: c[: len(c) // 2], "truncated"),
    "without its last image's end": (lambda c: c[: len(c.rstrip(b"\0")) - 2000], "truncated"),
    "zero-filled": (lambda c: bytes(len(c)), "zero-filled"),
    "zero-filled head": (lambda c: zeroed(c, 0, 40_000), "zero-filled, at least at its head"),
    "zero-filled second half": (lambda c: zeroed(c, len(c) // 2, len(c)), "zero-filled in part"),
    "noise": (lambda c: np.random.default_rng(0).bytes(len(c)), "not a tar"),
    "text": (lambda c: b"not found\n" * (len(c) // 9), "not a tar"),
    "gzip": (lambda c: gzip.compress(c).ljust(len(c), b"\0"), "gunzip"),
    "another data set's tar": (other_tar, "of another data set"),
    "a tar of text": (tar_of_text, "no image"),
}


@pytest.mark.parametrize("defect", DAMAGE)
def test_a_defective_tar_is_one_line_that_names_it(folder: Path, defect: str) -> None:
    damage, words = DAMAGE[defect]
    tar = folder / SECOND
    content = damage(tar.read_bytes())
    if content is None:
        tar.unlink()
    else:
        tar.write_bytes(content)
    with pytest.raises(ValueError, match=words) as caught:
        open_index(folder)
    assert str(caught.value).startswith(f"{tar}: ")
    assert "\n" not in str(caught.value)


def test_the_command_says_it_in_one_line_and_ends_with_2(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tar = folder / SECOND
    tar.write_bytes(bytes(tar.stat().st_size))
    given = [str(CONFIG), "device=cpu", f"data.data_path={folder.parent}", f"logging.run_dir={folder.parent}"]
    assert main(given) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{tar}: zero-filled" in line


@pytest.mark.parametrize("defect", sorted(set(DAMAGE) - {"missing", "zero-filled second half", "half"}))
def test_without_an_index_the_scan_tells_the_same_tars_apart(folder: Path, defect: str) -> None:
    """The last two stay readable as shorter tars, at these sizes; what was cut off is unknown without an index."""
    tar = folder / SECOND
    tar.write_bytes(DAMAGE[defect][0](tar.read_bytes()) or b"")
    for name in INDEX_FILES:
        (folder / name).unlink()
    if defect == "another data set's tar":
        assert len(open_index(folder)) == 41 + 1 + 22  # without an index it is as good as any
        return
    with pytest.raises(ValueError, match=r"truncated|zero-filled|not a|gunzip|empty|no jpg") as caught:
        open_index(folder)
    assert str(caught.value).startswith(f"{tar}: ")
    assert "\n" not in str(caught.value)


def test_zeros_in_the_middle_of_a_long_tar_are_noticed_without_an_index(tmp_path: Path) -> None:
    tar = write_shards(tmp_path / "train", [4]) / "photos-000000.tar"
    content = tar.read_bytes().rstrip(b"\0")
    tar.write_bytes(content + bytes(2048 - len(content) % 512) + content * 60)
    with pytest.raises(ValueError, match=r"no tar header at byte .*damaged"):
        scan_shard(tar, 0)


def test_several_defective_tars_are_counted(folder: Path) -> None:
    for name in ("photos-000000.tar", "photos-000002.tar"):
        (folder / name).unlink()
    with pytest.raises(ValueError, match=r"photos-000000\.tar: .*\(1 more shards differ from the index\)"):
        open_index(folder)


def test_tars_that_the_index_does_not_list_are_not_passed_over(folder: Path) -> None:
    shutil.copy(folder / SECOND, folder / "photos-000009.tar")
    with pytest.raises(ValueError, match=r"1 more \(photos-000009\.tar, \.\.\.\)\. Move them away, or include them"):
        open_index(folder)
    (folder / "photos-000009.tar").rename(folder / "._photos-000009.tar")  # as a Mac leaves them: no data
    assert len(open_index(folder)) == 103


@pytest.fixture
def unprivileged() -> Iterator[None]:
    """Become nobody for a while, since root can read anything."""
    if os.geteuid() == 0:
        os.seteuid(65534)
        yield
        os.seteuid(0)
    else:
        yield


@pytest.mark.parametrize("name", [SECOND, *INDEX_FILES, "."])
def test_an_unreadable_file_is_named(folder: Path, name: str, request: pytest.FixtureRequest) -> None:
    with tempfile.TemporaryDirectory() as temporary:  # pytest's own folders are closed to other users
        os.chmod(temporary, 0o755)
        copy = Path(shutil.copytree(folder, f"{temporary}/train"))
        os.chmod(copy / name, 0o000)
        request.getfixturevalue("unprivileged")
        place = copy / name if name != "." else copy
        with pytest.raises(ValueError, match=f"^{place}: cannot be read \\(Permission denied\\)"):
            build_multicrop_dataset("custom", temporary)
        if os.getuid() == 0:
            os.seteuid(0)
        os.chmod(copy / name, 0o700)


def test_a_folder_in_place_of_a_tar_is_named(folder: Path) -> None:
    (folder / SECOND).unlink()
    (folder / SECOND).mkdir()
    with pytest.raises(ValueError, match=r"photos-000001\.tar: cannot be read \(Is a directory\)"):
        open_index(folder)


def shifted(index: ShardIndex, **columns: int) -> np.ndarray:
    samples = index.samples.copy()
    for name, by in columns.items():
        samples[name] += by
    return samples


INDEX_DAMAGE: dict[str, tuple[Callable[[ShardIndex], tuple[list[str], list[int], np.ndarray]], str]] = {
    "of no samples": (lambda i: (i.shards, [0, 0, 0], i.samples[:0]), "lists no samples"),
    "of fewer samples than counts": (lambda i: (i.shards, [41, 40, 22], i.samples[:0]), "0 samples, but counts of 103"),
    "of another type": (lambda i: (i.shards, [41, 40, 22], i.samples["offset"]), "samples is int64"),
    "of another row": (lambda i: (i.shards, [41, 40, 22], i.samples[["shard", "offset", "size"]].copy()), "expected is one row"),
    "with other counts": (lambda i: (i.shards, [41, 40, 23], i.samples), "103 samples, but counts of 104"),
    "of fewer shards": (lambda i: (i.shards[:2], [41, 40], i.samples), "103 samples, but counts of 81"),
    "out of order": (lambda i: (i.shards, [41, 40, 22], i.samples[::-1].copy()), "not ordered by shard"),
    "with wrong counts": (lambda i: (i.shards, [40, 41, 22], i.samples), "not ordered by shard"),
    "of shards of another name": (lambda i: (["a.tar", *i.shards[1:]], [41, 40, 22], i.samples), "photos-000000.tar"),
    "shifted by a block": (lambda i: (i.shards, [41, 40, 22], shifted(i, offset=512)), "no tar header at byte"),
    "shifted by a byte": (lambda i: (i.shards, [41, 40, 22], shifted(i, offset=1)), "damaged"),
    "with other sizes": (lambda i: (i.shards, [41, 40, 22], shifted(i, size=-1)), "instead of"),
}


@pytest.mark.parametrize("defect", INDEX_DAMAGE)
def test_an_index_that_does_not_fit_is_one_line(folder: Path, index: ShardIndex, defect: str) -> None:
    change, words = INDEX_DAMAGE[defect]
    shards, counts, samples = change(index)
    for name, content in index_files(dict(zip(shards, counts, strict=True)), samples).items():
        (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=words) as caught:
        open_index(folder)
    assert str(caught.value).startswith(str(folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", INDEX_FILES)
def test_any_damage_to_the_index_is_reported_as_damage(name: str, folder: Path, index: ShardIndex) -> None:
    """Cutting it off anywhere and changing any one byte are noticed, or have no effect."""
    path, rng = folder / name, np.random.default_rng(0)
    content, said = path.read_bytes(), []
    for trial in range(150):
        place = int(rng.integers(len(content)))
        changed = content[:place] if trial % 3 == 0 else content[:place] + bytes([content[place] ^ 255]) + content[place + 1 :]
        path.write_bytes(changed)
        try:
            found = open_index(folder)
        except ValueError as error:
            said.append(str(error))
        else:
            np.testing.assert_array_equal(found.samples, index.samples)
    places = tuple(f"{folder / place}: " for place in INDEX_FILES)
    assert all(line.startswith(places) and "damaged" in line and "\n" not in line for line in said), said
    assert len(said) > 140  # the rest hits the checksum at the end of the samples, which is not read


def test_the_files_of_two_indices_are_never_taken_for_one(folder: Path, index: ShardIndex) -> None:
    """After a crash between the two renames, or with two writers."""
    before = {name: (folder / name).read_bytes() for name in INDEX_FILES}
    save_index(folder, list(index.shards), shifted(index, label=1))
    assert open_index(folder).samples["label"][0] == index.samples["label"][0] + 1
    for name in INDEX_FILES:
        after = (folder / name).read_bytes()
        (folder / name).write_bytes(before[name])
        with pytest.raises(ValueError, match=rf"{SAMPLES_NAME}: damaged, or not of the {INDEX_NAME} next to it"):
            open_index(folder)
        (folder / name).write_bytes(after)
    (folder / SAMPLES_NAME).unlink()
    with pytest.raises(ValueError, match=rf"{SAMPLES_NAME}: missing"):
        open_index(folder)


def test_more_shards_than_one_thread_takes_are_all_looked_at(tmp_path: Path) -> None:
    count = 40
    folder = write_shards(tmp_path / "train", [1] * count)
    index = open_index(folder)
    save_index(folder, list(index.shards), index.samples)
    assert len(open_index(folder)) == count
    for shard in (0, 17, count - 1):
        tar = index.shard_path(shard)
        content = tar.read_bytes()
        tar.write_bytes(bytes(len(content)))
        with pytest.raises(ValueError, match=tar.name):
            open_index(folder)
        tar.write_bytes(content)


@pytest.mark.parametrize("style", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_too_long_for_a_header_are_no_defect(tmp_path: Path, style: int) -> None:
    (tmp_path / "train").mkdir()
    image = io.BytesIO()
    Image.new("RGB", (8, 6)).save(image, "PNG")
    with tarfile.open(tmp_path / "train/long.tar", "w", format=style) as tar:
        for number in range(3):
            info = tarfile.TarInfo(f"{number}" * 150 + ".PNG")
            info.size = len(image.getvalue())
            tar.addfile(info, io.BytesIO(image.getvalue()))
    index = open_index(tmp_path / "train")
    save_index(tmp_path / "train", list(index.shards), index.samples)
    np.testing.assert_array_equal(open_index(tmp_path / "train").samples, index.samples)
    assert index.encoded(2) == image.getvalue()


def test_the_scan_reads_only_heads_of_images(tmp_path: Path) -> None:
    """Only a small part of a large image is read: indexing costs little more than walking the headers."""
    folder = tmp_path / "train"
    folder.mkdir()
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (700, 900, 3), np.uint8))
    for extension, kind in (("jpg", "JPEG"), ("png", "PNG")):
        image = io.BytesIO()
        noise.save(image, kind)
        with tarfile.open(folder / f"{kind}.tar", "w") as tar:
            info = tarfile.TarInfo(f"a.{extension}")
            info.size = len(image.getvalue())
            tar.addfile(info, io.BytesIO(image.getvalue()))
    before = bytes_read()
    index = open_index(folder)
    assert bytes_read() - before < 200_000 < index.samples["size"].min()
    assert index.samples.dtype == SAMPLE_DTYPE
    assert index.samples[["height", "width", "label"]].tolist() == [(700, 900, -1)] * 2


def bytes_read() -> int:
    """Return the number of bytes that this process has read from files."""
    return int(Path("/proc/self/io").read_text().split("rchar: ")[1].split()[0])
