"""The compiled crop: equal to torchvision's operations, to DALI's chain of operators, and to itself on any machine."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from pipeline.crops import cpu_operator as crop_op
from pipeline.crops import kernels
from pipeline.crops.augment import GRAY_WEIGHTS, PARAMETERS, ViewRecipe
from pipeline.dataset import MultiCropDataset, Normalization
from pipeline.defaults import IMAGENET_MEAN, IMAGENET_STD
from pipeline.loader import build_multicrop_dataloader
from pipeline.shards.index import ShardIndex

BOXES = [(0, 0, 90, 120), (3, 5, 83, 95), (10, 20, 12, 23), (40, 0, 41, 120), (0, 60, 90, 61), (1, 2, 65, 66)]


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    waves = np.add.outer(np.sin(np.arange(90) / 7), np.cos(np.arange(120) / 5))
    noise = np.random.default_rng(0).normal(0, 20, (90, 120, 3))
    return np.clip(128 + 50 * waves[..., None] * [1.0, 0.7, -0.8] + noise, 0, 255).astype(np.uint8)


def cut(image: np.ndarray, box: tuple[int, int, int, int], size: int, flip: bool = False) -> np.ndarray:
    out = np.empty((3, size, size), np.uint8)
    kernels.resize(out, image, *box, flip)
    return out


@pytest.mark.parametrize("size", [1, 2, 7, 32, 96, 224])
@pytest.mark.parametrize("box", BOXES)
def test_a_resize_is_torchvisions_to_one_grey_level(image: np.ndarray, box: tuple[int, int, int, int], size: int) -> None:
    y0, x0, y1, x1 = box
    whole = torch.from_numpy(image).permute(2, 0, 1)
    expected = F.resized_crop(whole.float(), y0, x0, y1 - y0, x1 - x0, [size, size], InterpolationMode.BILINEAR, antialias=True)
    ours = torch.from_numpy(cut(image, box, size)).float()
    assert float((ours - expected).abs().max()) <= 0.51  # the rounding alone
    assert np.array_equal(cut(image, box, size, flip=True), cut(image, box, size)[:, :, ::-1])


def test_nothing_outside_the_box_is_read(image: np.ndarray) -> None:
    other = 255 - image
    other[3:83, 5:95] = image[3:83, 5:95]
    assert np.array_equal(cut(other, (3, 5, 83, 95), 50), cut(image, (3, 5, 83, 95), 50))


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.3, 2.0, 30.0])
def test_a_blur_is_torchvisions_to_one_grey_level(image: np.ndarray, sigma: float) -> None:
    crop = cut(image, (0, 0, 90, 120), 64)
    window = min(2 * int(np.ceil(3 * sigma)) + 1, 127)
    expected = F.gaussian_blur(torch.from_numpy(crop.copy()).float(), [window, window], [sigma, sigma])
    kernels.blur(crop, np.float32(sigma))
    assert float((torch.from_numpy(crop).float() - expected).abs().max()) <= 0.52


@pytest.mark.parametrize("size", [1, 5, 16, 33])
@pytest.mark.parametrize("factors", [(1.0, 1.0, 1.0, 0.0), (1.3, 0.7, 1.4, 30.0), (0.6, 1.4, 0.0, 0.0), (3.0, 3.0, 2.0, -180.0)])
def test_colours_are_those_of_floating_point_to_one_grey_level(
    image: np.ndarray, size: int, factors: tuple[float, float, float, float]
) -> None:
    crop = cut(image, (0, 0, 90, 120), size)
    brightness, contrast, saturation, hue = factors
    bright = np.minimum(np.floor(crop * brightness + 0.5), 255)
    mean = float((bright.mean(axis=(1, 2)) * GRAY_WEIGHTS).sum())
    values = np.clip(mean + contrast * (bright - mean), 0, 255)
    expected = np.clip(np.tensordot(kernels.colour_matrix(saturation, hue), values, 1), 0, 255)
    kernels.twist_colours(crop, *factors)
    # Where brightness meets a tie, its rounding may go the other way.
    step = contrast * np.abs(kernels.colour_matrix(saturation, hue)).sum(axis=1).max() if brightness != 1 else 0
    assert np.abs(crop - expected).max() <= 0.6 + step
    assert np.abs(crop - expected).mean() <= 0.5


@pytest.mark.parametrize(("length", "size"), [(1, 5), (7, 7), (90, 64), (500, 96), (1000, 3), (9000, 2)])
def test_the_weights_of_a_pixel_add_up_to_one(length: int, size: int) -> None:
    starts, weights = kernels.filter_table(length, size)
    assert starts.min() >= 0
    assert starts.max() + weights.shape[1] <= length
    sums = weights.sum(axis=1, dtype=np.int64)
    assert set(sums.tolist()) <= {kernels.ONE, kernels.ONE - 1}


def test_white_stays_white_however_far_it_is_reduced() -> None:
    white = np.full((3000, 2000, 3), 255, np.uint8)
    assert cut(white, (0, 0, 3000, 2000), 7).min() == 255


def test_a_box_that_leaves_the_image_is_cut_off(image: np.ndarray) -> None:
    """An index that is wrong about an image's size must not make the kernel read other memory."""
    values = np.zeros(len(PARAMETERS), np.float32)
    out, inside = np.empty((3, 16, 16), np.uint8), np.empty((3, 16, 16), np.uint8)
    values[:4] = (50, 60, 4000, 5000)
    crop_op.make_crop(out, image, values)
    values[:4] = (50, 60, 90, 120)
    crop_op.make_crop(inside, image, values)
    assert np.array_equal(out, inside)
    values[:4] = (4000, 4000, 5000, 5000)
    crop_op.make_crop(out, image, values)
    assert np.array_equal(out, np.broadcast_to(image[-1, -1][:, None, None], out.shape))


