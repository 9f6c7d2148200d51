"""Every command and every Python block of the documents runs, in order, on small data and without Docker."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from tests.conftest import photographs
from tests.train.test_run import TINY

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`(python (?:tools/|-m )[^`]+)`")
# A setting that a line of the documents gives itself is kept.
SMALL = [*TINY, "training.max_steps=2"]
PAGES = ("README.md", "CONTRIBUTING.md", "docker/README.md", "docs/method.md", "docs/operating.md", "docs/pipeline.md")
VERBS = ("train", "convert", "doctor", "tensorboard")


def blocks(name: str, language: str) -> list[str]:
    return [text for kind, text in BLOCK.findall((ROOT / name).read_text()) if kind == language]


def commands(name: str) -> list[str]:
    """Return the lines of the bash blocks, with continued lines joined and comments cut off."""
    lines = "".join(blocks(name, "bash")).replace("\\\n", " ").splitlines()
    return [shlex.join(words) for line in lines if (words := shlex.split(line, comments=True))]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, data_path: Path) -> Path:
    """Make a folder like a clone, with the data that the documents mention."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("configs", "docker", "model", "pipeline", "tools", "train"):
        (folder / name).symlink_to(ROOT / name)
    for number, picture in enumerate(photographs(80)):
        path = folder / "photos" / f"class {number % 2}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
    shutil.copytree(data_path, folder / "shards" / "imagenet")
    shutil.copytree(data_path, folder / "shards" / "sample")
    return folder


def run(words: list[str], place: Path) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(words, cwd=place, env=environment, capture_output=True, text=True, timeout=300, check=False)


def run_here(words: list[str], place: Path) -> int:
    """Run `python tools/NAME.py ...` or `python -m train.NAME ...` in this process, which has imported torch already."""
    module = words[2] if words[1] == "-m" else words[1].removesuffix(".py").replace("/", ".")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        try:
            return import_module(module).main(words[3 if words[1] == "-m" else 2 :]) or 0
        except SystemExit as ended:
            return int(ended.code or 0)


def reduced(words: list[str]) -> list[str]:
    """Return the same command for a few photographs, a tiny model and one process."""
    text = " ".join(words)
    if "ILSVRC2012" in text:  # the tests of the layouts read such archives
        photos = "photos/class 1" if "val" in words else "photos"  # train and val of the same images are refused
        words = [photos if word.startswith("ILSVRC") else word for word in words]
        return [word.replace("shards/imagenet", "shards/photos") for word in words]
    words = [word.replace("--nproc_per_node=8", "--nproc_per_node=1") for word in words]  # test_ranks.py has more
    if "train.run" in words or "preview.py" in text or "doctor.py" in text:
        given = {word.partition("=")[0] for word in words}
        short = {"--batch_size": "data.batch_size"}
        given |= {key for flag, key in short.items() if flag in words}
        words += [setting for setting in SMALL if setting.partition("=")[0] not in given]
    if "preview.py" in text:
        words = ["10" if word == "1000" else word for word in words if not word.startswith("training.max_steps")]
    return words


@pytest.fixture(scope="module")
def trained(place: Path) -> Path:
    """Run all commands of README.md in their order, except those of make, which would install and test inside a test."""
    for line in commands("README.md"):
        words = shlex.split(line)
        if words[0] == "make":
            target = words[1]
            dry = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=False)
            assert dry.returncode == 0, dry.stderr
            continue
        words = reduced(words)
        if words[0] == "python" and "train.config" not in words:
            assert run_here(words, place) == 0, line
        else:
            result = run(words, place)
            assert result.returncode == 0, (line, result.stderr)
    return place


def test_every_command_of_the_readme_runs_in_its_order(trained: Path) -> None:
    assert (trained / "runs" / "mine" / "report.html").exists()
    assert (trained / "exported" / "model.safetensors").exists()
    assert (trained / "preview.png").exists()


@pytest.mark.parametrize(("page", "number"), [(page, n) for page in PAGES for n in range(len(blocks(page, "python")))])
def test_every_python_block_runs(page: str, number: int, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained)
    exec(compile(blocks(page, "python")[number], f"{page}, block {number}", "exec"), {})


def test_the_tests_that_the_pages_name_exist() -> None:
    for page in PAGES:
        for name in re.findall(r"`((?:tests/[\w/]*)?test_\w+\.py)`", (ROOT / page).read_text()):
            assert list(ROOT.glob(name if "/" in name else f"tests/**/{name}")), (page, name)


def test_every_tool_that_the_texts_name_in_passing_takes_these_options(capsys: pytest.CaptureFixture[str]) -> None:
    for name in PAGES:
        for line in INLINE.findall((ROOT / name).read_text()):
            words = shlex.split(line)
            options = [word.partition("=")[0] for word in words if word.startswith("--") and word != "--help"]
            verbs = words[2:3] if "bench.py" in line or "make_shards.py" in line else []
            assert run_here([*words[: 3 if words[1] == "-m" else 2], *verbs, "--help"], ROOT) == 0, line
            told = capsys.readouterr().out
            assert [option for option in options if option not in told] == [], line


@pytest.mark.parametrize("line", commands("docker/README.md"))
def test_every_command_for_the_image_starts_what_is_there(line: str, place: Path) -> None:
    """Without Docker, Slurm and Kubernetes: their files exist, and the entrypoint takes what the image would."""
    words = shlex.split(line)
    files = [word for word in words if word.startswith("docker/")]
    assert all((ROOT / file).exists() for file in files), line
    if "multicrop-hjepa" not in words or "run" not in words:
        return
    told = words[words.index("multicrop-hjepa") + 1 :]
    assert told[0] in VERBS, line
    for volume in (word.split(":")[1] for word in words if word.startswith("$PWD/")):
        assert volume in ("/photos", "/app/shards", "/app/runs"), line
    told = ["photos" if word == "/photos" else word for word in told]
    shards = "shards/image" if told[0] == "convert" else "shards/imagenet"
    told = [word.replace("shards/mine", shards).replace("run_name=mine", "run_name=image") for word in told]
    # Training has its own tests: here the entrypoint must find the config and accept the settings.
    told += {"train": ["--print-config"], "doctor": ["--help"]}.get(told[0], [])
    result = run([str(ROOT / "docker" / "entrypoint"), *told], place)
    assert result.returncode == 0, (line, result.stderr)


def test_the_walk_draws_its_pictures(tmp_path: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["python", "tools/example.py", "--out", str(tmp_path / "out"), "--steps", "1"]
    assert run_here(line, place) == 0
    names = ["cross_crop_prediction.png", "global_only.png", "global_with_local_context.png", "overview.png"]
    assert sorted(path.name for path in (tmp_path / "out").glob("*.png")) == names
    capsys.readouterr()
    assert run_here([*line, "--data", "nowhere"], place) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_pictures_and_pages_that_the_texts_link_are_there() -> None:
    for name in PAGES:
        for link in re.findall(r"\]\(([^)#:]+)\)", (ROOT / name).read_text()):
            assert ((ROOT / name).parent / link).exists(), (name, link)
