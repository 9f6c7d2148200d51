"""The report of a run with damaged images shows their replacements."""

import shutil
from pathlib import Path

from pipeline.shards.index import open_index, save_index
from tests.train.test_run import ROOT, command
from train.run import main


def test_neighbours_are_drawn_from_the_replacements_of_damaged_images(data_path: Path, tmp_path: Path) -> None:
    folder = tmp_path / "damaged" / "train"
    shutil.copytree(data_path, tmp_path / "damaged")
    index = open_index(folder)
    save_index(folder, list(index.shards), index.samples)  # as it was before the damage
    for sample in index.samples[::3]:
        with (folder / index.shards[int(sample["shard"])]).open("r+b") as tar:
            tar.seek(int(sample["offset"]))
            tar.write(bytes(int(sample["size"])))
    settings = ("training.max_steps=2", "data.max_bad_share=0.5", "evaluation.linear_epochs=0", "logging.pictures=true")
    assert main(command(ROOT / "configs" / "quickstart.yaml", folder.parent, tmp_path, *settings)) == 0
    assert (tmp_path / "quickstart" / "figures" / "neighbours.png").exists()
    assert (tmp_path / "quickstart" / "report.html").exists()
