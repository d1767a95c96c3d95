import pytest
import torch

from lightning_modules.functional.sdf_vqvae.grid_signs import inside_grid, sign_iou


def grid_points(resolution):
    line = torch.linspace(-1, 1, resolution)
    return torch.stack(torch.meshgrid(line, line, line, indexing="ij"), -1)


def band_of(distance, resolution, band=4.0):
    scaled = distance * (resolution - 1) / 2 / band
    coords = (scaled.abs() < 1).nonzero()
    return coords, scaled[tuple(coords.T)]


def distances(resolution):
    points = grid_points(resolution)
    ball = points.norm(dim=-1) - 0.7
    ring = torch.stack([points[..., :2].norm(dim=-1) - 0.6, points[..., 2]], -1).norm(dim=-1) - 0.25
    hollow = torch.maximum(ball, 0.4 - points.norm(dim=-1))
    return {"ball": ball, "torus": ring, "hollow ball": hollow}


@pytest.mark.parametrize("solid", ["ball", "torus", "hollow ball"])
@pytest.mark.parametrize("band", [1.0, 1.8, 4.0])
def test_the_whole_grid_follows_from_the_band(solid, band):
    distance = distances(40)[solid]
    assert torch.equal(inside_grid(*band_of(distance, 40, band), 40), distance < 0)


def test_a_hole_in_the_band_is_outvoted():
    distance = distances(40)["ball"]
    coords, sdf = band_of(distance, 40)
    hole = (coords[:, 0] > 25) & ((coords[:, 1:] - 20).abs() < 5).all(1)
    assert hole.sum() > 100
    inside = inside_grid(coords[~hole], sdf[~hole], 40)
    assert sign_iou(inside, distance < 0) > 0.97


def test_a_grid_without_voxels_is_outside():
    assert not inside_grid(torch.zeros(0, 3, dtype=torch.int64), torch.zeros(0), 8).any()


def test_iou_counts_points():
    a, b = torch.zeros(4, 4, 4, dtype=torch.bool), torch.zeros(4, 4, 4, dtype=torch.bool)
    assert sign_iou(a, b) == 1
    a[0, 0, :3], b[0, 0, 1:] = True, True
    assert sign_iou(a, b) == 0.5
