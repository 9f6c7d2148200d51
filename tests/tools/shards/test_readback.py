"""Other readers (DALI, webdataset, Pillow) and `verify` read back what is written."""

import io
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import sources
from nvidia.dali import fn, pipeline_def, types
from PIL import Image
from reading import colour_of, folder_bytes, run_convert, stored_samples

from pipeline.crops.device import decode_error
from pipeline.dataset import centre_crop_dataset
from pipeline.loader import build_multicrop_dataloader
from pipeline.shards.index import INDEX_NAME, open_index
from tools.make_shards import main
from tools.shards.images import ImagePolicy, check_image
from tools.shards.photographs import PHOTOGRAPHS, TILE, tile_corners


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("readback")
    return run_convert(sources.class_folders(root / "in", per_class=20), root / "out", "--num-shards", "3")


def expected_means(folder: Path) -> list[tuple[int, list[float]]]:
    return [(sample.label, sample.pixels().mean((0, 1)).round().tolist()) for sample in stored_samples(folder)]


def test_dali_reads_the_same_samples_and_labels(converted: Path) -> None:
    tars = [str(path) for path in sorted(converted.glob("*.tar"))]

    @pipeline_def(batch_size=20, num_threads=1, device_id=None)
    def graph() -> tuple[object, object]:
        encoded, label = fn.readers.webdataset(paths=tars, ext=["jpg;png", "cls"], missing_component_behavior="error")
        return fn.decoders.image(encoded, device="cpu", output_type=types.RGB, adjust_orientation=False), label

    built = graph()
    found = []
    for _ in range(3):
        images, labels = built.run()
        for k in range(20):
            label = int(bytes(np.asarray(labels[k])))
            found.append((label, np.asarray(images[k]).mean((0, 1)).round().tolist()))
    for (label, mean), (expected_label, expected_mean) in zip(found, expected_means(converted), strict=True):
        assert label == expected_label
        assert np.abs(np.subtract(mean, expected_mean)).max() <= 1


def test_shards_joined_by_cat_are_indexed_verified_and_trained_on(converted: Path, tmp_path: Path) -> None:
    (tmp_path / "all.tar").write_bytes(b"".join(path.read_bytes() for path in sorted(converted.glob("*.tar"))))
    assert main(["index", str(tmp_path)]) == main(["verify", str(tmp_path)]) == 0
    dataset = centre_crop_dataset(open_index(tmp_path), 32, 1.0)
    loader = build_multicrop_dataloader(dataset, 20, shuffle=False, normalized=False, device="cpu", num_workers=1)
    found = [
        (int(label), crop.float().mean((1, 2))) for (crops,), labels in loader for crop, label in zip(crops, labels, strict=True)
    ]
    assert [label for label, _ in found] == [label for label, _ in expected_means(converted)]
    assert all(np.abs(np.asarray(mean) - colour_of(label)).max() < 12 for label, mean in found)


