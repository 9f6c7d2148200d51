import torch

from model.geometry import cell_centres, log_cell_size


def test_a_box_and_a_flip_move_a_point_where_geometry_says() -> None:
    """Compare with a plain loop, for 1,000 random crops and all strides."""
    torch.manual_seed(0)
    corners = torch.rand(1000, 2, 2).sort(dim=1).values
    boxes = torch.cat([corners[:, 0], corners[:, 1]], dim=1)
    flips = torch.rand(1000) < 0.5
    for grid, stride in ((14, 1), (14, 2), (14, 4), (4, 4)):
        centres = cell_centres(boxes, flips, grid, stride)
        side = -(-grid // stride)
        for cell in range(0, side * side, 5):
            row, column = divmod(cell, side)
            in_crop = [(start + min(start + stride, grid)) / 2 / grid for start in (row * stride, column * stride)]
            y = boxes[:, 0] + in_crop[0] * (boxes[:, 2] - boxes[:, 0])
            x_plain = boxes[:, 1] + in_crop[1] * (boxes[:, 3] - boxes[:, 1])
            x_flipped = boxes[:, 3] - in_crop[1] * (boxes[:, 3] - boxes[:, 1])
            expected = torch.stack([y, torch.where(flips, x_flipped, x_plain)], dim=1)
            torch.testing.assert_close(centres[:, cell], expected, atol=1e-6, rtol=0)


def test_two_crops_of_one_place_name_the_same_source_points() -> None:
    whole = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    half = torch.tensor([[0.0, 0.5, 0.5, 1.0]])
    plain, flipped = torch.tensor([False]), torch.tensor([True])
    coarse = cell_centres(whole, plain, 8).view(8, 8, 2)[:4, 4:]
    torch.testing.assert_close(cell_centres(half, plain, 4).view(4, 4, 2), coarse)
    torch.testing.assert_close(cell_centres(half, flipped, 4).view(4, 4, 2), coarse.flip(1))


def test_cell_sizes_are_logarithms_of_shares_of_the_source() -> None:
    sizes = log_cell_size(torch.tensor([[0.2, 0.1, 0.6, 0.9]]), grid=8, stride=2)
    torch.testing.assert_close(sizes.exp(), torch.tensor([[0.1, 0.2]]))
