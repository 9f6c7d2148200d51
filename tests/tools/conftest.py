"""A small base variant for the tests of the study and of the arena."""

from pathlib import Path

import pytest

from tests.train.test_run import ROOT, TINY
from train.config.load import load_config

QUICKSTART = ROOT / "configs" / "quickstart.yaml"


@pytest.fixture
def base(data_path: Path, tmp_path: Path) -> Path:
    """A config of the smallest encoder on the tests' shards."""
    path = tmp_path / "tiny.yaml"
    settings = [*TINY, f"data.data_path={data_path}", "logging.run_name=tiny", "evaluation.linear_epochs=1"]
    path.write_text(load_config(QUICKSTART, settings).to_yaml())
    return path
