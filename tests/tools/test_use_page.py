"""docs/use.md from its first command to its last line of Python, on small data and on 1,500 photographs.

Long tests both: the commands of README.md, which are nearly the same, run in the quick suite.
"""

import shlex
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.conftest import photographs
from tests.test_readme import ROOT, blocks, commands, reduced, run_here

PAGE = "docs/use.md"
WALLPAPERS = Path("/usr/share/wallpapers")
# Packages that the locks leave out, by the word that marks the commands and blocks of the page that need them.
EXTRAS = {"onnx": ("onnxruntime", "onnxscript"), "transformers": ("transformers",), "parquet": ("pyarrow",)}
pytestmark = pytest.mark.slow
MISSING = [name for name, packages in EXTRAS.items() if not all(map(find_spec, packages))]


def wallpaper_pieces(count: int) -> Iterator[tuple[str, Image.Image]]:
    """Yield pieces of Debian's wallpapers and the names of the wallpapers."""
    rng = np.random.default_rng(0)
    largest = {path.parts[4]: path for path in sorted(WALLPAPERS.glob("*/contents/images/*.[jp][pn]g"))}
    for name, path in largest.items():
        with Image.open(path) as file:
            picture = file.convert("RGB")
        for _ in range(-(-count // len(largest))):
            height = int(rng.integers(picture.height // 6, picture.height // 3))
            width = int(height * rng.uniform(0.75, 1.33))
            x, y = int(rng.integers(0, picture.width - width)), int(rng.integers(0, picture.height - height))
            piece = picture.crop((x, y, x + width, y + height))
            piece.thumbnail((512, 512))
            yield name, piece


def walk(place: Path, pieces: Iterator[tuple[str, Image.Image]], is_small: bool) -> dict[str, Any]:
    """Run the page in `place`, and return the names that its Python blocks define."""
    names = []
    for number, (label, picture) in enumerate(pieces):
        path = place / "photos" / label / f"{number:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path, quality=90)
        names.append((f"{label}/{path.name}", label))
    picture.resize((2 * picture.width, 2 * picture.height)).save(path.with_name("larger.jpg"), quality=90)
    for name in ("one.jpg", "two.jpg"):
        picture.save(place / name)
    (place / "labels.csv").write_text("".join(f"{name},{label}\n" for name, label in names[::3]))
    (place / "configs").symlink_to(ROOT / "configs")
    for line in commands(PAGE):
        words = [word for word in shlex.split(line) if word.removeprefix("--") not in MISSING]
        if is_small:  # the smallest encoder has a class token, which transformers needs
            words = reduced(words) + ["--transformers"] * (words[1:2] == ["tools/export.py"] and "transformers" not in MISSING)
        if words[0] == "python" and not any(word.endswith(tuple(MISSING)) for word in words):
            assert run_here(words, place) == 0, line
    found: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        for code in blocks(PAGE, "python"):
            if not any(name in code for name in (*MISSING, *(() if is_small else ("transformers",)))):
                exec(compile(code, PAGE, "exec"), found)
    return found


def check(place: Path, found: dict[str, Any], count: int) -> None:
    with np.load(place / "features.npz") as file:
        assert len(file["vector"]) == len(file["name"]) == count
    for name in ("features.duplicates.html", "features.neighbours.html", "features.labels.html", "features.labels.csv"):
        assert (place / name).stat().st_size > 1000
    assert "larger.jpg" in (place / "features.duplicates.html").read_text()
    features = found["features"].numpy()
    for name in ("from_onnx", "from_transformers"):
        if name in found:
            np.testing.assert_allclose(np.asarray(found[name]), features, atol=1e-4)


def test_the_page_runs_from_a_folder_to_features_in_other_programs(tmp_path: Path) -> None:
    pieces = ((f"class{number % 2}", picture) for number, picture in enumerate(photographs(60)))
    check(tmp_path, walk(tmp_path, pieces, is_small=True), 61)


@pytest.mark.skipif(not WALLPAPERS.exists(), reason="needs Debian's package plasma-workspace-wallpapers")
def test_the_page_runs_on_photographs_of_a_usual_number_and_size(tmp_path: Path) -> None:
    check(tmp_path, walk(tmp_path, wallpaper_pieces(1500), is_small=False), 1501)
