"""The GPU's kernel, its text built for this machine by g++: the bytes of the compiled CPU operator."""

import ctypes
import gc
import os
import re
import shutil
import subprocess
import sys
import weakref
from collections import deque
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from nvidia.dali import fn, pipeline_def, types
from skimage import data

from pipeline.crops import cubin
from pipeline.crops.augment import SIGMA, SOLARIZE, TWIST, ViewRecipe, draw_parameters
from pipeline.crops.cpu_operator import crop_once
from pipeline.crops.device import DeviceError
from pipeline.crops.fused import CHECKED, MAX_HELD, FusedCrops, self_check
from pipeline.dataset import MultiCropDataset
from pipeline.defaults import IMAGENET_MEAN, IMAGENET_STD
from pipeline.loader import build_multicrop_dataloader
from pipeline.order import BatchStart
from pipeline.shards.index import ShardIndex
from pipeline.window import Fed, feed, make_batch, plan_window

FORWARDS, BACKWARDS = "for (int i = 0; i < (n); i++)", "for (int i = (n) - 1; i >= 0; i--)"
GUARD, GUARDS = 171, 64
CASES, QUICK_CASES = 2000, 200
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120")


class HostEvent:
    """Behind work that is done when the test says so."""

    done, waited = True, False

    def query(self) -> bool:
        return self.done

    def synchronize(self) -> None:
        self.done = self.waited = True


class HostKernel:
    """The kernel, built for this machine, in place of a `CropKernel`. It may use no byte more memory than it asks for."""

    device = torch.device("cpu")

    def __init__(self, folder: Path, text: str, shared_limit: int) -> None:
        self.shared_limit, self.launches, self.events = shared_limit, list[int](), list[HostEvent]()
        (folder / "kernel.cpp").write_text(text)
        command = ["g++", *cubin.OPTIONS, "-O2", "-ffp-contract=off", "-shared", "-fPIC", "kernel.cpp", "-o", "kernel.so"]
        subprocess.run(command, check=True, cwd=folder)
        self.library = ctypes.CDLL(str(folder / "kernel.so"))

    def launch(self, blocks: int, rows: int, columns: int, out: int, size: int, scratch: int, room: int) -> None:
        num_bytes = blocks * 3 * size * size
        memory = np.full(room * (blocks if scratch else 1) + GUARDS, GUARD, np.uint8)
        made = np.full(num_bytes + GUARDS, GUARD, np.uint8)
        at, nowhere = ctypes.c_void_p(memory.ctypes.data), ctypes.c_void_p()
        self.library.run_blocks(
            blocks, ctypes.c_void_p(rows), columns, ctypes.c_void_p(made.ctypes.data), size, at if scratch else nowhere,
            ctypes.c_longlong(room), nowhere if scratch else at,
        )  # fmt: skip
        assert (memory[-GUARDS:] == GUARD).all(), "the kernel needs more memory than room_bytes says"
        assert (made[-GUARDS:] == GUARD).all(), "the kernel writes past its crops"
        ctypes.memmove(out, made.ctypes.data, num_bytes)
        self.launches.append(blocks)

    def mark(self) -> HostEvent:
        self.events.append(HostEvent())
        return self.events[-1]


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> list[HostKernel]:
    """With its threads in either order, since none may depend on another one of the same phase; in shared memory and not."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    text = cubin.SOURCE.read_text()
    assert text.count(FORWARDS) == 1
    folders = [tmp_path_factory.mktemp(name) for name in ("forwards", "backwards")]
    return [HostKernel(folders[0], text, 1 << 30), HostKernel(folders[1], text.replace(FORWARDS, BACKWARDS), 0)]


def crops_of(kernel: HostKernel, image: np.ndarray, values: np.ndarray, size: int) -> np.ndarray:
    """`values`: `[n, P]`; returns `[n, 3, S, S]`."""
    crops = FusedCrops([size] * len(values), kernel)
    rows, rooms = crops.prepare([image.ctypes.data], np.array([image.shape[:2]]), values[None])
    return torch.cat(crops.make([torch.from_numpy(part) for part in rows], rooms, image)).numpy()


def expected_crops(image: np.ndarray, values: np.ndarray, size: int) -> np.ndarray:
    return np.stack(crop_once(image, np.ascontiguousarray(values), [size] * len(values)))


def check(kernels: list[HostKernel], image: np.ndarray, values: np.ndarray, size: int) -> None:
    """Assert that the kernel makes the CPU operator's crops, and name the first operation that does not."""
    expected = expected_crops(image, values, size)
    for kernel in kernels:
        if np.array_equal(crops_of(kernel, image, values, size), expected):
            continue
        for name, off in (("resize", [TWIST, SIGMA, SOLARIZE]), ("twist", [SIGMA, SOLARIZE]), ("blur", [SOLARIZE]), ("all", [])):
            part = values.copy()
            part[:, off] = 0
            difference = np.abs(crops_of(kernel, image, part, size).astype(int) - expected_crops(image, part, size))
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
    factors = rng.choice([0.0, 0.001, 0.5, 1.0, 1.37, 2.0, 3.9, 9.5, 40.0, 300.0], 3) * rng.choice([1.0, rng.random()])
    hue = rng.choice([0, 90, -180, rng.uniform(-180, 180)])
    sigma = rng.choice([0.0, 0.1, 0.3, 0.35, 1.0, 2.0, 2.01, 6.3, 20.0])
    row = [y0, x0, y1, x1, rng.integers(2), rng.integers(2), *factors, hue, sigma, rng.integers(2)]
    return np.array(row, np.float32)


