"""Vectors of all images of some shards, from an exported encoder or a run; a stopped pass continues where it was."""

import hashlib
import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from rich.console import Console

from pipeline.dataset import centre_crop_dataset, resolve_device
from pipeline.files import partial_file, write_atomic
from pipeline.loader import build_multicrop_dataloader
from pipeline.shards.index import ShardIndex, open_index
from pipeline.shards.manifest import read_manifest, read_object
from pipeline.text import Every, plural
from tools.export import timm_settings
from tools.exporting.formats import FeaturesAndTokens
from train.evaluation.features import mixed_precision
from train.evaluation.offline import find_checkpoint, load_trained
from train.output.display import ProgressDisplay

SAVE_EVERY_S = 20.0

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Embeddings:
    """`names` `[N]`: the files; `labels` `[N]`: names of classes, "" where there are none; `vectors` `[N, D] float32`.

    `tokens` `[N, T, D] float16`, in rows from the top left, or None. `places`: index and row of each image.
    """

    names: np.ndarray
    labels: np.ndarray
    vectors: np.ndarray
    tokens: np.ndarray | None
    places: list[tuple[ShardIndex, int]]

    def write(self, out: Path) -> None:
        """Write `name`, `label`, `vector` and, if there are any, `tokens` of every image."""
        columns = {"name": self.names, "label": self.labels, "vector": self.vectors}
        if self.tokens is not None:
            columns["tokens"] = self.tokens
        out.parent.mkdir(parents=True, exist_ok=True)
        with partial_file(out) as file:
            if out.suffix == ".npz":
                np.savez(file, **columns)  # type: ignore[arg-type]
                return
            import pyarrow  # type: ignore[import-not-found]
            from pyarrow import parquet

            lists = {key: list(value.reshape(len(value), -1)) if value.ndim > 1 else value for key, value in columns.items()}
            parquet.write_table(pyarrow.table(lists), file)


class ImageEncoder:
    """An encoder and the crop that it wants, from a folder that timm loads, a run or a checkpoint; `digest` names its weights."""

    def __init__(self, path: Path, device: str) -> None:
        self.kind = resolve_device(device)
        if (path / "config.json").exists():
            vit: Any = timm.create_model(f"local-dir:{path}", pretrained=True, num_classes=0)
            settings = timm.data.resolve_model_data_config(vit)
        else:
            checkpoint, config = find_checkpoint(path)
            target = load_trained(checkpoint, config, torch.device("cpu")).target
            vit, settings = target.vit, timm_settings(target.width, config)["pretrained_cfg"]
        self.device = torch.device("cuda" if self.kind == "gpu" else "cpu")
        self.model = FeaturesAndTokens(vit).eval().to(self.device)
        self.size, self.crop_ratio = int(settings["input_size"][-1]), float(settings["crop_pct"])
        self.mean, self.std = tuple(settings["mean"]), tuple(settings["std"])
        if settings["input_size"][0] != 3:
            raise ValueError(f"{path}: an encoder of {settings['input_size'][0]} channels; crops have 3")
        digest = hashlib.sha256(repr(settings).encode())
        for value in vit.state_dict().values():
            digest.update(value.cpu().contiguous().numpy())
        self.digest = digest.hexdigest()[:16]

    @torch.inference_mode()
    def __call__(self, crops: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """`[n, 3, S, S] float32`, normalised `->` timm's pooled features `[n, D] float32`, patch tokens `[n, T, D] float16`."""
        with mixed_precision(crops):
            pooled, tokens = self.model(crops)
        return pooled.float().cpu().numpy(), tokens.half().cpu().numpy()


def encode(encoder: ImageEncoder, folders: list[Path], work: Path, batch_size: int, with_tokens: bool) -> Embeddings:
    """Return the vectors of all images of the splits in `folders`, in stored order, without those that cannot be decoded.

    `work` holds unfinished arrays: a pass over the same images by the same encoder continues from them. Raises ValueError for
    more damaged images than the loader allows.
    """
    indices = [open_index(folder) for folder in folders]
    parts = [_encode_split(encoder, index, work / str(number), batch_size, with_tokens) for number, index in enumerate(indices)]
    names, labels, places = list[str](), list[str](), list[tuple[ShardIndex, int]]()
    for index, (rows, *_) in zip(indices, parts, strict=True):
        manifest = read_manifest(index.folder)
        classes = dict(enumerate(manifest.classes if manifest else ()))
        prefix = f"{Path(str(index.folder)).name}/" if len(indices) > 1 else ""
        names += [prefix + index.name(row) for row in rows.tolist()]
        labels += ["" if label < 0 else classes.get(label, str(label)) for label in index.samples["label"][rows].tolist()]
        places += [(index, row) for row in rows.tolist()]
    _, vectors, *tokens = map(np.concatenate, zip(*parts, strict=True))
    return Embeddings(np.array(names), np.array(labels), vectors, tokens[0] if tokens else None, places)


def _encode_split(encoder: ImageEncoder, index: ShardIndex, work: Path, batch_size: int, with_tokens: bool) -> list[np.ndarray]:
    """Return the rows of the index that can be decoded, their vectors and, if asked for, their tokens."""
    dataset = centre_crop_dataset(index, encoder.size, encoder.crop_ratio, encoder.mean, encoder.std)
    loader = build_multicrop_dataloader(dataset, min(batch_size, len(index)), shuffle=False, drop_last=False, device=encoder.kind,
                                        quarantine=work / "damaged.jsonl")  # fmt: skip
    work.mkdir(parents=True, exist_ok=True)
    state, arrays = work / "state.json", [work / "vectors.npy", *([work / "tokens.npy"] if with_tokens else [])]
    identity = {"data": index.digest, "encoder": encoder.digest}
    saved = read_object(state, f"Remove {work}") if state.exists() and all(path.exists() for path in arrays) else {}
    done = int(saved["done"]) if {key: saved.get(key) for key in identity} == identity else 0
    examples = encoder(torch.zeros(1, 3, encoder.size, encoder.size, device=encoder.device))[: len(arrays)]
    stores = [
        np.lib.format.open_memmap(path, "r+" if done else "w+", example.dtype, (len(index), *example.shape[1:]))
        for path, example in zip(arrays, examples, strict=True)
    ]
    loader.load_state_dict({"epoch": 0, "position": done})
    due, start, began = Every(SAVE_EVERY_S), done, time.monotonic()
    with ProgressDisplay(Console(stderr=True), "embed", "image", len(index), done, transient=True) as display:
        for batch in loader if done < len(index) else ():
            for store, output in zip(stores, encoder(batch.crops[0]), strict=False):
                store[done : done + len(output)] = output
            done += len(batch.labels)
            display.show(done, f"{(done - start) / (time.monotonic() - began):,.0f} images/s")
            if due.due() or done == len(index):
                for store in stores:
                    store.flush()
                write_atomic(state, json.dumps({**identity, "done": done}), durable=False)
    loader.close()
    if damaged := list(loader.quarantine.reasons):
        log.warning(f"{index.folder}: {plural(len(damaged), 'image')} cannot be decoded and got no vector")
    rows = np.delete(np.arange(len(index)), damaged)
    return [rows, *(store[rows] for store in stores)]
