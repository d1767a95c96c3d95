import pytest
import torch
import torch.nn.functional as F

from lightning_modules.functional.sdf_vqvae.neighbour_maps import neighbour_map, voxel_keys
from lightning_modules.functional.sdf_vqvae.sdf_losses import (
    kl_divergence,
    near_sharp_edges,
    occupancy_difference,
    outside_difference,
    sdf_difference,
)


def test_differences_are_those_of_torch_row_by_row():
    decoded, target = torch.randn(9, 1), torch.randn(9, 1)
    l1, mse = F.l1_loss(decoded, target), F.mse_loss(decoded, target)
    assert sdf_difference(decoded, target, kind="l1").mean() == pytest.approx(float(l1))
    assert sdf_difference(decoded, target, kind="mse").mean() == pytest.approx(float(mse))
    assert sdf_difference(decoded, target, kind="l1+mse").mean() == pytest.approx(float(l1 + mse))


def test_voxels_outside_may_be_at_either_end_of_the_band():
    decoded = torch.tensor([[1.0], [-1.0], [0.25]])
    assert outside_difference(decoded, kind="l1").tolist() == [0, 0, 0.75]


def test_occupancy_of_the_true_children_costs_nothing():
    occupied = torch.rand(5, 8) < 0.5
    assert occupancy_difference(100 * (2 * occupied.float() - 1), occupied).max() < 1e-6
    assert occupancy_difference(torch.zeros(5, 8), occupied).mean() == pytest.approx(0.693147, rel=1e-5)


def test_divergence_is_that_of_torch():
    mean, log_variance = torch.randn(6, 3, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    ours = kl_divergence(mean, log_variance)
    distribution = torch.distributions.Normal(mean, (log_variance / 2).exp())
    standard = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
    torch.testing.assert_close(ours, torch.distributions.kl_divergence(distribution, standard).mean(1))


def test_edges_of_a_box_are_sharp_and_its_faces_and_a_ball_are_not():
    resolution, band = 32, 4.0
    line = torch.arange(resolution).float() - 15.5
    points = torch.stack(torch.meshgrid(line, line, line, indexing="ij"), -1)
    beyond = points.abs() - 9
    box = beyond.clamp_min(0).norm(dim=-1) + beyond.amax(-1).clamp_max(0)
    for distance, has_edges in ((box, True), (points.norm(dim=-1) - 10, False)):
        coords = (distance.abs() < band).nonzero()
        coords = F.pad(coords, (1, 0)).int()
        neighbours = neighbour_map(voxel_keys(coords, resolution), resolution, is_sorted=True)
        sdf = (distance / band)[tuple(coords[:, 1:].long().T)][:, None]
        sharp = near_sharp_edges(sdf, neighbours, band=band)
        assert bool(sharp.any()) == has_edges
        if has_edges:
            close_to_faces = ((coords[:, 1:] - 15.5).abs() > 6.5).sum(1)
            assert (close_to_faces[sharp] >= 2).all()  # beside two faces at once
