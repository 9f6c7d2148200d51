import logging

import pytest
import torch

from pipeline.crops.device import DeviceError
from pipeline.dataset import build_multicrop_dataloader, centre_crop_dataset
from pipeline.loader import MultiCropLoader
from pipeline.shards.index import ShardIndex
from pipeline.tuning import ReaderSettings, candidates, choose, tune

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")


def test_the_fewest_threads_near_the_best_rate_are_chosen() -> None:
    rates = {ReaderSettings(4, 0.5): 90.0, ReaderSettings(8, 0.5): 98.0, ReaderSettings(8, 0.8): 99.0}
    assert choose(rates | {ReaderSettings(15, 0.8): 100.0}) == ReaderSettings(8, 0.8)
    assert choose(rates | {ReaderSettings(15, 0.8): 130.0}) == ReaderSettings(15, 0.8)


def test_the_crop_device_with_the_best_rate_is_chosen_and_its_threads_by_its_own_rates() -> None:
    rates = {ReaderSettings(2, 0.5): 99.0, ReaderSettings(8, 0.5): 100.0, ReaderSettings(4, 0.0, "cpu"): 98.0}
    assert choose(rates) == ReaderSettings(2, 0.5)
    assert choose(rates | {ReaderSettings(8, 0.0, "cpu"): 100.5}) == ReaderSettings(4, 0.0, "cpu")


def test_candidates_never_use_more_than_the_cores() -> None:
    for cores in range(1, 65):
        for given in (None, 0.3):
            settings = candidates(cores, given)
            assert len(set(settings)) == len(settings) <= 6
            assert all(1 <= each.num_threads <= cores for each in settings)
            assert given is None or {each.hw_decoder_load for each in settings} == {given}
            both = candidates(cores, given, ("gpu", "cpu"))
            assert [each for each in both if each.crop_device == "gpu"] == settings
            assert {each.num_threads for each in both if each.crop_device == "cpu"} == {
                each.num_threads for each in settings
            }


def loader_of(index: ShardIndex, settings: ReaderSettings) -> MultiCropLoader:
    """On a machine with a GPU all of them end there; otherwise those that are made on the CPU stay there."""
    device = "gpu" if torch.cuda.is_available() else settings.crop_device
    options = {"device": device, "crop_device": settings.crop_device, "num_workers": settings.num_threads}
    return build_multicrop_dataloader(centre_crop_dataset(index, 32, 1.0), 8, **options)


def test_settings_are_measured_on_real_loaders_under_a_step(index: ShardIndex) -> None:
    settings = [ReaderSettings(1, 0.5, "cpu"), ReaderSettings(2, 0.5, "cpu")]
    sizes: list[int] = []
    choice, rates = tune(
        lambda each: loader_of(index, each), settings, 0.05, lambda batch: sizes.append(len(batch.labels))
    )
    assert choice in settings
    assert set(rates) == set(settings)
    assert min(rates.values()) > 0
    assert set(sizes) == {8}
    assert len(sizes) >= 14


@no_gpu
def test_where_the_gpu_cannot_make_crops_the_cpu_does_and_a_line_says_so(
    index: ShardIndex, caplog: pytest.LogCaptureFixture
) -> None:
    settings = candidates(2, None, ("gpu", "cpu"))
    choice, rates = tune(lambda each: loader_of(index, each), settings, 0.02)
    assert choice.crop_device == "cpu"
    assert {each.crop_device for each in rates} == {"cpu"}
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "nvidia-smi" in record.getMessage()
    assert "\n" not in record.getMessage()


@no_gpu
def test_where_nothing_else_is_left_to_try_the_device_is_an_error(index: ShardIndex) -> None:
    with pytest.raises(DeviceError, match="no CUDA GPU"):
        tune(lambda each: loader_of(index, each), candidates(2))
