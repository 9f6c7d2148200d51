"""Labels that go into a WebDataset come out: through convert, and through index as training reads it. No member vanishes."""

import io
import json
import logging
import random
import tarfile
from pathlib import Path

import numpy as np
import pytest
import sources
from reading import assert_colours_tell_labels, run_convert, stored_samples

from pipeline.shards.index import SAMPLE_DTYPE, ShardIndex, open_index
from pipeline.shards.index_file import UNLABELLED
from pipeline.shards.tar import tar_members
from tools.make_shards import main


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(sources.tar_bytes(members))
    return path


def index_labels(folder: Path) -> list[int]:
    assert main(["index", str(folder), "--workers", "1"]) == 0
    return open_index(folder).samples["label"].tolist()


FORMS = {
    "k.image.jpg with k.cls": ("{k}.image.jpg", "{k}.cls", "{n}"),
    "a dotted key": ("{k}.v1.jpg", "{k}.v1.cls", "{n}"),
    "a parent's key": ("a.b/{k}.JPG", "a.b/{k}.cls", "{n}"),
    "json of text": ("{k}.jpg", "{k}.json", '{{"label": "{n}"}}'),
    "json of a float": ("{k}.jpg", "{k}.json", '{{"label": {n}.0}}'),
    "json of a plain number": ("{k}.jpg", "{k}.json", "{n}"),
    "cls of a float": ("{k}.jpg", "{k}.cls", "{n}.0\n"),
    "cls with a byte order mark": ("{k}.jpg", "{k}.cls", "\ufeff{n}"),
}


@pytest.mark.parametrize("form", FORMS)
def test_labels_in_every_usual_form_come_out_of_convert_and_index(form: str, tmp_path: Path) -> None:
    image, label, text = FORMS[form]
    members, labels = [], [n % 3 for n in range(9)]
    for k, n in enumerate(labels):
        members += [(image.format(k=f"{k:04d}"), sources.picture(n, k)), (label.format(k=f"{k:04d}"), text.format(n=n).encode())]
    tar = write_tar(tmp_path / "in/0.tar", members)
    assert assert_colours_tell_labels(run_convert(tar, tmp_path / "out"), 9) == [0, 1, 2]
    assert index_labels(tmp_path / "in") == labels


def test_random_labels_and_keys_come_out_as_they_went_in(tmp_path: Path) -> None:
    rng = random.Random(0)
    for trial in range(12):
        members, expected = [], {}
        for k in range(rng.randint(2, 8)):
            key, label = f"{rng.choice(['', 'a/', 'b.c/'])}{k}{rng.choice(['', '.x', '.2'])}", rng.randint(0, 20_000)
            name = key + rng.choice(["", ".image", ".rgb"]) + rng.choice([".jpg", ".JPEG"])
            text = rng.choice(["{}", " {} \n", "{}.0"]).format(label)
            if rng.random() < 0.5:
                label_member = (f"{key}.cls", text.encode())
            else:
                value = rng.choice([label, float(label), str(label)])
                label_member = (f"{key}.json", json.dumps({"label": value}).encode())
            members += [(name, sources.picture(k, trial)), label_member]
            expected[name] = label
        rng.shuffle(members)
        tar = write_tar(tmp_path / f"{trial}/in/0.tar", members)
        found = {sample.name: sample.label for sample in stored_samples(run_convert(tar, tmp_path / f"{trial}/out"))}
        assert found == expected
        order = [name for name, _ in members if name in expected]
        assert index_labels(tar.parent) == [expected[name] for name in order]