@pytest.mark.parametrize(
    ("first", "last"), [(0, QUICK_CASES), pytest.param(QUICK_CASES, CASES, marks=pytest.mark.slow)], ids=["quick", "rest"]
)
def test_random_crops_have_the_bytes_of_the_cpu_operator(kernels: list[HostKernel], first: int, last: int) -> None:
    for number in range(first, last):
        rng = np.random.default_rng(number)
        size = int(rng.integers(1, 257)) if number % 8 else (1, 15, 16, 17, 47, 96, 224, 448)[number // 8 % 8]
        image = random_image(rng)
        check(kernels, image, random_values(rng, image, size, number)[None], size)


@pytest.mark.parametrize(("shape", "size"), [
    ((20_000, 24), 448), ((24, 20_000), 448), ((12_000, 40), 16), ((3, 12_000), 225), ((20_000, 20), 1), ((1200, 1600), 448)
])  # fmt: skip
def test_images_of_any_size_are_cut(kernels: list[HostKernel], shape: tuple[int, int], size: int) -> None:
    height, width = shape
    image = np.random.default_rng(size).integers(0, 256, (height, width, 3), np.uint8)
    boxes = [(0, 0, height, width), (height // 2, width // 3, height, width), (height // 2, width // 2, height // 2 + 1, width)]
    values = [(*box, 1, 1, 1.2, 0.7, 0.8, 20, 2.0 * number, 1) for number, box in enumerate(boxes)]
    check(kernels, image, np.array(values, np.float32), size)


def test_the_mean_gray_is_summed_in_double(kernels: list[HostKernel], tmp_path: Path) -> None:
    """In float, few crops in a thousand differ."""
    wrong = HostKernel(tmp_path, cubin.SOURCE.read_text().replace("double mean = 0", "float mean = 0"), 1 << 30)
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (47, 47, 3), np.uint8)
    values = np.array([(0, 0, 47, 47, 0, 1, 1, contrast, 1, 0, 0, 0) for contrast in rng.uniform(0.2, 1.8, 3000)], np.float32)
    check(kernels, image, values, 16)
    assert not np.array_equal(crops_of(wrong, image, values, 16), expected_crops(image, values, 16))


def test_crops_of_a_batch_are_those_of_its_images_and_join_without_a_copy(kernels: list[HostKernel]) -> None:
    """Sizes in any order, images of any size."""
    rng = np.random.default_rng(1)
    images = [rng.integers(0, 256, (*rng.integers(20, 200, 2), 3), np.uint8) for _ in range(5)]
    sides = np.array([image.shape[:2] for image in images])
    sizes = (64, 32, 64, 17, 32, 32)
    recipes = tuple(replace(CHECKED, size=size) for size in sizes)
    values = draw_parameters(recipes, 3, 0, 0, *sides.T).swapaxes(0, 1)
    for kernel in kernels:
        crops = FusedCrops(sizes, kernel)
        rows, rooms = crops.prepare([image.ctypes.data for image in images], sides, values)
        made = crops.make([torch.from_numpy(part) for part in rows], rooms, images)
        for number, image in enumerate(images):
            expected = crop_once(image, np.ascontiguousarray(values[number]), sizes)
            assert all(np.array_equal(crop[number].numpy(), wanted) for crop, wanted in zip(made, expected, strict=True))


def test_batches_of_the_kernel_are_those_of_the_cpu_operator(kernels: list[HostKernel], index: ShardIndex) -> None:
    """The last one of an epoch is cut; all of DALI's images are still given to the kernel."""
    recipes = tuple(replace(CHECKED, size=size) for size in (48, 32, 48))
    dataset = MultiCropDataset(index, recipes, IMAGENET_MEAN, IMAGENET_STD)
    loader = build_multicrop_dataloader(dataset, 24, device="cpu", normalized=False, drop_last=False)
    encoded, fed = list[np.ndarray](), deque[Fed]()

    @pipeline_def(batch_size=24, num_threads=1, device_id=None, prefetch_queue_depth=1)
    def decode() -> object:
        files = fn.external_source(lambda: encoded, dtype=types.UINT8, ndim=1)
        return fn.decoders.image(files, output_type=types.RGB, adjust_orientation=False, jpeg_fancy_upsampling=True)

    starts, rows = plan_window(loader.sequence, BatchStart(0, 0), 5)
    crops = FusedCrops([recipe.size for recipe in recipes], kernels[0])
    for _, expected in zip(feed(loader.sequence, recipes, starts, rows, fed), loader, strict=True):
        encoded[:] = [np.frombuffer(index.encoded(row), np.uint8) for row in fed[0][0].tolist()]
        made = make_batch(index, fed.popleft(), decode().run(), crops, torch.device("cpu"))
        for name in ("labels", "boxes", "flips", "positions"):
            assert torch.equal(getattr(made, name), getattr(expected, name)), name
        assert all(torch.equal(crop, other) for crop, other in zip(made.crops, expected.crops, strict=True))
        assert len(made.crops[0]) == len(made.labels)


def test_images_live_until_the_kernel_has_read_them(kernels: list[HostKernel]) -> None:
    class Images:
        pass

    crops, kept = FusedCrops([8], kernels[0]), list[weakref.ref[Images]]()
    image, values = np.zeros((9, 9, 3), np.uint8), np.array([[[0, 0, 9, 9, *[0] * 8]]], np.float32)
    rows, rooms = crops.prepare([image.ctypes.data], np.array([image.shape[:2]]), values)
    rows = [torch.from_numpy(part) for part in rows]
    HostEvent.done = False
    try:
        for count in range(1, MAX_HELD + 3):
            images = Images()
            kept.append(weakref.ref(images))
            crops.make(rows, rooms, images)
            del images
            assert [ref() is not None for ref in kept] == [number >= count - MAX_HELD for number in range(count)]
        events = kernels[0].events[-len(kept) :]
        assert [event.waited for event in events] == [True] * 2 + [False] * MAX_HELD
        events[2].done = True
        crops.make(rows, rooms, None)
        assert [ref() is not None for ref in kept] == [False] * 3 + [True] * (MAX_HELD - 1)
        del crops
        gc.collect()
        assert all(event.waited or event.done for event in events)
    finally:
        HostEvent.done = True


def test_the_self_check_tells_a_wrong_kernel(kernels: list[HostKernel], tmp_path: Path) -> None:
    sizes = (96, 48, 48)
    for kernel in kernels:
        self_check(sizes, kernel)
    wrong = HostKernel(tmp_path, cubin.SOURCE.read_text().replace("1 << bits >> 1", "0"), 1 << 30)
    with pytest.raises(DeviceError, match="crops of 96 pixels differ"):
        self_check(sizes, wrong)


def test_crops_that_fit_no_shared_memory_are_made_in_parts(kernels: list[HostKernel], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.crops.fused.SCRATCH_BYTES", 400_000)
    kernels[1].launches.clear()
    self_check((224,), kernels[1])
    assert kernels[1].launches == [2, 2, 2, 2]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nvrtc_compiles_the_kernel_without_spills(architecture: str) -> None:
    pytest.importorskip("cuda.bindings.nvrtc", reason="needs cuda.bindings")
    code, log = cubin.compile_kernel(architecture, "--ptxas-options=-v")
    assert code.startswith(b"\x7fELF")
    assert "0 bytes spill stores, 0 bytes spill loads" in log
    assert int(re.search(r"Used (\d+) registers", log)[1]) * cubin.THREADS <= 65_536


def test_no_product_is_fused_with_a_sum() -> None:
    """It would be rounded once instead of twice. Here g++ is told so; NVRTC is not, which is why the text has MUL."""
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc", reason="needs cuda.bindings")
    program = cubin.checked(nvrtc.nvrtcCreateProgram, cubin.SOURCE.read_bytes(), b"", 0, [], [])
    options = [option.encode() for option in ("--gpu-architecture=compute_90", "--std=c++17", *cubin.OPTIONS)]
    cubin.checked(nvrtc.nvrtcCompileProgram, program, len(options), options)
    ptx = bytes(cubin.checked(nvrtc.nvrtcGetPTXSize, program))
    cubin.checked(nvrtc.nvrtcGetPTX, program, ptx)
    assert b"mul.rn.f64" in ptx
    assert not re.search(rb"fma\.|mul\.f64|mad\.f", ptx)


def test_a_cubin_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cubin, "CACHE_FOLDER", str(tmp_path))
    code = cubin.cached_cubin("sm_90")
    (path,) = tmp_path.iterdir()
    path.write_bytes(b"kept")
    assert cubin.cached_cubin("sm_90") == b"kept"
    monkeypatch.setattr(cubin, "CACHE_FOLDER", None)
    assert cubin.cached_cubin("sm_90") == code
    with pytest.raises(DeviceError, match="NVRTC does not compile the crop kernel for sm_999"):
        cubin.cached_cubin("sm_999")


def test_the_driver_gets_the_kernels_arguments(kernels: list[HostKernel], tmp_path: Path) -> None:
    """cuda.bindings, on a library with the few functions of the driver that it calls."""
    source = Path(__file__).with_name("fake_driver.c")
    subprocess.run(["gcc", "-shared", "-fPIC", source, "-o", tmp_path / "libcuda.so.1", "-ldl"], check=True)
    changes = {"LD_LIBRARY_PATH": str(tmp_path), "HOST_KERNEL": kernels[0].library._name}
    script = [sys.executable, "-m", "tests.pipeline.crops.on_fake_driver"]
    ended = subprocess.run(script, env=os.environ | changes, cwd=Path(__file__).parents[3], capture_output=True, text=True)
    assert (ended.stdout, ended.returncode) == ("equal\n", 0), ended.stderr


def test_what_is_missing_for_the_kernel_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing() -> None:
        raise RuntimeError("libnvrtc.so: not found\nsearched in many places")

    with pytest.raises(DeviceError, match=r"^nothing failed: libnvrtc.so: not found$"):
        cubin.checked(nothing)
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    monkeypatch.delitem(sys.modules, "cuda.bindings.driver", raising=False)
    with pytest.raises(DeviceError, match=r"^cuda.bindings does not load: "):
        cubin.binding("driver")


@pytest.mark.gpu
def test_the_kernel_on_the_gpu_makes_the_cpu_operators_bytes() -> None:
    kernel = cubin.CropKernel(torch.device("cuda", 0))
    self_check((1, 16, 17, 96, 224, 448), kernel)
    for number in range(QUICK_CASES):
        rng = np.random.default_rng(number)
        image, size = random_image(rng), int(rng.integers(1, 257))
        values = random_values(rng, image, size, number)[None]
        crops, on_device = FusedCrops([size], kernel), torch.from_numpy(image).cuda()
        rows, rooms = crops.prepare([on_device.data_ptr()], np.array([image.shape[:2]]), values[None])
        made = crops.make([torch.from_numpy(rows[0]).cuda()], rooms, on_device)[0]
        assert np.array_equal(made.cpu().numpy(), expected_crops(image, values, size)), f"case {number}"
