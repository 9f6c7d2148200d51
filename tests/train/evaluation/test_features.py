"""Frozen features: of the pipeline's centre crops, all or a part, and the baselines that need no encoder."""

import gc
import threading
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from model.encoder import MultiCropEncoder
from model.hjepa import default_levels
from pipeline.dataset import centre_crop_dataset
from pipeline.defaults import IMAGENET_MEAN, IMAGENET_STD
from pipeline.loader import MultiCropLoader, build_multicrop_dataloader
from pipeline.shards.index import UNLABELLED, ShardIndex
from pipeline.window import WindowBuilder
from train.evaluation import features
from train.evaluation.features import (
    LabelProblems,
    check_labels,
    colour_histogram,
    extract,
    mixed_precision,
    pixels,
    pooled_features,
    subsample_evenly,
)
from train.evaluation.measure import feature_std, rankme
from train.evaluation.offline import encoder_features

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 5, "num_heads": 2, "num_reg_tokens": 1}


def centre_loader(index: ShardIndex, batch_size: int) -> MultiCropLoader:
    dataset = centre_crop_dataset(index, 32, 1.0)
    return build_multicrop_dataloader(dataset, batch_size, device="cpu", num_workers=1, shuffle=False, drop_last=False)


@pytest.fixture
def encoder() -> MultiCropEncoder:
    torch.manual_seed(0)
    return MultiCropEncoder("vit_small_patch16_dinov3", [32], mean=IMAGENET_MEAN, std=IMAGENET_STD, **TINY).eval()


def test_stored_features_are_those_of_each_image_alone_whatever_the_batch(index: ShardIndex, encoder: MultiCropEncoder) -> None:
    extractors = {"pixels": pixels, "trained": pooled_features(encoder)}
    found = extract(centre_loader(index, 40), extractors)
    again = extract(centre_loader(index, 7), extractors)
    assert found["trained"].values["last"].shape == (103, 16)
    assert torch.equal(found["pixels"].values["last"], again["pixels"].values["last"])
    torch.testing.assert_close(found["trained"].values["last"], again["trained"].values["last"])
    assert torch.equal(found["trained"].labels, torch.from_numpy(index.samples["label"].astype(np.int64)))


def test_encoder_features_equal_what_timm_pools_block_by_block(encoder: MultiCropEncoder) -> None:
    crops = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found = encoder_features(encoder, default_levels(5))(crops)
    vit = encoder.vit
    # No final norm is asked of timm here: levels are layer-normed as the loss does, blocks as the encoder does.
    blocks = vit.forward_intermediates(crops, norm=False, output_fmt="NLC", intermediates_only=True)
    torch.testing.assert_close(found["last"], vit.norm(blocks[4]).mean(dim=1))
    torch.testing.assert_close(found["last4"], torch.cat([vit.norm(blocks[n]).mean(dim=1) for n in range(1, 5)], dim=1))
    for rung, level in enumerate(default_levels(5)):
        torch.testing.assert_close(found[f"level_{rung}"], F.layer_norm(blocks[level.layer], (16,)).mean(dim=1))
    assert set(found) == {"last", "last4", "level_0", "level_1", "level_2"}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_features_are_computed_in_bf16_on_a_gpu_and_in_float32_on_a_cpu(encoder: MultiCropEncoder, device: str) -> None:
    crops = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(device)
    extractor = encoder_features(encoder.to(device), default_levels(5))
    with torch.inference_mode(), mixed_precision(crops):
        product = crops.flatten(1) @ crops.flatten(1).T
        found = extractor(crops)
    assert product.dtype == (torch.bfloat16 if device == "cuda" else torch.float32)
    tolerance = {"rtol": 5e-2, "atol": 5e-2} if device == "cuda" else {"rtol": 0.0, "atol": 0.0}
    for name, values in extractor(crops).items():
        torch.testing.assert_close(found[name].float(), values, **tolerance)


def test_extracting_leaves_no_graph_behind(index: ShardIndex) -> None:
    """A training run goes on beside it."""
    loader = centre_loader(index, 16)
    next(iter(loader))
    graph = weakref.ref(loader._window.graph)
    assert graph() is not None
    for _ in range(2):
        extract(loader, {"pixels": pixels})
    gc.collect()
    assert loader._window is None
    assert graph() is None
    assert [thread for thread in threading.enumerate() if isinstance(thread, WindowBuilder)] == []


def test_a_part_of_a_split_is_spread_evenly_over_it(index: ShardIndex) -> None:
    features = extract(centre_loader(index, 16), {"pixels": pixels})["pixels"].values["last"]
    identity = index.samples["offset"] * 10 + index.samples["shard"]
    for max_samples in (1, 7, 50, 102, 103, 500):
        part = subsample_evenly(index, max_samples)
        assert len(part) == part.counts.sum() == min(max_samples, 103)
        rows = np.flatnonzero(np.isin(identity, part.samples["offset"] * 10 + part.samples["shard"]))
        assert max_samples < 3 or np.ptp(np.diff(rows)) <= 1
        if max_samples in (7, 102):
            loader = centre_loader(part, 16)
            assert torch.equal(extract(loader, {"pixels": pixels})["pixels"].values["last"], features[rows])


def test_features_that_would_not_fit_the_memory_are_refused_with_the_number_that_would(
    index: ShardIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "free_memory", lambda: 2 * 50 * 3072 * 2)
    with pytest.raises(ValueError, match=r"Lower evaluation.max_samples \(--max-samples\) to 50 or less"):
        extract(centre_loader(index, 16), {"pixels": pixels})


def test_missing_unknown_and_equal_labels_are_told_apart(index: ShardIndex) -> None:
    def relabelled(label: int, rows: slice) -> ShardIndex:
        samples = index.samples.copy()
        samples["label"][rows] = label
        return replace(index, samples=samples)

    assert check_labels(index, index) == LabelProblems()
    problems = check_labels(index, relabelled(UNLABELLED, slice(5, 6)))
    assert "1 of 103 samples without labels" in problems.missing
    assert problems == LabelProblems(missing=problems.missing)
    problems = check_labels(relabelled(0, slice(None)), relabelled(0, slice(None)))
    assert "all 103 images have the label 0" in problems.one_label
    assert problems == LabelProblems(one_label=problems.one_label)
    problems = check_labels(index, relabelled(99, slice(3)))
    assert "3 of 103 images have labels that no image of" in problems.unknown
    assert problems == LabelProblems(unknown=problems.unknown)


def test_rankme_of_orthogonal_features_is_their_number_and_of_a_line_is_one() -> None:
    assert rankme(torch.eye(16)) == pytest.approx(16, rel=1e-3)
    assert rankme(torch.randn(50, 1, generator=torch.Generator().manual_seed(0)) * torch.ones(1, 16)) < 1.01


def test_feature_std_is_one_over_root_d_for_spread_features_and_zero_for_a_collapse() -> None:
    spread = torch.randn(4000, 64, generator=torch.Generator().manual_seed(0))
    assert feature_std(spread) == pytest.approx(1 / 8, rel=0.02)
    assert feature_std(torch.ones(100, 64)) == 0


def test_the_baselines_see_what_their_names_say() -> None:
    crops = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert pixels(crops)["last"].shape == (2, 3072)
    shuffled = crops.flatten(2)[..., torch.randperm(64 * 64)].view_as(crops)
    torch.testing.assert_close(colour_histogram(shuffled)["last"], colour_histogram(crops)["last"])
    np.testing.assert_allclose(colour_histogram(crops)["last"].square().sum(1), 64 * 64)
