"""A damaged image is left out by name; sound pixels are kept whatever their metadata; wide pixels are scaled by one rule."""

import io
import json
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import sources
from PIL import Image, features
from reading import run_convert, stored_samples

from tools.shards.images import CheckedImage, ImagePolicy, check_image

SOUND = np.asarray(Image.open(io.BytesIO(sources.picture(3, 1))).convert("RGB"))


def encode(image: Image.Image, image_format: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, image_format, **options)
    return out.getvalue()


def pixels_of(checked: CheckedImage) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(checked.content)).convert("RGB"))


def chunk(kind: bytes, body: bytes, sound: bool = True) -> bytes:
    checksum = zlib.crc32(kind + body) ^ (not sound)
    return len(body).to_bytes(4, "big") + kind + body + checksum.to_bytes(4, "big")


def damage(content: bytes, rng: np.random.Generator) -> bytes:
    """Some bytes changed, a piece overwritten, or the end cut off."""
    data, kind = bytearray(content), int(rng.integers(4))
    if kind == 0:
        return bytes(data[: int(rng.integers(len(data)))])
    start = int(rng.integers(len(data)))
    if kind == 1:
        data[start : start + 40] = rng.bytes(len(data[start : start + 40]))
    for place in rng.integers(0, len(data), 1 if kind == 2 else 8).tolist():
        data[place] = int(rng.integers(256))
    return bytes(data)


FORMATS = ["JPEG", "PNG", "WEBP", "TIFF", *(["AVIF"] if features.check("avif") else [])]


def check_damage(image_format: str, trials: int) -> int:
    """Try damaged files; returns how many are rejected."""
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.fromarray(SOUND)
    options = {"compression": "tiff_lzw"} if image_format == "TIFF" else {"exif": exif}
    whole, rng, rejected = encode(image, image_format, **options), np.random.default_rng(0), []
    for trial in range(trials):
        content = damage(whole, rng)
        try:
            checked = check_image(content, f"x.{image_format.lower()}", ImagePolicy("full"))
        except ValueError as error:
            rejected.append(str(error))
        else:
            assert pixels_of(checked).shape == (checked.height, checked.width, 3), trial
    assert all(reason and "\n" not in reason for reason in rejected)
    return len(rejected)


@pytest.mark.parametrize("image_format", FORMATS)
def test_damaged_files_are_an_image_or_a_named_rejection(image_format: str) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        assert 2 < check_damage(image_format, 40) <= 40


@pytest.mark.slow
@pytest.mark.parametrize("image_format", FORMATS)
def test_many_damaged_files_are_an_image_or_a_named_rejection(image_format: str) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        assert 20 < check_damage(image_format, 400) < 400


def broken_scan() -> bytes:
    content = bytearray(sources.picture(1, 1, 64, 64))
    table = content.index(b"\xff\xc4")
    content[table + 5 : table + 21] = b"\xff" * 16  # Huffman codes that cannot be
    return bytes(content)


def test_an_image_that_does_not_decode_is_left_out_of_the_shards_by_name(tmp_path: Path) -> None:
    source = sources.class_folders(tmp_path / "in")
    (source / "bee/broken.jpg").write_bytes(broken_scan())
    folder = run_convert(source, tmp_path / "out")
    (rejected,) = map(json.loads, (folder / "rejected.jsonl").read_text().splitlines())
    assert rejected["name"] == "bee/broken.jpg"
    assert "does not decode" in rejected["reason"]
    assert len(stored_samples(folder)) == 24


