import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_modules.functional.splatting.gaussian_initialisation import (
    cameras_extent,
    gaussians_of_sparse_points,
    with_sh_degree,
)
from lightning_modules.functional.splatting.spherical_harmonics import spherical_harmonics_colors


def random_points(num: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(num, 3, generator=generator)
    return points, torch.randint(0, 256, (num, 3), generator=generator, dtype=torch.uint8)


@settings(max_examples=20, deadline=None)
@given(num=st.integers(2, 60), seed=st.integers(0, 2**31))
def test_scales_are_those_of_a_search_through_all_pairs(num, seed):
    points, colors = random_points(num, seed)
    scene = gaussians_of_sparse_points(points, colors)
    distances = torch.cdist(points.double(), points.double(), compute_mode="donot_use_mm_for_euclid_dist")
    distances.fill_diagonal_(float("inf"))
    nearest = distances.sort(dim=1).values[:, : min(3, num - 1)]
    expected = nearest.square().mean(dim=1).clamp_min(1e-7).sqrt().float()
    torch.testing.assert_close(scene.scales, expected[:, None].expand(-1, 3))


def test_a_point_has_its_colour_from_everywhere_and_the_asked_opacity():
    points, colors = random_points(30, 0)
    scene = gaussians_of_sparse_points(points, colors, sh_degree=2, opacity=0.1)
    assert scene.spherical_harmonics.shape == (30, 9, 3)
    directions = torch.nn.functional.normalize(torch.randn(30, 3), dim=1)
    seen = spherical_harmonics_colors(scene.spherical_harmonics, directions)
    torch.testing.assert_close(seen, colors / 255)
    torch.testing.assert_close(scene.opacities, torch.full((30,), 0.1))
    torch.testing.assert_close(scene.means, points)


def test_points_that_coincide_make_gaussians_of_a_size():
    points, colors = random_points(3, 1)
    scene = gaussians_of_sparse_points(points[:1].repeat(5, 1), colors[:1].repeat(5, 1))
    torch.testing.assert_close(scene.scales, torch.full((5, 3), 1e-7**0.5))


def test_one_point_is_too_few():
    points, colors = random_points(1, 0)
    with pytest.raises(ValueError, match="1 points to begin with"):
        gaussians_of_sparse_points(points, colors)


def test_another_degree_keeps_what_both_have():
    scene = gaussians_of_sparse_points(*random_points(4, 0), sh_degree=1)
    more, less = with_sh_degree(scene, 3), with_sh_degree(scene, 0)
    assert more.spherical_harmonics.shape == (4, 16, 3)
    assert torch.equal(more.spherical_harmonics[:, :4], scene.spherical_harmonics)
    assert not more.spherical_harmonics[:, 4:].any()
    assert torch.equal(less.spherical_harmonics, scene.spherical_harmonics[:, :1])


def test_the_extent_is_that_of_nerf_plus_plus():
    positions = torch.tensor([[1.0, 0, 0], [-1, 0, 0], [0, 0, 3], [0, 0, -3]])
    assert cameras_extent(positions) == pytest.approx(3.3)
    assert cameras_extent(positions + 100) == pytest.approx(3.3, rel=1e-5)


def test_cameras_in_one_place_are_refused():
    with pytest.raises(ValueError, match="All 4 cameras stand in one place"):
        cameras_extent(torch.ones(4, 3))
