"""The GPU's kernel, its text built for this machine by g++: the bytes of the compiled CPU operator."""

import ctypes
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from skimage import data

from pipeline.crops import fused
from pipeline.crops.augment import SIGMA, SOLARIZE, TWIST, ViewRecipe, draw_parameters
from pipeline.crops.cpu_operator import make_crop

FORWARDS, BACKWARDS = "for (int i = 0; i < (n); i++)", "for (int i = (n) - 1; i >= 0; i--)"
GUARD, GUARDS = 171, 64
CASES, QUICK_CASES = 2000, 120
Crops = Callable[[np.ndarray, np.ndarray, int], np.ndarray]


def compiled_kernel(folder: Path, name: str, text: str) -> ctypes.CDLL:
    source = folder / f"{name}.cpp"
    source.write_text(text)
    command = ["g++", "-O2", "-ffp-contract=off", "-shared", "-fPIC", "-o", folder / f"{name}.so", source]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(folder / f"{name}.so"))


def crops_of(library: ctypes.CDLL) -> Crops:
    """Return a function of one image, the values `[V, P]` of its crops and their size: the kernel's crops `[V, S, S, 3]`."""

    def make(image: np.ndarray, values: np.ndarray, size: int) -> np.ndarray:
        count = len(values)
        rows = np.full((count, fused.num_columns(values)), -1, np.int32)
        places = np.stack([np.arange(count), np.full(count, count)], axis=1)
        images, sides = np.array([image.ctypes.data]), np.array([image.shape[:2]])
        most = fused.fill_rows(rows, places, images, sides, values[None], np.full(count, size))
        room = fused.room_bytes(size, int(most.max()))
        results = []
        for blocks_of_memory in (1, count):  # shared, then scratch
            memory = np.full(room * blocks_of_memory + GUARDS, GUARD, np.uint8)
            out = np.full(count * size * size * 3 + GUARDS, GUARD, np.uint8)
            pointers = [ctypes.c_void_p(array.ctypes.data) for array in (rows, out, memory)]
            shared, scratch = (pointers[2], None) if blocks_of_memory == 1 else (None, pointers[2])
            library.run_blocks(count, pointers[0], rows.shape[1], pointers[1], size, scratch, ctypes.c_int64(room), shared)
            assert (memory[-GUARDS:] == GUARD).all(), "the kernel needs more memory than room_bytes says"
            assert (out[-GUARDS:] == GUARD).all(), "the kernel writes past its crops"
            results.append(out[:-GUARDS].reshape(count, size, size, 3))
        assert np.array_equal(*results)
        return results[0]

    return make


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> list[Crops]:
    """The kernel with its threads in either order: no thread may depend on another one of the same phase."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    text, folder = fused.KERNEL.read_text(), tmp_path_factory.mktemp("kernel")
    assert text.count(FORWARDS) == 1
    texts = {"forwards": text, "backwards": text.replace(FORWARDS, BACKWARDS)}
    return [crops_of(compiled_kernel(folder, name, text)) for name, text in texts.items()]


def cpu_crops(image: np.ndarray, values: np.ndarray, size: int) -> np.ndarray:
    crops = np.empty((len(values), 3, size, size), np.uint8)
    for crop, drawn in zip(crops, values, strict=True):
        make_crop(crop, image, drawn)
    return crops.transpose(0, 2, 3, 1)


def check(libraries: list[Crops], image: np.ndarray, values: np.ndarray, size: int) -> None:
    """Assert that the kernel makes the CPU operator's crops, naming the first operation that does not."""
    expected = cpu_crops(image, values, size)
    for make in libraries:
        if np.array_equal(make(image, values, size), expected):
            continue
        for name, off in (("resize", [TWIST, SIGMA, SOLARIZE]), ("twist", [SIGMA, SOLARIZE]), ("blur", [SOLARIZE]), ("all", [])):
            part = values.copy()
            part[:, off] = 0
            difference = np.abs(make(image, part, size).astype(int) - cpu_crops(image, part, size))
            assert not difference.any(), f"{name}: {image.shape} to {size}, {part.tolist()}: up to {difference.max()}"