@pytest.mark.parametrize("where", ["EXIF", "APP13"])
def test_the_end_of_a_thumbnail_is_not_the_end_of_the_image(where: str) -> None:
    thumbnail = sources.picture(3, 1, 16, 16)
    body = (b"Exif\0\0MM\0*\0\0\0\x08\0\0" if where == "EXIF" else b"Photoshop 3.0\0") + thumbnail
    segment = (b"\xff\xe1" if where == "EXIF" else b"\xff\xed") + (len(body) + 2).to_bytes(2, "big") + body
    whole = sources.picture(3, 1, 200, 300)
    content = whole[:2] + segment + whole[2:]
    assert check_image(content, "x.jpg", ImagePolicy()).height == 200
    cut = content[: len(segment) + (len(whole) * 6) // 10]
    assert b"\xff\xd9" in cut
    with pytest.raises(ValueError, match="truncated"):
        check_image(cut, "x.jpg", ImagePolicy())


PNG = encode(Image.fromarray(SOUND), "PNG")
BROKEN_METADATA = {
    "eXIf": chunk(b"eXIf", b"MM\0*\xff\xff\xff\xff" + b"\xff" * 20),
    "checksum of a text": chunk(b"tEXt", b"Comment\0hello", sound=False),
    "huge text": chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(80 << 20))),
    "colour profile": chunk(b"iCCP", b"x\0\0not zlib"),
}


@pytest.mark.parametrize("kind", BROKEN_METADATA)
@pytest.mark.parametrize("place", ["before", "after"])
def test_broken_metadata_of_a_png_cost_no_pixels(kind: str, place: str) -> None:
    at = 33 if place == "before" else PNG.index(b"IEND") - 4
    checked = check_image(PNG[:at] + BROKEN_METADATA[kind] + PNG[at:], "x.png", ImagePolicy("full"))
    assert np.array_equal(pixels_of(checked), SOUND)


def test_broken_exif_of_a_jpeg_costs_no_pixels() -> None:
    whole = sources.picture(3, 1)
    for body in (b"Exif\0\0", b"Exif\0\0XX\0*", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\1" * 40):
        content = whole[:2] + b"\xff\xe1" + (len(body) + 2).to_bytes(2, "big") + body + whole[2:]
        assert np.array_equal(pixels_of(check_image(content, "x.jpg", ImagePolicy("full"))), SOUND)


RAMP = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
EXPECTED = np.rint(RAMP * 255).astype(np.uint8)


@pytest.mark.parametrize(
    "values", [RAMP, RAMP * 255, (RAMP * 65535).astype(np.int32), (RAMP * 4095).astype(np.uint16)], ids=range(4)
)
def test_wide_pixels_are_scaled_by_one_rule(values: np.ndarray) -> None:
    checked = check_image(encode(Image.fromarray(values), "TIFF"), "x.tif", ImagePolicy())
    assert np.abs(pixels_of(checked)[..., 0].astype(int) - EXPECTED).max() <= 1
    black = check_image(encode(Image.fromarray(values * 0), "TIFF"), "x.tif", ImagePolicy())
    assert pixels_of(black).max() == 0
    if values.dtype != np.int32:  # which Pillow reads with black as zero only
        inverted = check_image(encode(Image.fromarray(values), "TIFF", tiffinfo={262: 0}), "x.tif", ImagePolicy())
        assert np.abs(pixels_of(inverted)[..., 0] + EXPECTED.astype(int) - 255).max() <= 1


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (RAMP * 1000, "float values of 0..1000"),
        (RAMP - 0.5, "float values of -0.5..0.5"),
        (RAMP * np.nan, "float values of nan"),
        ((RAMP.astype(np.float64) * (2**31 - 1)).astype(np.int32), "integers of 0..2147483647"),
        ((RAMP * -100).astype(np.int32), "integers of -100..0"),
    ],
    ids=range(5),
)  # fmt: skip
def test_pixels_that_would_be_lost_reject_the_image(values: np.ndarray, reason: str) -> None:
    with pytest.raises(ValueError, match=reason.replace(".", r"\.")):
        check_image(encode(Image.fromarray(values), "TIFF"), "x.tif", ImagePolicy())


def test_warnings_of_pillow_do_not_reach_the_user(tmp_path: Path) -> None:
    """In a process of its own: pytest has filters for warnings."""
    palette = Image.fromarray(SOUND).quantize(16)
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.png").write_bytes(encode(palette, "PNG", transparency=bytes(range(16))))
    (tmp_path / "in/b.jpg").write_bytes(broken_scan())
    command = [sys.executable, "-m", "tools.make_shards", "convert", str(tmp_path / "in"), "--out", str(tmp_path / "out")]
    options = ["--workers", "1", "--max-bad-fraction", "0.5"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=True)
    assert "Warning" not in done.stderr