def test_labels_that_are_names_become_classes_in_their_order(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = ["cat", "ant", "bee"]
    members = []
    for k in range(9):
        label = sorted(names).index(names[k % 3])
        members += [(f"{k}.jpg", sources.picture(label, k)), (f"{k}.json", json.dumps({"label": names[k % 3]}).encode())]
    folder = run_convert(write_tar(tmp_path / "in/0.tar", members), tmp_path / "out")
    assert assert_colours_tell_labels(folder, 9) == [0, 1, 2]
    assert json.loads((folder / "manifest.json").read_text())["classes"] == ["ant", "bee", "cat"]
    with caplog.at_level(logging.WARNING):
        assert [row["label"] for row in open_index(tmp_path / "in").samples] == [-1] * 9
    assert "convert" in caplog.text


def test_masks_next_to_an_image_are_parts_of_its_sample(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    members = []
    for k in range(6):
        mask = sources.picture(9, k, image_format="PNG")
        members += [(f"{k}.depth.png", mask), (f"{k}.jpg", sources.picture(k % 2, k)), (f"{k}.cls", b"%d" % (k % 2))]
    tar = write_tar(tmp_path / "in/0.tar", members)
    assert assert_colours_tell_labels(run_convert(tar, tmp_path / "out"), 6) == [0, 1]
    assert "further images of samples (6, such as 0.depth.png" in capsys.readouterr().out
    assert index_labels(tmp_path / "in") == [0, 1] * 3
    without_labels = [(name.replace("depth", "seg"), content) for name, content in members if not name.endswith("cls")]
    write_tar(tmp_path / "masks/0.tar", without_labels)
    assert index_labels(tmp_path / "masks") == [UNLABELLED] * 6


def test_labels_of_no_image_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    members = [(f"img_{k}.jpg", sources.picture(0, k)) for k in range(4)] + [(f"{k}.cls", b"1") for k in range(24)]
    tar = write_tar(tmp_path / "in/0.tar", members)
    folder = run_convert(tar, tmp_path / "out")
    assert "left out: cls members without an image (24, such as 0.cls)" in capsys.readouterr().out
    assert [sample.label for sample in stored_samples(folder)] == [-1] * 4
    with caplog.at_level(logging.WARNING):
        open_index(tmp_path / "in")
    assert "without an image (24, such as 0.cls" in caplog.text


def test_names_of_two_joined_tars_keep_both_images_with_their_labels(tmp_path: Path) -> None:
    parts = [sources.tar_bytes([("a.jpg", sources.picture(n, n)), ("a.cls", b"%d" % n)]) for n in (0, 1)]
    (tmp_path / "in").mkdir()
    (tmp_path / "in/0.tar").write_bytes(b"".join(parts))
    assert assert_colours_tell_labels(run_convert(tmp_path / "in", tmp_path / "out"), 2) == [0, 1]
    assert index_labels(tmp_path / "in") == [0, 1]


def test_a_name_that_occurs_twice_is_the_last_one_as_for_tar(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    members = []
    for label in (0, 1):
        members += [("a.jpg", sources.picture(label, label)), ("./a.cls", b"%d" % label), (f"{label}.txt", b"")]
    tar = write_tar(tmp_path / "in/0.tar", members)
    with caplog.at_level(logging.WARNING):
        assert assert_colours_tell_labels(run_convert(tar, tmp_path / "out"), 1) == [1]
    assert "2 members are replaced by later ones of their name" in caplog.text
    assert index_labels(tmp_path / "in") == [1]


FOREIGN = {
    "annotations/instances.json": json.dumps({"images": [{"id": 1}], "label": [1, 2]}).encode(),
    "captions.json": b'{"a": 1}\n{"a": 2}\n',
    "info.json": b'{"label": "my data"}',
    "big.json": b"[" * 100_000,
}


def test_json_that_belongs_to_no_image_is_named_and_the_folders_are_classes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    members = [(f"{name}/{n}.jpg", sources.picture(label, n)) for label, name in enumerate(("ant", "bee")) for n in range(3)]
    tar = write_tar(tmp_path / "0.tar", [*FOREIGN.items(), *members])
    assert assert_colours_tell_labels(run_convert(tar, tmp_path / "out"), 6) == [0, 1]
    write_tar(
        tmp_path / "0.tar", [*FOREIGN.items(), *((f"images/{name}", content) for name, content in members), ("masks/0.png", b"")]
    )
    run_convert(tar, tmp_path / "b")
    out = capsys.readouterr().out
    assert out.count("json members without an image (4, such as annotations/instances.json)") == 2
    assert "2 classes named by the folders in it: ant, bee" in out
    assert "left out: json members without an image (4, such as annotations/instances.json)" in out


@pytest.mark.parametrize(
    ("extension", "text"),
    [("cls", "3 17 20\n"), ("cls", "[3, 17]"), ("json", "[3, 17]"), ("json", '{"label": [{"x": 1}]}'), ("json", '{"a": 1}\n{}'),
     ("cls", "2000000000"), ("json", '{"label": 1.5}'), ("json", "-7"), ("cls", " ")],
)  # fmt: skip
def test_what_is_not_one_label_is_said_and_one_in_a_list_is_one(
    extension: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    members = [
        (f"{n}.{kind}", sources.picture(2, n) if kind == "jpg" else text.encode())
        for n in range(3)
        for kind in ("jpg", extension)
    ]
    members += [("x.jpg", sources.picture(2, 9)), (f"x.{extension}", b"[2]")]
    folder = run_convert(write_tar(tmp_path / "in/0.tar", members), tmp_path / "out")
    assert sorted(sample.label for sample in stored_samples(folder)) == [-1, -1, -1, 2]
    said = "left out: what is not one number or one name (3, such as "
    assert said in capsys.readouterr().out
    with caplog.at_level(logging.WARNING):
        assert index_labels(tmp_path / "in") == [-1, -1, -1, 2]
    assert said in caplog.text


def test_numbers_among_names_are_names(tmp_path: Path) -> None:
    members = [
        member for n, label in enumerate((b"7", b"dog")) for member in ((f"{n}.jpg", sources.picture(n, 0)), (f"{n}.cls", label))
    ]
    folder = run_convert(write_tar(tmp_path / "0.tar", members), tmp_path / "out")
    assert json.loads((folder / "manifest.json").read_text())["classes"] == ["7", "dog"]
    assert assert_colours_tell_labels(folder, 2) == [0, 1]


def test_backslashes_in_names_are_folders(tmp_path: Path) -> None:
    members = [
        (f"set\\{name}\\{n}.jpg", sources.picture(label, n)) for label, name in enumerate(("ant", "bee")) for n in range(3)
    ]
    tar = write_tar(tmp_path / "0.tar", members)
    assert assert_colours_tell_labels(run_convert(tar, tmp_path / "out"), 6) == [0, 1]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.jpg", 0), ("a.png", 1), ("a.cls", b"0")], "two images with the key 'a'"),
        ([("a.left.jpg", 0), ("a.right.jpg", 1), ("a.cls", b"0")], "two images with the key 'a'"),
    ],
)
def test_labels_that_are_not_clear_are_refused_by_name(
    members: list[tuple[str, bytes | int]], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = [(name, sources.picture(what, 0) if isinstance(what, int) else what) for name, what in members]
    tar = write_tar(tmp_path / "0.tar", whole)
    assert main(["convert", str(tar), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert str(tar) in error
    assert error.count("\n") == 1


def test_hard_links_in_a_tar_are_images_and_symbolic_ones_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "in/0.tar"
    path.parent.mkdir()
    with tarfile.open(path, "w") as tar:
        for name, content in (("b/0.jpg", sources.picture(1, 0)), ("a/0.jpg", sources.picture(0, 0))):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        for kind, name, target in (
            (tarfile.LNKTYPE, "a/1.jpg", "./a/0.jpg"), (tarfile.LNKTYPE, "b/1.jpg", "b/0.jpg"),
            (tarfile.LNKTYPE, "c.jpg", "gone.jpg"), (tarfile.SYMTYPE, "d.jpg", "/etc/passwd"),
        ):  # fmt: skip
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, target
            tar.addfile(link)
    with caplog.at_level(logging.WARNING):
        assert assert_colours_tell_labels(run_convert(path, tmp_path / "out"), 4) == [0, 1]
    assert "2 members without content" in caplog.text
    assert len(index_labels(tmp_path / "in")) == 4
    assert main(["verify", str(tmp_path / "in")]) == 0


def test_hidden_and_system_members_are_passed_over_by_convert_and_index(tmp_path: Path) -> None:
    hidden = ("._0.jpg", "__MACOSX/a/0.jpg", "@eaDir/0.jpg", "a/.thumbs/0.jpg")
    members = [("0.jpg", sources.picture(1, 0)), ("0.cls", b"1"), *((name, b"junk") for name in hidden)]
    tar = write_tar(tmp_path / "in/0.tar", members)
    assert [sample.label for sample in stored_samples(run_convert(tar, tmp_path / "out"))] == [1]
    assert index_labels(tmp_path / "in") == [1]


def test_long_pax_records_and_names_that_are_no_text_are_read(tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    (tmp_path / "in").mkdir()
    names = ["caf\udce9 1/a b.jpg", "caf\udce9 2/\udcff.jpg"]
    with tarfile.open(tmp_path / "in/0.tar", "w", format=tarfile.PAX_FORMAT, errors="surrogateescape") as tar:
        for label, name in enumerate(names):
            content, info = sources.picture(label, 0), tarfile.TarInfo(name)
            info.size, info.pax_headers = len(content), {"LIBARCHIVE.xattr.x": "A" * (2 << 20)}
            tar.addfile(info, io.BytesIO(content))
    assert [member.name for member in tar_members(tmp_path / "in/0.tar")] == names
    folder = run_convert(tmp_path / "in/0.tar", tmp_path / "out")
    assert assert_colours_tell_labels(folder, 2) == [0, 1]
    assert rb"caf\udce9 1" in capfdbinary.readouterr().out
    assert index_labels(tmp_path / "in") == [-1, -1]


def test_an_image_of_another_program_is_named_by_its_member_whatever_lies_behind_it(tmp_path: Path) -> None:
    texts = [b"{", b"[1]", b'"text"', b"3", b'{"label": 1}', b"\xff", b"[" * 100_000, b'{"name": "a cat.png"}']
    members = [part for k, text in enumerate(texts) for part in ((f"{k}.jpg", sources.picture(0, k)), (f"{k}.json", text))]
    images = [member for member in tar_members(write_tar(tmp_path / "0.tar", members)) if member.name.endswith("jpg")]
    samples = np.array([(0, image.offset, image.size, 0, 40, 56) for image in images], SAMPLE_DTYPE)
    index = ShardIndex(tmp_path, ("0.tar",), samples, np.array([len(samples)]))
    assert [index.name(row) for row in range(len(texts))] == [*(f"{k}.jpg" for k in range(len(texts) - 1)), "a cat.png"]


def random_tar(rng: random.Random, number: int) -> bytes:
    """Return a tar of a random format with files, copies under their old names, links, folders and foreign members."""
    out, names = io.BytesIO(), list[str]()
    with tarfile.open(
        fileobj=out, mode="w", format=rng.choice([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
    ) as tar:
        for k in range(rng.randint(1, 12)):
            doubled = names and rng.random() < 0.3
            name = (
                rng.choice(names)
                if doubled
                else f"{rng.choice(['', './', 'a/', 'é/'])}{number}-{k}.{rng.choice(['jpg', 'cls', 'bin'])}"
            )
            info, content = tarfile.TarInfo(name), rng.randbytes(rng.choice([0, 1, 511, 512, 513, 3000]))
            kind = rng.choice([tarfile.REGTYPE] * 5 + [tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE])
            if kind == tarfile.REGTYPE:
                info.size = len(content)
            elif doubled:
                continue  # a link or folder over a file: not what people bring
            elif kind in (tarfile.LNKTYPE, tarfile.SYMTYPE):
                info.linkname = rng.choice([*names, "nowhere"])
            info.type = kind
            tar.addfile(info, io.BytesIO(content) if kind == tarfile.REGTYPE else None)
            names += [name] if kind == tarfile.REGTYPE else []
    return out.getvalue()


def files_of(content: bytes) -> dict[str, bytes]:
    """Return what a tar holds when it is extracted, as tarfile reads it, without symbolic links."""
    files = {}
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        for info in tar:
            if info.isreg() or (info.islnk() and info.linkname != "nowhere"):
                file = tar.extractfile(info)
                assert file is not None
                files[info.name.removeprefix("./")] = file.read()
    return files


def test_random_tars_alone_joined_and_inside_others_hold_what_tarfile_extracts(tmp_path: Path) -> None:
    rng, path = random.Random(0), tmp_path / "x.tar"
    for _ in range(150):
        parts = [random_tar(rng, number) for number in range(rng.choice([1, 1, 2, 3]))]
        joined = b"".join(part + bytes(512 * rng.choice([0, 0, 1, 40])) for part in parts)
        outer = sources.tar_bytes([("in.tar", joined), ("z.jpg", b"x" * 9_000)]) if rng.random() < 0.3 else joined
        path.write_bytes(outer)
        start, stop = (0, None) if outer is joined else (512, 512 + len(joined))
        found = {m.name: outer[m.offset : m.offset + m.size] for m in tar_members(path, start, stop)}
        assert found == {name: content for part in parts for name, content in files_of(part).items()}
