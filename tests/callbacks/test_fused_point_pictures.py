import torch

from callbacks.fused_point_pictures import paint_points


def test_a_point_is_a_square_and_its_centre_lies_over_its_neighbours_edge():
    uv = torch.tensor([[2.5, 3.5], [4.5, 3.5]])
    red_blue = torch.tensor([[1.0, 0, 0], [0, 0, 1.0]])
    picture = paint_points(uv, red_blue, (8, 10), 3)
    assert picture.shape == (8, 10, 3)
    assert torch.equal(picture[3, 2], red_blue[0])
    assert torch.equal(picture[3, 4], red_blue[1])
    painted = picture.any(dim=-1)
    assert painted.sum() == 9 + 6  # they share a column
    assert painted[2:5, 1:6].all()


def test_points_beyond_the_border_are_cut():
    picture = paint_points(torch.tensor([[0.5, 0.5], [50.0, 50.0]]), torch.ones(2, 3), (4, 4), 3)
    assert picture.any(dim=-1).sum() == 4


def test_no_point_is_black():
    assert not paint_points(torch.zeros(0, 2), torch.zeros(0, 3), (4, 4), 3).any()
