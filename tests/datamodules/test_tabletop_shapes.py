import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.synthetic.tabletop_objects import CATALOGUE, disc
from datamodules.synthetic.tabletop_shapes import Solid, box, ellipsoid, lathe, shell, smooth_outline, tube, turn

CUP = shell(np.array([(0, 0), (0.4, 0), (0.5, 0.1), (0.55, 1.0)]), 0.05)
SOLIDS = {
    "cup": lathe(CUP),
    "vase": lathe(np.concatenate([[(0, 0)], smooth_outline([(0.2, 0), (0.5, 0.4), (0.2, 0.9)]), [(0, 0.9)]])),
    "rope": tube([(0, 0, 0), (0.5, 0.2, 0.4), (0.2, -0.4, 0.9)], [0.1, 0.2, 0.05]),
    "ellipsoid": ellipsoid((0.3, 0.6, 0.9), (0.1, 0, 0.2)),
    "box": box((0.4, 0.8, 1.2), (0.1, 0.2, 0.3)),
}


def placed(solid: Solid) -> Solid:
    return solid.moved(turn("z", 33) @ turn("x", 71), np.array([0.3, -0.2, 0.5]), 1.7)


def rays_towards(solid: Solid, count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    centre, radius = solid.bounding_sphere()
    outside = rng.normal(size=(count, 3))
    origins = centre + 2.5 * radius * outside / np.linalg.norm(outside, axis=1, keepdims=True)
    directions = centre + rng.uniform(-0.6, 0.6, (count, 3)) * radius - origins
    return origins, directions / np.linalg.norm(directions, axis=1, keepdims=True)


@pytest.mark.parametrize("name", SOLIDS)
def test_rays_stop_where_the_inside_begins(name: str) -> None:
    solid = placed(SOLIDS[name])
    origins, directions = rays_towards(solid, 2000)
    distances = solid.distances(origins, directions)
    hit = np.isfinite(distances)
    assert 0.2 < hit.mean() < 1
    for step, is_inside in ((-1e-3, False), (1e-4, True)):
        points = origins[hit] + (distances[hit, None] + step) * directions[hit]
        # A ray that grazes the surface may leave again within the step.
        assert (solid.contains(points) == is_inside).mean() > 0.985
    for share in np.linspace(0, 1, 40):
        before = np.where(hit, distances - 1e-6, 6.0) * share
        assert not solid.contains(origins + before[:, None] * directions).any()


@pytest.mark.parametrize("name", SOLIDS)
def test_surface_points_lie_on_the_surface_and_their_normals_point_outwards(name: str) -> None:
    solid = placed(SOLIDS[name])
    samples = solid.surface_points(0.03, np.random.default_rng(0))
    np.testing.assert_allclose(np.linalg.norm(samples.normals, axis=1), 1, atol=1e-9)
    assert solid.contains(samples.points - 2e-3 * samples.normals).mean() > 0.97
    assert (~solid.contains(samples.points + 2e-3 * samples.normals)).mean() > 0.97
    towards = solid.normals(samples.points)
    assert ((towards * samples.normals).sum(1) > 0.9).mean() > 0.95


@pytest.mark.parametrize("name", SOLIDS)
def test_surface_points_are_one_per_square_of_the_spacing(name: str) -> None:
    solid = placed(SOLIDS[name])
    count = len(solid.surface_points(0.03, np.random.default_rng(0)).points)
    assert count == pytest.approx(solid.area() / 0.03**2, rel=0.1)


def test_distances_equal_closed_forms() -> None:
    origins = np.array([[5.0, 0, 0], [0, 0, 9.0], [5.0, 0.5, 0.1]])
    directions = np.array([[-1.0, 0, 0], [0, 0, -1.0], [-1.0, 0, 0]])
    np.testing.assert_allclose(ellipsoid(2.0).distances(origins[:2], directions[:2]), [3, 7])
    np.testing.assert_allclose(box((2, 4, 6)).distances(origins, directions), [4, 6, 4])
    np.testing.assert_allclose(disc(1.0, -1, 2).distances(origins, directions), [4, 7, 5 - np.sqrt(0.75)])
    np.testing.assert_allclose(tube([(0, 0, -1), (0, 0, 1)], 0.6).distances(origins[:2], directions[:2]), [4.4, 7.4])


def test_areas_equal_closed_forms() -> None:
    assert disc(2.0, 0, 3).area() == pytest.approx(2 * np.pi * 2 * 3 + 2 * np.pi * 4)
    assert box((1, 2, 3)).area() == pytest.approx(22)
    assert ellipsoid(2.0).area() == pytest.approx(16 * np.pi)


@settings(max_examples=20, deadline=None)
@given(degrees=st.floats(-180, 180), scale=st.floats(0.2, 5), seed=st.integers(0, 99))
def test_moving_a_body_and_its_rays_together_scales_the_distances(degrees: float, scale: float, seed: int) -> None:
    solid, rotation, shift = SOLIDS["cup"], turn("y", degrees), np.array([1.0, -2, 3])
    origins, directions = rays_towards(solid, 50, seed)
    expected = scale * solid.distances(origins, directions)
    moved = solid.moved(rotation, shift, scale)
    distances = moved.distances(shift + scale * origins @ rotation.T, directions @ rotation.T)
    same = np.isclose(distances, expected, rtol=1e-6) | (np.isinf(distances) & np.isinf(expected))
    assert same.mean() > 0.97  # a ray through a seam may fall to either side


@pytest.mark.parametrize("kind", CATALOGUE, ids=lambda kind: kind.prompt)
def test_every_object_of_the_catalogue_stands_on_the_table(kind) -> None:
    points = np.concatenate(
        [solid.surface_points(0.01, np.random.default_rng(0)).points for part in kind.build() for solid in part.solids]
    )
    assert -0.003 < points[:, 2].min() < 0.003
    assert 0.04 < points[:, 2].max() < 0.32
    assert np.hypot(points[:, 0], points[:, 1]).max() < 0.17
