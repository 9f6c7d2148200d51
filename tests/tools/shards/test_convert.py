"""The same plan gives the same bytes, whatever happens on the way."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import sources
from reading import folder_bytes, run_convert, stored_samples

from pipeline.lock import exclusive
from pipeline.shards.index import open_index
from tools.make_shards import main

SHARDS = ("--num-shards", "6")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sources.class_folders(tmp_path_factory.mktemp("in") / "animals", per_class=40)


@pytest.fixture(scope="module")
def converted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_convert(source, tmp_path_factory.mktemp("reference"), *SHARDS)


@pytest.fixture(scope="module")
def reference(converted: Path) -> dict[str, bytes]:
    return folder_bytes(converted)


@pytest.fixture
def finished(converted: Path, tmp_path: Path) -> Path:
    """A copy of the finished split, in tmp_path."""
    return shutil.copytree(converted, tmp_path / "train")


def test_every_image_is_named_after_the_file_it_was_made_from(converted: Path) -> None:
    index = open_index(converted)
    assert [index.name(row) for row in range(len(index))] == [sample.name for sample in stored_samples(converted)]


@pytest.mark.parametrize("workers", ["2", "4"])
def test_any_number_of_workers_writes_the_same_bytes(
    source: Path, reference: dict[str, bytes], tmp_path: Path, workers: str
) -> None:
    assert folder_bytes(run_convert(source, tmp_path, *SHARDS, "--workers", workers)) == reference


def kill_and_finish(source: Path, out: Path, moments: list[float], options: tuple[str, ...]) -> tuple[int, dict[str, bytes]]:
    """Start a conversion again and again, kill -9 the parent that long after it began to write, then let one run end."""
    command = [sys.executable, "-m", "tools.make_shards", "convert", str(source), "--out", str(out), "--workers", "2", *options]
    unfinished = 0
    for moment in moments:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert process.stdout is not None
        assert process.stdout.readline().startswith(b"layout")  # the last thing before the workers start
        time.sleep(moment)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        unfinished += not (out / "train/manifest.json").exists()
        for whole in (out / "train").glob("*.tar"):
            assert whole.read_bytes()[-1024:] == bytes(1024)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return unfinished, folder_bytes(out / "train")


def test_a_worker_whose_parent_died_before_it_could_ask_to_die_with_it_ends() -> None:
    code = "import os; from tools.own_process import die_with_parent; die_with_parent(os.getppid()); die_with_parent(1 << 30)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 1


def test_three_kills_end_in_the_same_bytes(source: Path, reference: dict[str, bytes], tmp_path: Path) -> None:
    unfinished, found = kill_and_finish(source, tmp_path, [0.01, 0.02, 0.03], SHARDS)
    assert unfinished
    assert found == reference


@pytest.mark.slow
def test_twenty_kills_at_random_moments_end_in_the_same_bytes(tmp_path: Path) -> None:
    source = sources.class_folders(tmp_path / "in", per_class=1_000)
    options = ("--num-shards", "100", "--resize", "32")  # resizing slows the work down enough to be hit in the middle
    expected = folder_bytes(run_convert(source, tmp_path / "once", *options))
    random_moments = random.Random(0)
    moments = [random_moments.uniform(0, 0.1) for _ in range(20)]
    unfinished, found = kill_and_finish(source, tmp_path / "killed", moments, options)
    print(f"{unfinished} of 20 kills came before the end")
    assert unfinished >= 15
    assert found == expected


def test_a_second_conversion_is_refused_and_removes_nothing(
    source: Path, reference: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["convert", str(source), "--out", str(tmp_path), "--workers", "1", *SHARDS]
    (tmp_path / "train/.records").mkdir(parents=True)
    with exclusive(tmp_path / "train", "", ".records/.lock"):
        partial = tmp_path / "train" / ".animals-train-000000.tar.7.partial"
        partial.write_bytes(b"half")
        assert main([*command]) == 2
        error = capsys.readouterr().err
        assert f"train: in use by process {os.getpid()} on " in error
        assert error.count("\n") == 1
        assert partial.exists()
    assert main([*command]) == 0
    assert folder_bytes(tmp_path / "train") == reference


@pytest.mark.parametrize("name", ["animals-train-000002.tar", "index.npy", "index.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flipped", "truncated", "removed"])
def test_a_second_run_repairs_damage(
    source: Path, reference: dict[str, bytes], finished: Path, tmp_path: Path, name: str, damage: str
) -> None:
    path = finished / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content if damage == "flipped" else content[: len(content) // 2])
    if damage == "removed":
        path.unlink()
    run_convert(source, tmp_path, *SHARDS)
    assert folder_bytes(finished) == reference


def test_a_finished_conversion_is_left_alone(
    source: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.glob("*.*")}
    run_convert(source, tmp_path, *SHARDS)
    assert "already complete" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in finished.glob("*.*")}


def test_each_image_is_stored_once_in_equal_shards_and_mixed(source: Path, converted: Path, tmp_path: Path) -> None:
    folder = converted
    samples = stored_samples(folder)
    assert sorted(sample.name for sample in samples) == sorted(str(path.relative_to(source)) for path in source.rglob("*.JPEG"))
    assert all(sample.content == (source / sample.name).read_bytes() for sample in samples)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert [shard["samples"] for shard in manifest["shards"]] == [20] * 6
    for k in range(6):
        assert len({sample.label for sample in samples[20 * k : 20 * k + 20]}) == 3
    assert run_convert(source, tmp_path / "other", *SHARDS, "--seed", "1").exists()
    assert [s.name for s in stored_samples(tmp_path / "other/train")] != [s.name for s in samples]


def test_bad_files_are_left_out_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = sources.class_folders(tmp_path / "in", per_class=30)
    whole = (source / "ant/ant.0.JPEG").read_bytes()
    bad = {"ant/ant.0.JPEG": whole[: len(whole) // 2], "bee/bee.1.JPEG": b"", "cat/cat.2.JPEG": b"GIF89a"}
    bad |= {f"bee/bee.{number}.JPEG": b"" for number in (2, 3, 4)}
    for name, content in bad.items():
        (source / name).write_bytes(content)
    assert main(["convert", str(source), "--out", str(tmp_path / "out"), "--workers", "2"]) == 2
    error = capsys.readouterr().err
    assert "6 of 90 images are bad, allowed 1.00%" in error
    assert any(f"the first: {name}: " in error for name in bad)
    assert not (tmp_path / "out/train/manifest.json").exists()
    folder = run_convert(source, tmp_path / "out", "--max-bad-fraction", "0.07")
    rejected = [json.loads(line) for line in (folder / "rejected.jsonl").read_text().splitlines()]
    assert sorted(entry["name"] for entry in rejected) == sorted(bad)
    assert all(entry["reason"] for entry in rejected)
    assert len(stored_samples(folder)) == 84


@pytest.mark.parametrize(("num_images", "num_bad", "code"), [(60, 5, 0), (60, 6, 2), (30, 3, 0), (30, 4, 2), (9, 1, 2)])
def test_a_few_bad_files_do_not_stop_a_small_set(
    num_images: int, num_bad: int, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = sources.class_folders(tmp_path / "in", per_class=num_images // 3)
    for path in sorted(source.rglob("*.JPEG"))[:num_bad]:
        path.write_bytes(b"")
    assert main(["convert", str(source), "--out", str(tmp_path / "out"), "--workers", "1"]) == code
    if code == 0:
        said = capsys.readouterr().out
        assert f"{num_images - num_bad} images, 1 shard written" in said
        assert f"{num_bad} bad images left out ({tmp_path}/out/train/rejected.jsonl)" in said


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.5])
def test_a_share_of_every_class_is_set_aside_for_validation(ratio: float, tmp_path: Path) -> None:
    source = sources.class_folders(tmp_path / "in", per_class=20)
    arguments = ["convert", str(source), "--out", str(tmp_path / "out"), "--val-ratio", str(ratio)]
    assert main(arguments) == 0
    splits = {name: stored_samples(tmp_path / "out" / name) for name in ("train", "val")}
    names = {name: {sample.name for sample in samples} for name, samples in splits.items()}
    assert not names["train"] & names["val"]
    assert len(names["train"] | names["val"]) == 60
    for label in range(3):
        share = sum(sample.label == label for sample in splits["val"])
        assert abs(share - 20 * ratio) <= 1
    assert main(arguments) == 0  # nothing to do
    assert main([*arguments, "--split", "val"]) == 2
    assert main([*arguments[:4], "--val-ratio", "0.001"]) == 2


@pytest.mark.usefixtures("finished")
def test_another_conversion_is_not_mixed_in(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(source), "--out", str(tmp_path), *SHARDS, "--seed", "3"]) == 2
    assert "another conversion (seed differ)" in capsys.readouterr().err
    assert main(["convert", str(source), "--out", str(tmp_path), *SHARDS, "--val-ratio", "0.1"]) == 2
    assert "another conversion (the images, or --val-ratio, differ)" in capsys.readouterr().err


def test_resize_bounds_the_shorter_side_and_never_enlarges(tmp_path: Path) -> None:
    for number, (height, width) in enumerate([(300, 200), (120, 400), (64, 64), (40, 90)]):
        path = tmp_path / f"in/a/{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(sources.picture(1, number, height, width))
    folder = run_convert(tmp_path / "in", tmp_path / "out", "--resize", "64", "--quality", "80")
    shapes = {sample.name: sample.pixels().shape[:2] for sample in stored_samples(folder)}
    assert shapes == {"a/0.jpg": (96, 64), "a/1.jpg": (64, 213), "a/2.jpg": (64, 64), "a/3.jpg": (40, 90)}
    rows = open_index(folder).samples
    assert sorted(zip(rows["height"].tolist(), rows["width"].tolist(), strict=True)) == sorted(shapes.values())


def test_a_full_disk_is_one_clean_line_and_the_next_run_goes_on(source: Path, tmp_path: Path) -> None:
    """The shell's file size limit replaces a disk that fills up, which would need root rights."""
    command = f"{sys.executable} -m tools.make_shards convert {source} --out {tmp_path}/out --num-shards 1 --workers 1"
    done = subprocess.run(["bash", "-c", f"ulimit -f 40; {command}"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "out/train").glob("*.tar"))
    run_convert(source, tmp_path / "out", "--num-shards", "1")
    assert len(stored_samples(tmp_path / "out/train")) == 120


def test_a_store_is_refused_as_a_place_to_write(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["convert", str(source), "--out", "s3://bucket/prefix"])
    assert "--out: s3://bucket/prefix: must be on this machine" in capsys.readouterr().err