def test_webdataset_reads_the_same_samples_and_labels(converted: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    tars = [str(path) for path in sorted(converted.glob("*.tar"))]
    found = [(s["__key__"], s["jpg"], int(s["cls"])) for s in webdataset.WebDataset(tars, shardshuffle=False)]
    assert found == [(sample.key, sample.content, sample.label) for sample in stored_samples(converted)]


def test_the_index_written_equals_the_index_scanned(converted: Path, tmp_path: Path) -> None:
    written = open_index(converted)
    for path in converted.glob("*.tar"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert main(["index", str(tmp_path), "--workers", "1"]) == 0
    assert np.array_equal(open_index(tmp_path).samples, written.samples)
    assert (tmp_path / INDEX_NAME).read_bytes() == (converted / INDEX_NAME).read_bytes()


def test_verify_finds_a_single_flipped_bit(converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, content in folder_bytes(converted).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert main(["verify", str(tmp_path), "--workers", "2"]) == 0
    tar = sorted(tmp_path.glob("*.tar"))[1]
    content = bytearray(tar.read_bytes())
    content[5_000] ^= 16
    tar.write_bytes(content)
    capsys.readouterr()
    assert main(["verify", str(tmp_path), "--workers", "1"]) == 2
    assert f"{tar}: sha256 differs" in capsys.readouterr().err


def encode(image: Image.Image, image_format: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, image_format, **options)
    return out.getvalue()


def awkward_images() -> dict[str, tuple[bytes, str, np.ndarray]]:
    """Kind of change -> the file, the name it comes under, and the RGB pixels Pillow sees in it."""
    photo = Image.open(io.BytesIO(sources.picture(3, 1))).convert("RGB")
    wide = Image.fromarray(np.arange(40 * 56, dtype=np.uint16).reshape(40, 56) * 20)
    exif = Image.Exif()
    exif[0x0112] = 6
    alpha = photo.copy()
    alpha.putalpha(120)
    over_white = Image.new("RGB", photo.size, "white")
    over_white.paste(photo, mask=alpha.getchannel("A"))
    rgb, gray = np.asarray(photo), np.asarray(photo.convert("L"))
    palette = photo.quantize(16)
    return {
        "cmyk": (encode(photo.convert("CMYK"), "JPEG", quality=100), "x.jpg", rgb),
        "orientation": (encode(photo, "JPEG", quality=100, exif=exif), "x.jpg", np.rot90(rgb, -1)),
        "misnamed": (encode(photo, "PNG"), "x.JPEG", rgb),
        "palette": (encode(palette, "PNG"), "x.png", np.asarray(palette.convert("RGB"))),
        "alpha": (encode(alpha, "PNG"), "x.png", np.asarray(over_white)),
        "16-bit": (encode(wide, "PNG"), "x.png", np.rint(np.asarray(wide) / 257)[..., None].repeat(3, 2)),
        "1-bit": (encode(photo.convert("1"), "PNG"), "x.png", np.asarray(photo.convert("1").convert("RGB"))),
        "gif": (encode(photo, "GIF"), "x.gif", np.asarray(Image.open(io.BytesIO(encode(photo, "GIF"))).convert("RGB"))),
        "webp": (encode(photo, "WEBP", lossless=True), "x.jpg", rgb),
        "bmp": (encode(photo.convert("L"), "BMP"), "x.bmp", gray[..., None].repeat(3, 2)),
    }


@pytest.mark.parametrize("kind", awkward_images())
def test_awkward_images_are_stored_as_dali_and_pillow_both_see_them(kind: str) -> None:
    content, name, expected = awkward_images()[kind]
    checked = check_image(content, name, ImagePolicy())
    assert kind in checked.changes
    pixels = np.asarray(Image.open(io.BytesIO(checked.content)).convert("RGB"))
    assert pixels.shape == (checked.height, checked.width, 3) == expected.shape
    assert np.abs(pixels.astype(int) - expected).max() <= (12 if checked.extension == "jpg" else 0)
    assert decode_error(checked.content, "cpu") == ""


def test_plain_images_keep_their_bytes() -> None:
    for image_format, extension in (("JPEG", "jpg"), ("PNG", "png")):
        for mode in ("RGB", "L"):
            image = Image.open(io.BytesIO(sources.picture(3, 1))).convert(mode)
            content = encode(image, image_format, **({"progressive": True} if image_format == "JPEG" else {}))
            checked = check_image(content, f"x.{extension}", ImagePolicy())
            assert (checked.content, checked.extension, checked.changes) == (content, extension, ())


def test_dali_finds_what_the_header_does_not_show() -> None:
    content = sources.picture(1, 1, 200, 300)
    cut = content[: len(content) // 2] + b"\xff\xd9"
    forged = bytearray(content)
    start = content.index(b"\xff\xc0") + 5
    forged[start : start + 2] = struct.pack(">H", 0)
    assert [bool(decode_error(each, "cpu")) for each in (content, bytes(forged))] == [False, True]
    assert check_image(cut, "x.jpg", ImagePolicy()).width == 300


def test_the_sample_is_the_same_each_time_and_its_splits_share_no_pixels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for out in ("one", "two"):
        assert main(["sample", "--out", str(tmp_path / out)]) == 0
    assert folder_bytes(tmp_path / "one") == folder_bytes(tmp_path / "two")
    assert main(["sample", "--out", str(tmp_path / "one")]) == 0
    assert capsys.readouterr().out.count("nothing to do") == 2
    manifest = json.loads((tmp_path / "one/train/manifest.json").read_text())
    assert {entry["class"] for entry in manifest["attributions"]} == set(manifest["classes"])
    assert all(entry["licence"] and entry["origin"] for entry in manifest["attributions"])
    assert np.bincount(open_index(tmp_path / "one/train").samples["label"]).tolist() == [150] * len(PHOTOGRAPHS)
    assert np.bincount(open_index(tmp_path / "one/val").samples["label"]).tolist() == [40] * len(PHOTOGRAPHS)


@pytest.mark.parametrize(("height", "width"), [(102, 102), (172, 448), (1411, 1411), (512, 512)])
def test_tiles_of_the_two_splits_are_apart(height: int, width: int) -> None:
    train = tile_corners(height, width, "train", seed=1)
    val = tile_corners(height, width, "val", seed=1)
    assert (len(set(train)), len(set(val))) == (150, 40)
    assert max(x for _, x in train) + TILE < min(x for _, x in val)
    assert max(y for y, _ in train + val) + TILE <= height
    assert max(x for _, x in val) + TILE <= width