def random_image(rng: np.random.Generator) -> np.ndarray:
    height, width = (int(side) for side in np.exp(rng.uniform(0, np.log([600.99, 800.99]))))
    kind = rng.integers(6)
    if kind == 0:  # extreme shapes
        shapes = [(1, 1), (1, width), (height, 1), (600, int(rng.integers(1, 9))), (int(rng.integers(1, 9)), 800)]
        height, width = shapes[rng.integers(len(shapes))]
    elif kind == 1:
        height, width = 600, 800
    texture = rng.integers(4)
    if texture == 0:
        image = rng.integers(0, 256, (height, width, 3))
    elif texture == 1:
        image = 255 * rng.integers(0, 2, (height, width, 3))
    elif texture == 2:
        image = np.broadcast_to(rng.choice([0, 1, 127, 128, 254, 255], 3), (height, width, 3))
    else:
        photo = (data.astronaut, data.coffee, data.chelsea)[rng.integers(3)]()
        missing = [(0, max(side - have, 0)) for side, have in zip((height, width), photo.shape[:2], strict=True)]
        image = np.pad(photo, (*missing, (0, 0)), "symmetric")[:height, :width]
    return np.ascontiguousarray(image, np.uint8)


def random_values(rng: np.random.Generator, image: np.ndarray, size: int, number: int) -> np.ndarray:
    """`[P] float32`: as the project draws them in three of four cases, else anything, with boxes at the borders and beyond."""
    height, width = image.shape[:2]
    if rng.random() < 0.75:
        low, jitter = rng.uniform(0.02, 1.0), rng.choice([0.0, 0.4, 0.8, 1.0])
        recipe = ViewRecipe(
            size, (low, rng.uniform(low, 1.0)), flip_prob=0.5, jitter_prob=0.8 if jitter else 0.0, brightness=jitter,
            contrast=jitter, saturation=jitter / 2, hue=jitter / 4, gray_prob=0.2, blur_prob=0.5,
            blur_sigma=(0.1, rng.choice([0.5, 2.0, 3.0])), solarize_prob=0.3,
        )  # fmt: skip
        return draw_parameters((recipe,), 7, 0, number, np.array([height]), np.array([width]))[0, 0]
    y0, x0 = (rng.choice([0, int(rng.integers(side)), side - 1]) for side in (height, width))
    y1, x1 = (rng.choice([int(rng.integers(first, side)) + 1, side, side + 9]) for first, side in ((y0, height), (x0, width)))
    factors = rng.choice([0.0, 0.001, 0.5, 1.0, 1.37, 2.0, 3.9, 9.5, 40.0], 3) * rng.choice([1.0, rng.random()])
    hue = rng.choice([0, 90, -180, rng.uniform(-180, 180)])
    sigma = rng.choice([0.0, 0.1, 0.3, 0.35, 1.0, 2.0, 2.01, 6.3, 20.0])
    row = [y0, x0, y1, x1, rng.integers(2), rng.integers(2), *factors, hue, sigma, rng.integers(2)]
    return np.array(row, np.float32)


@pytest.mark.parametrize(
    ("first", "last"), [(0, QUICK_CASES), pytest.param(QUICK_CASES, CASES, marks=pytest.mark.slow)], ids=["quick", "rest"]
)
def test_random_crops_have_the_bytes_of_the_cpu_operator(libraries: list[Crops], first: int, last: int) -> None:
    for number in range(first, last):
        rng = np.random.default_rng(number)
        size = int(rng.integers(1, 257)) if number % 8 else (1, 15, 16, 17, 47, 96, 224, 448)[number // 8 % 8]
        image = random_image(rng)
        check(libraries, image, random_values(rng, image, size, number)[None], size)


@pytest.mark.parametrize(("shape", "size"), [
    ((20_000, 24), 448), ((24, 20_000), 448), ((12_000, 40), 16), ((3, 12_000), 225), ((20_000, 20), 1), ((1200, 1600), 448)
])  # fmt: skip
def test_images_of_any_size_are_cut(libraries: list[Crops], shape: tuple[int, int], size: int) -> None:
    height, width = shape
    image = np.random.default_rng(size).integers(0, 256, (height, width, 3), np.uint8)
    boxes = [(0, 0, height, width), (height // 2, width // 3, height, width), (height // 2, width // 2, height // 2 + 1, width)]
    values = [(*box, 1, 1, 1.2, 0.7, 0.8, 20, 2.0 * number, 1) for number, box in enumerate(boxes)]
    check(libraries, image, np.array(values, np.float32), size)


def test_the_mean_gray_is_summed_in_double(libraries: list[Crops], tmp_path: Path) -> None:
    """In float, few crops in a thousand differ."""
    text = fused.KERNEL.read_text()
    wrong = crops_of(compiled_kernel(tmp_path, "wrong", text.replace("double mean = 0", "float mean = 0")))
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (47, 47, 3), np.uint8)
    values = np.array([(0, 0, 47, 47, 0, 1, 1, contrast, 1, 0, 0, 0) for contrast in rng.uniform(0.2, 1.8, 3000)], np.float32)
    check(libraries, image, values, 16)
    assert not np.array_equal(wrong(image, values, 16), cpu_crops(image, values, 16))
