"""No copy of a training image lies in the validation split: not the same file, and no resized, encoded or brightened one."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageEnhance
from reading import run_convert, stored_samples

from tools.shards.catalogue import Catalogue, FileRanges, Source, hold_out
from tools.shards.copies import group_copies
from tools.shards.photographs import PHOTOGRAPHS, photograph_path

TILE = 120
CHANGES: dict[str, Callable[[Image.Image], tuple[Image.Image, str, int]]] = {
    "half": lambda image: (image.resize((TILE // 2, TILE // 2), Image.Resampling.LANCZOS), "PNG", 0),
    "two fifths": lambda image: (image.resize((2 * TILE // 5, 2 * TILE // 5)), "WEBP", 80),
    "encoded again": lambda image: (image, "JPEG", 40),
    "darker": lambda image: (ImageEnhance.Brightness(image).enhance(0.7), "PNG", 0),
    "brighter": lambda image: (image.point([level + (255 - level) // 8 for level in range(256)] * 3), "JPEG", 90),
}


def encoded(image: Image.Image, image_format: str = "JPEG", quality: int = 90) -> bytes:
    image.save(out := io.BytesIO(), image_format, quality=quality)
    return out.getvalue()


def groups(contents: list[bytes], path: Path) -> list[int]:
    path.write_bytes(b"".join(contents))
    catalogue, offset = Catalogue([FileRanges(path)]), 0
    for number, content in enumerate(contents):
        catalogue.add(0, offset, len(content), number % 3, str(number))
        offset += len(content)
    return group_copies(catalogue, 1).tolist()


@pytest.fixture(scope="module")
def tiles() -> list[Image.Image]:
    """Up to twelve tiles of each photograph, none of which overlap."""
    found = []
    for package, file, _, _ in PHOTOGRAPHS:
        image = Image.open(photograph_path(package, file)).convert("RGB")
        corners = [(x, y) for y in range(0, image.height - TILE, TILE) for x in range(0, image.width - TILE, TILE)]
        found += [image.crop((x, y, x + TILE, y + TILE)) for x, y in corners[:: len(corners) // 12 + 1]]
    return found


def test_different_photographs_are_no_copies_and_changed_ones_are(tiles: list[Image.Image], tmp_path: Path) -> None:
    originals = [encoded(tile) for tile in tiles]
    alone = groups(originals, tmp_path / "alone")
    assert sum(row != first for row, first in enumerate(alone)) <= len(tiles) // 100
    for name, change in CHANGES.items():
        copies = [encoded(*change(tile)) for tile in tiles]
        both = groups([*originals, *copies], tmp_path / "both")
        # Tiles without detail, such as the black of a retina's picture, are alike and count as copies only as equal files.
        found = [both[row] == both[len(tiles) + row] for row in range(len(tiles))]
        has_detail = [np.asarray(tile.convert("L").resize((16, 16))).std() > 16 for tile in tiles]
        assert np.mean(np.array(found)[has_detail]) >= 0.98, name


def test_plain_images_gradients_and_scans_are_copies_only_as_equal_files(tmp_path: Path) -> None:
    rng, contents = np.random.default_rng(0), []
    for number in range(40):
        plain = Image.new("RGB", (90, 90), (number * 5, 90, 200))
        ramp = np.linspace(number, 255, 90)[:, None] + np.zeros((90, 90)) + rng.normal(0, 2, (90, 90))
        page = Image.new("L", (310, 438), 250)
        for y in range(30, 405, 7):
            x = 30
            while x < 270:
                length = int(rng.integers(4, 30))
                ImageDraw.Draw(page).rectangle((x, y, x + length, y + 3), fill=int(rng.integers(60, 140)))
                x += length + 3
        contents += map(encoded, (plain, Image.fromarray(ramp.clip(0, 255).astype(np.uint8)), page))
    assert groups(contents, tmp_path / "x") == list(range(120))
    assert groups(contents * 2, tmp_path / "x") == list(range(120)) * 2


def test_groups_stay_on_one_side_of_val_ratio(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for trial in range(8):
        contents = [rng.bytes(int(rng.choice([3, 5_000]))) for _ in range(int(rng.integers(10, 30)))]
        contents.append(contents[0][:-1] + b"x")  # of the same size, and of the same beginning if it is long
        everything = [*contents, *(contents[int(k)] for k in rng.integers(0, len(contents), 20))]
        ratio, path = float(rng.choice([0.1, 0.3, 0.5])), tmp_path / f"{trial}.bin"
        first = np.array(groups(everything, path))
        catalogue, offset = Catalogue([FileRanges(path)]), 0
        for number, content in enumerate(everything):
            catalogue.add(0, offset, len(content), int(rng.integers(3)), str(number))
            offset += len(content)
        parts = hold_out(Source("", "", catalogue), first, ratio, trial)
        sides = [[part.catalogue.read(row) for row in range(len(part.catalogue))] for part in parts]
        assert not set(sides[0]) & set(sides[1])
        assert sorted(sides[0] + sides[1]) == sorted(everything)
        assert len(set(sides[1])) == int(len(contents) * ratio)
        named = [{everything[int(name)] for name in group} for part in parts for group in part.copies]
        assert all(len(group) == 1 for group in named)
        assert len(named) == sum(everything.count(content) > 1 for content in contents)


def test_a_large_group_stays_in_train_and_takes_no_share_of_val(tmp_path: Path) -> None:
    catalogue, count = Catalogue([FileRanges(tmp_path)]), 400
    for number in range(count):
        catalogue.add(0, number, 1, number % 2, str(number))
    for size in (1, 2, 10, 11, 100):
        first = np.arange(count)
        first[200 : 200 + size] = 200
        held_out = [hold_out(Source("", "", catalogue), first, 0.2, seed)[1] for seed in range(20)]
        in_val = [part.catalogue.names.count("200") for part in held_out]
        assert any(in_val) == (size <= 10)
        if size > 10:
            assert {len(part.catalogue) for part in held_out} == {int(0.2 * (count - size))}


def test_groups_are_counted_on_the_screen_and_named_in_a_file(
    tiles: list[Image.Image], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in").mkdir()
    detailed = [tile for tile in tiles if np.asarray(tile.convert("L")).std() > 30]
    for number, tile in enumerate(detailed[:24]):
        (tmp_path / f"in/{number:02d}.jpg").write_bytes(encoded(tile))
        for name, change in CHANGES.items():
            (tmp_path / f"in/{number:02d}-{name}").with_suffix(".png").write_bytes(encoded(change(tile)[0], "PNG"))
    run_convert(tmp_path / "in", tmp_path / "out", "--val-ratio", "0.25")
    sides = [{sample.name for sample in stored_samples(tmp_path / "out" / split)} for split in ("train", "val")]
    lines = [
        [json.loads(line) for line in (tmp_path / "out" / split / "copies.jsonl").read_text().splitlines()]
        for split in ("train", "val")
    ]
    assert len(lines[1]) == 6
    assert len(lines[0]) == 18
    for side, named in zip(sides, lines, strict=True):
        assert {name for group in named for name in group} == side
        assert all(len({name[:2] for name in group}) == 1 for group in named)
    said = "copies   144 images are equal or nearly so, in 24 groups, 6 in the largest; no group is in both splits (copies.jsonl)"
    assert said in capsys.readouterr().out
