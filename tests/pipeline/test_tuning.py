from pipeline.dataset import MultiCropDataset, build_multicrop_dataloader, centre_crop_dataset
from pipeline.shards.index import ShardIndex
from pipeline.tuning import ReaderSettings, candidates, choose, tune


def test_the_fewest_threads_near_the_best_rate_are_chosen() -> None:
    rates = {ReaderSettings(4, 0.5): 90.0, ReaderSettings(8, 0.5): 98.0, ReaderSettings(8, 0.8): 99.0}
    assert choose(rates | {ReaderSettings(15, 0.8): 100.0}) == ReaderSettings(8, 0.8)
    assert choose(rates | {ReaderSettings(15, 0.8): 130.0}) == ReaderSettings(15, 0.8)


def test_candidates_never_use_more_than_the_cores() -> None:
    for cores in range(1, 65):
        for given in (None, 0.3):
            settings = candidates(cores, given)
            assert len(set(settings)) == len(settings) <= 6
            assert all(1 <= each.num_threads <= cores for each in settings)
            assert given is None or {each.hw_decoder_load for each in settings} == {given}


def test_settings_are_measured_on_real_loaders(index: ShardIndex) -> None:
    dataset: MultiCropDataset = centre_crop_dataset(index, 32, 1.0)
    settings = [ReaderSettings(1, 0.5), ReaderSettings(2, 0.5)]
    choice, rates = tune(
        lambda each: build_multicrop_dataloader(dataset, 8, device="cpu", num_workers=each.num_threads),
        settings,
        seconds=0.05,
    )
    assert choice in settings
    assert set(rates) == set(settings)
    assert min(rates.values()) > 0
