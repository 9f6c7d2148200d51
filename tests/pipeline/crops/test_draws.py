import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp, kstest
from torchvision.transforms import RandomResizedCrop

from pipeline.crops.augment import BRIGHTNESS, FLIP, HUE, SATURATION, SIGMA, SOLARIZE, Y0, ViewRecipe, draw_parameters

RECIPE = ViewRecipe(
    32, (0.05, 0.4), flip_prob=0.5, jitter_prob=0.8, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1,
    gray_prob=0.2, blur_prob=0.3, solarize_prob=0.2,
)  # fmt: skip
COUNT = 4000


@pytest.fixture(scope="module")
def drawn() -> np.ndarray:
    """`[COUNT, P]`"""
    return draw_parameters((RECIPE,), 0, 0, 0, np.full(COUNT, 300), np.full(COUNT, 500))[0]


@pytest.mark.parametrize(("height", "width", "scale"), [(300, 500, (0.05, 0.4)), (64, 48, (0.4, 1.0)), (20, 400, (0.3, 1.0))])
def test_boxes_follow_torchvisions_distribution(height: int, width: int, scale: tuple[float, float]) -> None:
    recipe = ViewRecipe(32, scale)
    ours = draw_parameters((recipe,), 1, 0, 0, np.full(COUNT, height), np.full(COUNT, width))[0, :, Y0:FLIP]
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = np.array([RandomResizedCrop.get_params(image, list(scale), [3 / 4, 4 / 3]) for _ in range(COUNT)])
    ours_ijhw = np.stack([ours[:, 0], ours[:, 1], ours[:, 2] - ours[:, 0], ours[:, 3] - ours[:, 1]], 1)
    for column in range(4):
        assert ks_2samp(ours_ijhw[:, column], theirs[:, column]).pvalue > 1e-3, "top left height width"[column]


def test_factors_are_uniform_and_probabilities_are_kept(drawn: np.ndarray) -> None:
    colours = drawn[:, BRIGHTNESS : HUE + 1]
    jittered = colours[:, 0] != 1
    for column, (low, high) in enumerate([(0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-36, 36)]):
        factors = colours[jittered & ((column != 2) | (colours[:, 2] > 0)), column]
        assert kstest(factors, "uniform", (low, high - low)).pvalue > 1e-3
    for flags, probability in (
        (drawn[:, FLIP], 0.5), (jittered, 0.8), (drawn[:, SATURATION] == 0, 0.2), (drawn[:, SIGMA] > 0, 0.3),
        (drawn[:, SOLARIZE], 0.2),
    ):  # fmt: skip
        assert abs(flags.mean() - probability) < 5 * (probability * (1 - probability) / COUNT) ** 0.5


def test_the_draws_of_a_position_do_not_depend_on_its_batch_or_on_other_views() -> None:
    heights, widths = np.arange(100, 140), np.arange(200, 240)
    whole = draw_parameters((RECIPE, RECIPE, RECIPE), 7, 3, 1000, heights, widths)
    for start, stop in ((0, 1), (5, 17), (39, 40)):
        part = draw_parameters((RECIPE, RECIPE), 7, 3, 1000 + start, heights[start:stop], widths[start:stop])
        np.testing.assert_array_equal(part, whole[:2, start:stop])


def test_positions_views_epochs_and_seeds_draw_independently(drawn: np.ndarray) -> None:
    size = np.full(COUNT, 300)
    sigmas = drawn[:, SIGMA]
    others = [
        draw_parameters((RECIPE, RECIPE), 0, 0, 0, size, size)[1, :, SIGMA],
        draw_parameters((RECIPE,), 0, 1, 0, size, size)[0, :, SIGMA],
        draw_parameters((RECIPE,), 1, 0, 0, size, size)[0, :, SIGMA],
        np.roll(sigmas, 1),
    ]
    for other in others:
        assert abs(np.corrcoef(sigmas, other)[0, 1]) < 0.08


def test_the_central_box_is_the_square_of_the_shorter_side() -> None:
    recipe = ViewRecipe(32, None, centre_ratio=0.5)
    boxes = draw_parameters((recipe,), 0, 0, 0, np.array([100, 60]), np.array([60, 100]))[0, :, Y0:FLIP]
    np.testing.assert_array_equal(boxes, [[35, 15, 65, 45], [15, 35, 45, 65]])
