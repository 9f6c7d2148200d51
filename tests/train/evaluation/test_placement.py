"""Placement accuracy: against plain loops over tokens and boxes, at its two ends, and on crops that show where they are."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from model.geometry import cell_centres
from pipeline.shards.index import open_index
from tests.train.test_run import QUICKSTART, command
from train.config.load import load_config
from train.evaluation.placement import Placement, Tokens, placed_right, same_places


def random_pairs(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Boxes `[count, 2, 4]` and flips `[count, 2]`; some pairs do not touch."""
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(count, 2, 2, 2, generator=generator).sort(dim=2).values
    return corners.flatten(2), torch.rand(count, 2, generator=generator) < 0.5


def plain_places(boxes: torch.Tensor, flips: torch.Tensor, grid: int) -> list[list[int]]:
    found = []
    for (first, second), (mirrored, other_mirrored) in zip(boxes.tolist(), flips.tolist(), strict=True):
        cells = []
        for row in range(grid):
            for column in range(grid):
                along = (grid - 1 - column if mirrored else column) + 0.5
                y = first[0] + (first[2] - first[0]) * (row + 0.5) / grid
                x = first[1] + (first[3] - first[1]) * along / grid
                cell = -1
                for other in range(grid * grid):
                    top, left = divmod(other, grid)
                    left = grid - 1 - left if other_mirrored else left
                    high, wide = (second[2] - second[0]) / grid, (second[3] - second[1]) / grid
                    y0, x0 = second[0] + top * high, second[1] + left * wide
                    if y0 <= y < y0 + high and x0 <= x < x0 + wide:
                        cell = other
                cells.append(cell)
        found.append(cells)
    return found


def source_positions(boxes: torch.Tensor, flips: torch.Tensor, grid: int) -> torch.Tensor:
    """Features `[n, 2, cells, 4]` whose similarity falls with the distance in the source image, on each axis."""
    angles = 2 * cell_centres(boxes.flatten(0, 1), flips.flatten(), grid)
    return torch.cat([angles.cos(), angles.sin()], dim=-1).unflatten(0, (-1, 2))


@pytest.mark.parametrize("grid", [1, 4, 7])
def test_the_place_of_every_cell_is_that_of_a_loop_over_cells_and_boxes(grid: int) -> None:
    boxes, flips = random_pairs(200)
    places = same_places(boxes, flips, grid)
    assert places.tolist() == plain_places(boxes, flips, grid)
    assert 0.1 < (places >= 0).float().mean() < 0.9


@pytest.mark.parametrize("grid", [2, 4, 14])
def test_features_of_the_position_in_the_source_find_every_place_and_random_ones_as_many_as_a_guess(grid: int) -> None:
    boxes, flips = random_pairs(300)
    right = placed_right(source_positions(boxes, flips, grid), boxes, flips)
    assert right.float().mean() > 0.999  # but for rounding at the edges of cells
    assert len(right) == (same_places(boxes, flips, grid) >= 0).sum()
    wrong = placed_right(source_positions(boxes, ~flips, grid), boxes, flips)
    assert wrong.float().mean() < 0.7
    noise = torch.randn(300, 2, grid**2, 32, generator=torch.Generator().manual_seed(0))
    guessed = placed_right(noise, boxes, flips).float()
    assert abs(guessed.mean() - grid**-2) < 4 * guessed.std() / len(guessed) ** 0.5


def test_crops_of_pictures_that_show_their_own_coordinates_are_placed_right(tmp_path: Path) -> None:
    """Real crops: red rises from top to bottom, green from left to right."""
    ramp = np.zeros((128, 128, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = 2 * np.arange(128)[:, None], 2 * np.arange(128)
    picture = io.BytesIO()
    Image.fromarray(ramp).save(picture, "PNG")
    (tmp_path / "val").mkdir()
    with tarfile.open(tmp_path / "val" / "ramps-000000.tar", "w") as tar:
        for number in range(80):
            info = tarfile.TarInfo(f"{number:03d}.png")
            info.size = len(picture.getvalue())
            tar.addfile(info, io.BytesIO(picture.getvalue()))
    index = open_index(tmp_path / "val")

    def positions(crops: torch.Tensor) -> Tokens:
        middles = crops[:, :2].float().unflatten(3, (4, 8)).unflatten(2, (4, 8)).mean(dim=(3, 5)).flatten(2) / 128
        return {"last": torch.cat([middles.cos(), middles.sin()], dim=1).mT, "dark": torch.zeros(len(crops), 16, 2)}

    scores = []
    for changes in ([], ["data.augmentation.flip_prob=0.0"], ["seed=3"]):
        path, *overrides = command(QUICKSTART, tmp_path, tmp_path, *changes)
        pairs = Placement(load_config(Path(path), overrides), index)
        assert pairs.count == 80
        scores.append(pairs.measure(positions))
        assert scores[-1]["last"] > 93  # eight bits for a place
        assert scores[-1]["dark"] < 15
        assert pairs.baselines(8)["chance"] == 100 / 16
    assert scores[0] == scores[2]
    assert scores[0] != scores[1]
