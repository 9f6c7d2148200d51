"""Prints digests of crops, losses and converted shards: a change that should not alter numbers prints the same lines.

    OMP_NUM_THREADS=1 python -m tests.digests > before.txt

Run it in both checkouts on one machine: the last bits of a loss depend on the processor and on torch's threads.
"""

import hashlib
import io
import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).parents[1]
STRATEGIES = {
    "global_only": [],
    "global_with_local_context": [],
    "cross_crop_prediction": [],
    "none": ["loss.prediction_weight=0", "loss.summary_weight=1.0"],
}
# Given in full, so that a changed default of the file does not look like a changed step.
TRAINING = (
    "device=cpu", "data.num_workers=1", "loss.summary_weight=0", "loss.prediction_weight=1.0", "training.max_steps=50",
    "evaluation.linear_epochs=0", "logging.log_frequency=1", "logging.tensorboard=false",
)  # fmt: skip


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:24]


def command(*words: str) -> None:
    subprocess.run([sys.executable, *words], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def crops(shards: Path) -> None:
    """Three epochs of small crops, and two batches at the sizes of ImageNet."""
    from pipeline import build_multicrop_dataloader, build_multicrop_dataset

    small = {"global_crop_size": 32, "local_crop_size": 16}
    for name, sizes, epochs, normalized in (("32/16", small, 3, False), ("224/96", {}, 1, True)):
        dataset = build_multicrop_dataset("sample", shards, **sizes)
        loader = build_multicrop_dataloader(dataset, 32, seed=7, device="cpu", num_workers=1, normalized=normalized)
        digest, batches = hashlib.sha256(), 0
        for _ in range(epochs):
            for batch in loader:
                for tensor in (*batch.crops, batch.boxes, batch.flips, batch.labels, batch.positions):
                    digest.update(tensor.contiguous().numpy().tobytes())
                batches += 1
                if normalized and batches == 2:
                    break
        print(f"crops {name}: {batches} batches {digest.hexdigest()[:24]}", flush=True)


def losses(shards: Path, folder: Path) -> None:
    """Fifty steps of each strategy: every logged loss, to the last bit."""
    for strategy, changes in STRATEGIES.items():
        settings = {change.partition("=")[0]: change for change in (*TRAINING, *changes)}.values()
        run = [f"masking.strategy={strategy}", f"data.data_path={shards}", f"logging.run_dir={folder}"]
        command("-m", "train.run", "configs/quickstart.yaml", *settings, *run, f"logging.run_name={strategy}")
        lines = [json.loads(line) for line in (folder / strategy / "metrics.jsonl").read_text().splitlines()]
        names = ("loss", "level_0", "level_1", "level_2", "summary", "view", "sigreg", "grad_norm")
        values = [[line[name].hex() for name in names if name in line] for line in lines if "loss" in line]
        print(f"losses {strategy}: {len(values)} steps {sha(json.dumps(values).encode())}", flush=True)


def pictures(folder: Path) -> Path:
    """Class folders with JPEG, PNG, WebP, gray, palette, CMYK, transparent and rotated images of fixed noise."""
    rng = np.random.default_rng(0)
    for number in range(60):
        height, width = (int(side) for side in rng.integers(20, 90, 2))
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
        mode, suffix = [("RGB", "jpg"), ("RGB", "png"), ("L", "png"), ("P", "png"), ("CMYK", "jpg"), ("RGB", "webp")][number % 6]
        path = folder / f"class {number % 3}" / f"{number:03d}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        exif = Image.Exif()
        exif[0x0112] = 1 + number % 8
        image.convert(mode).save(path, quality=90, **({"exif": exif} if suffix == "jpg" else {}))
    (folder / "class 0" / "broken.jpg").write_bytes(b"\xff\xd8\xff no image")
    return folder


def tar_of(folder: Path, path: Path) -> Path:
    """The same pictures as a WebDataset of other names and labels."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number, picture in enumerate(sorted(folder.rglob("*.*"))):
            for suffix, content in ((picture.suffix[1:], picture.read_bytes()), ("cls", str(number % 4).encode())):
                info = tarfile.TarInfo(f"{number:06d}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def shards_of(name: str, folder: Path) -> None:
    from pipeline.shards.index import open_index

    for split in sorted(path for path in folder.iterdir() if path.is_dir()):
        tars = {path.name: sha(path.read_bytes()) for path in sorted(split.glob("*.tar"))}
        index = open_index(split)
        print(f"shards {name}/{split.name}: {len(index)} samples, index {index.digest}, tars {sha(json.dumps(tars).encode())}")
        classes = json.loads((split / "manifest.json").read_text()).get("classes")
        print(f"  classes {sha(json.dumps(classes).encode())}", flush=True)


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        command("tools/make_shards.py", "sample", "--out", str(place / "sample"))
        shards_of("sample", place / "sample")
        source = pictures(place / "pictures")
        convert, bad = ("tools/make_shards.py", "convert"), ("--max-bad-fraction", "0.5")
        command(*convert, str(source), "--out", str(place / "folders"), "--val-ratio", "0.2", "--num-shards", "3", *bad)
        shards_of("folders", place / "folders")
        command(*convert, str(source), "--out", str(place / "resized"), "--resize", "32", *bad)
        shards_of("resized", place / "resized")
        command(*convert, str(tar_of(source, place / "some.tar")), "--out", str(place / "tar"), *bad)
        shards_of("tar", place / "tar")
        crops(place / "sample")
        losses(place / "sample", place / "runs")


if __name__ == "__main__":
    main()
