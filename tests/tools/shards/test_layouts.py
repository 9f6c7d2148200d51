"""Each layout, as people really have it, ends in shards with the right labels."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import sources
from reading import assert_colours_tell_labels, run_convert, stored_samples

from tools.make_shards import main


def test_the_original_train_archive_keeps_the_usual_labels(tmp_path: Path) -> None:
    folder = run_convert(sources.imagenet_archives(tmp_path / "in"), tmp_path / "out")
    assert assert_colours_tell_labels(folder, 15) == [0, 230, 278]
    assert (folder / "imagenet-train-000000.tar").exists()


def test_the_original_val_archive_maps_devkit_ids_to_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run_convert(sources.imagenet_archives(tmp_path / "in", monkeypatch), tmp_path / "out", "--split", "val")
    assert assert_colours_tell_labels(folder, 5) == [0, 230, 278]


def test_the_archive_may_be_named_directly(tmp_path: Path) -> None:
    archive = sources.imagenet_archives(tmp_path / "in") / "ILSVRC2012_img_train.tar"
    assert assert_colours_tell_labels(run_convert(archive, tmp_path / "out"), 15) == [0, 230, 278]


def test_the_kaggle_tree_is_folders_and_a_list_of_labels(tmp_path: Path) -> None:
    root = sources.kaggle_tree(tmp_path / "in")
    assert assert_colours_tell_labels(run_convert(root, tmp_path / "out"), 12) == [0, 1, 2]
    labels = str(root / "LOC_val_solution.csv")
    folder = run_convert(root, tmp_path / "out", "--split", "val", "--labels", labels)
    assert assert_colours_tell_labels(folder, 3) == [0, 1, 2]


def test_class_folders_are_labelled_in_sorted_order(tmp_path: Path) -> None:
    folder = run_convert(sources.class_folders(tmp_path / "in"), tmp_path / "out")
    assert assert_colours_tell_labels(folder, 24) == [0, 1, 2]


def test_a_flat_folder_has_no_labels(tmp_path: Path) -> None:
    folder = run_convert(sources.class_folders(tmp_path / "in") / "bee", tmp_path / "out")
    assert [sample.label for sample in stored_samples(folder)] == [-1] * 8


@pytest.mark.parametrize("hundred", [True, False])
def test_cifar_keeps_every_pixel_and_label(tmp_path: Path, hundred: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    path, images, labels = sources.cifar_archive(tmp_path / "in", hundred, monkeypatch)
    for sample in stored_samples(run_convert(path, tmp_path / "out")):
        assert sample.label == labels[int(sample.name)]
        assert np.array_equal(sample.pixels(), images[int(sample.name)])


@pytest.mark.parametrize("zipped", [True, False])
def test_idx_files_keep_every_pixel_and_label(tmp_path: Path, zipped: bool) -> None:
    _, images, labels = sources.idx_files(tmp_path / "FashionMNIST/raw", zipped)
    for sample in stored_samples(run_convert(tmp_path / "FashionMNIST", tmp_path / "out")):
        assert sample.label == labels[int(sample.name)]
        assert np.array_equal(sample.pixels()[..., 0], images[int(sample.name)])


def test_parquet_is_spooled_converted_and_the_spool_emptied(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    (tmp_path / "in/data").mkdir(parents=True)
    for file in range(2):
        images = [{"bytes": sources.picture(label, file), "path": "x.jpg"} for label in range(5)]
        table = pyarrow.table({"image": images, "label": list(range(5))})
        parquet.write_table(table, tmp_path / f"in/data/train-{file:05d}-of-00002.parquet")
    folder = run_convert(tmp_path / "in", tmp_path / "out")
    assert assert_colours_tell_labels(folder, 10) == [0, 1, 2, 3, 4]
    assert not list(folder.rglob("*.spool"))
    next(folder.glob("*.tar")).write_bytes(b"damaged")
    assert_colours_tell_labels(run_convert(tmp_path / "in", tmp_path / "out"), 10)


def test_parquet_without_pyarrow_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    (tmp_path / "train-00000.parquet").write_bytes(b"PAR1")
    assert main(["convert", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "pip install -e .[parquet]" in capsys.readouterr().err


def test_a_foreign_webdataset_is_shuffled_and_keyed_again(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for tar in range(2):
        members = []
        for n in range(6):
            label = n % 3
            extra = (f"a/x.{n}.cls", str(label).encode()) if tar else (f"a/x.{n}.json", b'{"label": %d}' % label)
            members += [(f"a/x.{n}.JPEG", sources.picture(label, n)), extra]
        (tmp_path / f"in/{tar}.tar").write_bytes(sources.tar_bytes(members))
    assert assert_colours_tell_labels(run_convert(tmp_path / "in", tmp_path / "out"), 12) == [0, 1, 2]


def test_a_changed_cifar_archive_is_refused_before_its_pickles_are_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return __import__("os").system, (f"touch {tmp_path}/ran",)

    archive = tmp_path / "cifar-10-python.tar.gz"
    archive.write_bytes(sources.tar_bytes([("c/data_batch_1", pickle.dumps({"data": Evil()}))], "w:gz"))
    assert main(["convert", str(archive), "--out", str(tmp_path / "out")]) == 2
    assert "its checksum is not that of CIFAR10: download it again" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()
