import logging
from pathlib import Path

import pytest

from pipeline.tuning import ReaderSettings
from train import build
from train.config.load import load_config

ROOT = Path(__file__).parents[2]


def test_reader_settings_are_measured_and_the_choice_is_logged(
    data_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """On a GPU the run does this at its start; here with the CPU's loaders."""
    config = load_config(
        ROOT / "configs" / "quickstart.yaml", [f"data.data_path={data_path}", "data.dataset=custom", "device=cpu"]
    )
    caplog.set_level(logging.INFO)
    dataset = build.build_dataset(config)
    assert build.tuned_reader(config, dataset) == {}
    arguments = build._fastest_reader(config, dataset, [ReaderSettings(1, 0.5), ReaderSettings(2, 0.5)])
    assert arguments["num_workers"] in (1, 2)
    assert caplog.messages[0].startswith(f"data: {arguments['num_workers']} DALI threads")
    loader = build.build_loader(config, dataset, 8, normalized=False, **arguments)
    assert loader.reader.num_threads == arguments["num_workers"]
