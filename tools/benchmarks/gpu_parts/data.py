"""Parts of `bench.py gpu` on the data: crops of both devices, rates, windows and memory of DALI's graphs."""

import gc
import os
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from nvidia.dali.backend import ReleaseUnusedMemory  # type: ignore[attr-defined]  # not in its stubs

from pipeline import build_multicrop_dataloader, build_multicrop_dataset
from pipeline.batch import CropBatch
from pipeline.crops.augment import ViewRecipe
from pipeline.dataset import MultiCropDataset
from pipeline.shards.index import open_index
from tools.benchmarks.dali import decode_only, ours
from tools.benchmarks.gpu_parts.part import Case, Line, attempt, part
from tools.benchmarks.measure import Row, Setup, seconds_per_image
from tools.benchmarks.photographs import photograph_shards
from tools.benchmarks.windows import FULL_WINDOW, cost, in_windows

COMPARED = 32  # images
JITTER = {"jitter_prob": 1.0}
OPERATIONS: dict[str, dict[str, Any]] = {
    "crop and resize": {},
    "flip": {"flip_prob": 1.0},
    "brightness": {**JITTER, "brightness": 0.4},
    "contrast": {**JITTER, "contrast": 0.4},
    "saturation": {**JITTER, "saturation": 0.2},
    "hue": {**JITTER, "hue": 0.1},
    "grayscale": {"gray_prob": 1.0},
    "blur": {"blur_prob": 1.0},
    "solarisation": {"solarize_prob": 1.0},
}
WAYS = {"GPU crops": "gpu", "hybrid (CPU crops, uploaded)": "cpu"}


def way_options(case: Case, way: str) -> dict[str, Any]:
    """Where crops are made. In a rehearsal the CPU stands for the GPU, with the same operator."""
    return {} if case.rehearsal and WAYS[way] == "gpu" else {"crop_device": WAYS[way]}


@part("crops", 0.06)
def crops(case: Case) -> Iterator[Line]:
    """Grey levels between the two on the same draws; in a rehearsal DALI's operators and the compiled one, both on the CPU."""
    recipes = tuple(ViewRecipe(96, (0.2, 1.0), **change) for change in OPERATIONS.values())
    with TemporaryDirectory() as folder:
        # PNG, which both decode to the same pixels: what is left is the operation.
        lossless = open_index(photograph_shards(Path(folder), COMPARED, 1, "PNG"))
        yield from attempt(
            "operations", lambda: compare(case, MultiCropDataset(lossless, recipes, *_UNIT), [*OPERATIONS])
        )
    recipe = build_multicrop_dataset("custom", case.folder)
    names = ["whole recipe, JPEG, global 1", "whole recipe, JPEG, global 2", "whole recipe, JPEG, a local"]
    jpeg = MultiCropDataset(recipe.index, recipe.recipes[:3], *_UNIT)
    yield from attempt("whole recipe", compare, case, jpeg, names)
    hybrid = [f"{name}, hybrid" for name in names]
    yield from attempt("hybrid", compare, case, jpeg, hybrid, {"crop_device": "cpu"})


_UNIT = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)


def compare(
    case: Case, dataset: MultiCropDataset, names: list[str], options: dict[str, Any] | None = None
) -> Iterator[Line]:
    options = options or ({"compiled": False} if case.rehearsal else {"crop_device": "gpu"})
    here = first_batch(dataset, device=case.device, **options)
    reference = first_batch(dataset, device="cpu")
    for name, crop, expected in zip(names, here.crops, reference.crops, strict=True):
        difference = (crop.cpu().int() - expected.int()).abs().float()
        yield Line(name, {"mean": float(difference.mean()), "max grey levels": float(difference.max())})


def first_batch(dataset: MultiCropDataset, **options: Any) -> CropBatch:
    loader = build_multicrop_dataloader(dataset, COMPARED, shuffle=False, normalized=False, **options)
    return next(iter(loader))


@part("images/s", 0.2)
def rates(case: Case) -> Iterator[Line]:
    """Each row alone, as training uses it: uint8 crops. The CPU's load is that of this process."""
    batch = 8 if case.rehearsal else 128
    setup = Setup(case.folder, batch, case.threads, case.device)
    rows: dict[str, Row] = {"decode only": decode_only}
    rows |= {way: partial(ours, normalized=False, **way_options(case, way)) for way in WAYS}
    for name, row in rows.items():
        yield from attempt(name, rate, name, row, setup, 0.2 * case.seconds)
    on_cpu = Setup(case.folder, batch, case.threads)
    yield from attempt("CPU only", rate, "CPU only", partial(ours, normalized=False), on_cpu, 0.1 * case.seconds)


def rate(name: str, row: Row, setup: Setup, seconds: float) -> Iterator[Line]:
    wall, cpu = seconds_per_image(row, setup, 10**9, seconds)
    yield Line(name, {"images/s": 1 / wall, "CPU ms an image": 1e3 * cpu, "cores busy": cpu / wall})


@part("windows", 0.08)
def windows(case: Case) -> Iterator[Line]:
    """From one DALI graph to the next; the same stream in one window and in many small ones."""
    rows, batch = (32, 8) if case.rehearsal else (4096, 128)
    setup = Setup(case.folder, batch, case.threads, case.device)
    whole, cut = (
        seconds_per_image(partial(in_windows, size), setup, 10**9, 0.3 * case.seconds) for size in (FULL_WINDOW, rows)
    )
    for kind, place in (("wall time", 0), ("CPU time", 1)):
        seconds, share = cost([whole[place]], [cut[place]], rows)
        yield Line(f"windows of {rows}, {kind}", {"ms a change": 1e3 * seconds, "% of an epoch": 100 * share})


@part("DALI memory", 0.05)
def memory(case: Case) -> Iterator[Line]:
    """Above what there was before, torch's own left out; on the GPU, or of this process in a rehearsal."""
    dataset = build_multicrop_dataset("custom", case.folder)
    batch = 8 if case.rehearsal else 64
    graph_bytes(case, dataset, 2, {"device": case.device})  # libraries that stay loaded count for no graph
    for way in WAYS:
        options = {"device": case.device, "num_workers": case.threads, **way_options(case, way)}
        yield from attempt(way, graph_memory, case, way, dataset, batch, options)


def graph_memory(
    case: Case, way: str, dataset: MultiCropDataset, batch: int, options: dict[str, Any]
) -> Iterator[Line]:
    used, left = graph_bytes(case, dataset, batch, options)
    yield Line(f"{way}, batch {batch}", {"MiB": used / 2**20, "MiB left after closing": left / 2**20})


def graph_bytes(case: Case, dataset: MultiCropDataset, batch: int, options: dict[str, Any]) -> tuple[int, int]:
    """While the graph makes batches, and after it was closed; above what there was before."""
    before = used_bytes(case)
    loader = build_multicrop_dataloader(dataset, batch, normalized=False, **options)
    for _ in islice(loader, 4):
        pass
    used = used_bytes(case)
    del loader, _
    gc.collect()
    ReleaseUnusedMemory()
    return used - before, used_bytes(case) - before


def used_bytes(case: Case) -> int:
    if case.rehearsal:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()
