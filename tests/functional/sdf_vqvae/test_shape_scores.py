import math

import pytest
import torch

from lightning_modules.functional.sdf_vqvae.shape_scores import mesh_scores, sdf_scores

BAND = 4.0


def ball(resolution=32, radius=0.7, centre=(0.0, 0.0, 0.0)):
    line = torch.linspace(-1, 1, resolution)
    points = torch.stack(torch.meshgrid(line, line, line, indexing="ij"), -1)
    distance = ((points - torch.tensor(centre)).norm(dim=-1) - radius) * (resolution - 1) / 2 / BAND
    coords = (distance.abs() < 1).nonzero()
    return coords, distance[tuple(coords.T)]


def test_a_perfect_reconstruction_is_perfect_in_every_figure():
    coords, sdf = ball()
    order = torch.randperm(len(coords))
    scores = sdf_scores(coords[order], sdf[order], coords, sdf, 32, BAND)
    assert scores.pop("sign_iou") == 1
    assert math.isnan(scores.pop("sdf_mae_beyond"))
    assert all(value == 0 for value in scores.values())
    meshes = mesh_scores(coords[order], sdf[order], coords, sdf, 32)
    assert meshes["f_score_64"] == meshes["f_score_128"] == 1
    assert meshes["chamfer"] < 1e-6
    assert meshes["normal_consistency"] == pytest.approx(1, abs=0.01)
    assert meshes["without_mesh"] == 0


def test_a_smaller_ball_is_off_by_the_difference_of_the_radii():
    coords, sdf = ball()
    thin, thin_sdf = ball(radius=0.7 - 2 / 31)  # one voxel
    scores = sdf_scores(thin, thin_sdf, coords, sdf, 32, BAND)
    assert scores["sign_iou"] == pytest.approx((0.7 - 2 / 31) ** 3 / 0.7**3, abs=0.03)
    assert 0.8 < scores["sdf_mae"] < 1
    assert scores["missing_voxels"] > 0
    assert scores["extra_voxels"] > 0
    meshes = mesh_scores(thin, thin_sdf, coords, sdf, 32)
    assert meshes["chamfer_voxels"] == pytest.approx(1, abs=0.1)
    assert meshes["f_score_64"] == pytest.approx(0, abs=0.01)


def test_voxels_that_were_not_decoded_count_as_the_end_of_the_band():
    coords, sdf = ball()
    kept = sdf.abs() < 0.5
    scores = sdf_scores(coords[kept], sdf[kept], coords, sdf, 32, BAND)
    assert scores["missing_voxels"] == pytest.approx(float((~kept).float().mean()))
    expected = BAND * (1 - sdf[~kept].abs()).sum() / len(sdf)
    assert scores["sdf_mae"] == pytest.approx(float(expected), rel=1e-4)
    assert scores["sign_iou"] == 1


def test_extra_voxels_are_measured_against_the_end_of_the_band_on_their_side():
    coords, sdf = ball()
    extra = torch.tensor([[16, 16, 16], [0, 0, 0]])  # deep inside, far outside
    scores = sdf_scores(torch.cat([coords, extra]), torch.cat([sdf, torch.tensor([-1.0, 0.5])]), coords, sdf, 32, BAND)
    assert scores["extra_voxels"] == pytest.approx(2 / (len(coords) + 2))
    assert scores["sdf_mae_beyond"] == pytest.approx(BAND * 0.25)
    assert scores["sdf_mae"] == 0


def test_nothing_decoded_is_worth_nothing():
    coords, sdf = ball()
    nothing = torch.zeros(0, 3, dtype=torch.int64), torch.zeros(0)
    scores = sdf_scores(*nothing, coords, sdf, 32, BAND)
    assert scores["sign_iou"] == 0
    assert scores["missing_voxels"] == 1
    meshes = mesh_scores(*nothing, coords, sdf, 32)
    assert meshes["without_mesh"] == 1
    assert meshes["f_score_64"] == meshes["normal_consistency"] == 0
    assert math.isnan(meshes["chamfer"])