def test_where_no_folder_can_be_written_the_code_is_compiled_for_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("numba.core.caching.CacheImpl._locator_classes", [])
    assert crop_op.shape_entry("any").address


def test_machine_code_is_kept_for_the_sources_that_it_was_made_from_and_for_no_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Numba itself looks at one file: a change of another one, that it calls, went unnoticed."""
    monkeypatch.setattr("numba.core.config.CACHE_DIR", str(tmp_path))
    assert [crop_op.shape_entry(sources).cache_hits for sources in ("old", "old", "new", "old")] == [0, 1, 0, 1]
    folder = Path(crop_op.__file__).parent
    compiled = {path for path in folder.glob("*.py") if "@compiled" in path.read_text()}
    # Code and constants that these import can be compiled into them.
    imported = re.findall(
        r"^from pipeline\.crops(?:\.(\w+))? import (.*)$", "".join(p.read_text() for p in compiled), re.MULTILINE
    )
    named = {name for module, names in imported for name in ([module] if module else names.split(", "))}
    assert compiled | {folder / f"{name}.py" for name in named} == set(map(Path, crop_op.SOURCES))
    copies = [shutil.copy(source, tmp_path) for source in crop_op.SOURCES]
    before = crop_op.digest(tuple(copies))
    for copy in map(Path, copies):
        copy.write_text(copy.read_text() + " ")
        assert crop_op.digest(tuple(copies)) != before
        before = crop_op.digest(tuple(copies))


def test_normalised_crops_are_the_crops_normalised(index: ShardIndex) -> None:
    recipes = (ViewRecipe(33, (0.4, 1.0), blur_prob=0.5),) + (ViewRecipe(17, (0.05, 0.4), jitter_prob=0.5, hue=0.1),) * 8
    dataset = MultiCropDataset(index, recipes, IMAGENET_MEAN, IMAGENET_STD)
    scaled, plain = (
        next(iter(build_multicrop_dataloader(dataset, 16, device="cpu", normalized=normalized))) for normalized in (True, False)
    )
    assert [crop.shape for crop in plain.crops] == [(16, 3, 33, 33)] + [(16, 3, 17, 17)] * 8
    for ours, crop in zip(scaled.crops, plain.crops, strict=True):
        assert torch.equal(ours, Normalization(IMAGENET_MEAN, IMAGENET_STD)(crop))


FULL = ViewRecipe(
    64, (0.1, 1.0), flip_prob=0.5, jitter_prob=0.8, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1,
    gray_prob=0.2, blur_prob=0.5, solarize_prob=0.2,
)  # fmt: skip


@pytest.mark.parametrize("device", ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def test_dalis_operators_make_the_same_crops(index: ShardIndex, device: str) -> None:
    """The graph of the GPU, also run on the CPU: at most two grey levels apart on average, for every crop."""

    def crops(device: str, crop_device: str) -> torch.Tensor:
        dataset = MultiCropDataset(index, (FULL, FULL), IMAGENET_MEAN, IMAGENET_STD)
        loader = build_multicrop_dataloader(dataset, 16, device=device, crop_device=crop_device, normalized=False)
        return torch.cat([torch.stack(batch.crops, 1).cpu().float() for batch in loader])

    difference = (crops(device, "dali") - crops("cpu", "cpu")).abs().mean(dim=(2, 3, 4))
    assert len(difference) == 96
    assert float(difference.max()) <= 2
    assert float(difference.mean()) <= 0.7
