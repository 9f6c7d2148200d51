"""Real shards of small photographs, shared by all tests."""

import io
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.shards.index import UNLABELLED, ShardIndex, open_index, save_index

# The files that take longest, first: a worker that starts one of them last would keep all others waiting.
LONGEST_FILES = (
    "test_readme.py", "test_run.py", "test_data_changes.py", "test_convert.py", "test_bench_pipeline.py", "test_quarantine.py",
    "test_loader.py", "test_ranks.py", "test_step.py", "test_store.py", "test_evaluate.py", "test_doctor.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: number for number, name in enumerate(LONGEST_FILES)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))  # stable: the others keep their order


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch  # takes seconds, so neither collection nor other tests pay for it

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA GPU, torch sees none")


def photographs(count: int, seed: int = 0) -> Iterator[Image.Image]:
    """Yield pieces of two photographs, of many sizes and both orientations."""
    from skimage import data

    rng = np.random.default_rng(seed)
    sources = [Image.fromarray(data.astronaut()), Image.fromarray(data.coffee())]
    for i in range(count):
        source = sources[i % 2]
        width, height = (int(side) for side in rng.integers(80, 160, 2))
        x, y = int(rng.integers(0, source.width - width)), int(rng.integers(0, source.height - height))
        yield source.crop((x, y, x + width, y + height))


def write_shards(folder: Path, counts: list[int], extension: str = "jpg") -> Path:
    """Write tars with `counts` photographs each, labelled 0, 1, 0, 1, ..., as any WebDataset writer would."""
    folder.mkdir(parents=True)
    pictures = photographs(sum(counts))
    for shard, count in enumerate(counts):
        with tarfile.open(folder / f"photos-{shard:06d}.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for i in range(count):
                image = io.BytesIO()
                next(pictures).save(image, {"jpg": "JPEG", "png": "PNG"}[extension])
                for suffix, content in ((extension, image.getvalue()), ("cls", str(i % 2).encode())):
                    info = tarfile.TarInfo(f"{shard:03d}{i:05d}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return folder


def without_labels(data_path: Path, out: Path) -> Path:
    """Copy train and val to `out`, without labels. Returns `out`."""
    for split in ("train", "val"):
        index = open_index(data_path / split)
        samples = index.samples.copy()
        samples["label"] = UNLABELLED
        shutil.copytree(data_path / split, out / split)
        save_index(out / split, list(index.shards), samples)
    return out


@pytest.fixture(scope="session")
def data_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a data_path with a train split of 3 uneven shards (103 photographs) and a val split of 1 (24)."""
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder / "train", [41, 40, 22])
    write_shards(folder / "val", [24])
    return folder


@pytest.fixture(scope="session")
def index(data_path: Path) -> ShardIndex:
    return open_index(data_path / "train")
