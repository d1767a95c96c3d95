import numpy as np
import pytest
import torch
import trimesh
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_modules.functional.sdf_vqvae.mesh_metrics import (
    SurfaceComparison,
    chamfer_distance,
    compare_surfaces,
    distances_to_surface,
    f_score,
    normal_consistency,
    sample_surface,
    triangle_distances,
)
from lightning_modules.functional.sdf_vqvae.meshes import TriangleMesh, face_areas
from tests.functional.sdf_vqvae.solids import box, brute_force_distances, joined, sphere, torus


def square(height: float, half: float = 1.0) -> TriangleMesh:
    corners = torch.tensor([[-half, -half, height], [half, -half, height], [half, half, height], [-half, half, height]])
    return TriangleMesh(corners, torch.tensor([[0, 1, 2], [0, 2, 3]]))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), flatness=st.sampled_from([1.0, 1e-3, 1e-7]))
def test_distances_to_triangles_are_those_of_trimesh(seed: int, flatness: float) -> None:
    rng = np.random.default_rng(seed)
    triangles, points = rng.normal(size=(20, 3, 3)), rng.normal(size=(20, 3))
    triangles[:, 2] = triangles[:, 1] + flatness * (triangles[:, 2] - triangles[:, 1])
    expected = np.linalg.norm(trimesh.triangles.closest_point(triangles, points) - points, axis=1)
    measured = triangle_distances(torch.from_numpy(points), torch.from_numpy(triangles))
    np.testing.assert_allclose(measured.numpy(), expected, atol=1e-9 / flatness * 1e-3 + 1e-9)


def test_triangles_without_area_are_segments_and_points() -> None:
    corners = torch.tensor([[[0.0, 0, 0], [1, 0, 0], [3, 0, 0]], [[1.0, 1, 1], [1, 1, 1], [1, 1, 1]]])
    points = torch.tensor([[2.0, 2, 0], [1, 1, 4]])
    torch.testing.assert_close(triangle_distances(points, corners), torch.tensor([2.0, 3.0]))


def test_distances_to_a_surface_are_those_to_its_nearest_face() -> None:
    mesh = joined(torus(), sphere(0.15, 1))
    points = torch.rand(500, 3, dtype=torch.float64) * 2 - 1
    distances, face_ids = distances_to_surface(points, mesh)
    np.testing.assert_allclose(distances.numpy(), brute_force_distances(points.numpy(), mesh), atol=1e-6)
    own = triangle_distances(points, mesh.vertices.double()[mesh.faces[face_ids]])
    assert torch.equal(own, distances)


def test_samples_lie_on_their_faces_in_proportion_to_the_area() -> None:
    mesh = box(0.1, 0.4, 0.9)
    points, face_ids = sample_surface(mesh, 5000)
    assert float(triangle_distances(points, mesh.vertices.double()[mesh.faces[face_ids]]).max()) < 1e-9
    expected = face_areas(mesh) / face_areas(mesh).sum() * 5000
    assert float((face_ids.bincount(minlength=len(mesh.faces)) - expected).abs().max()) < 2
    # Even within a triangle: its mean is its centre, and each half towards a corner holds a quarter.
    triangle = TriangleMesh(torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0]]), torch.tensor([[0, 1, 2]]))
    x, y, _ = sample_surface(triangle, 20_000).points.unbind(1)
    for near_corner in (x > 0.5, y > 0.5, x + y < 0.5):
        assert float(near_corner.double().mean()) == pytest.approx(0.25, abs=0.01)


def test_samples_depend_on_the_seed_alone() -> None:
    mesh = torus()
    assert torch.equal(sample_surface(mesh, 100, seed=3).points, sample_surface(mesh, 100, seed=3).points)
    assert not torch.equal(sample_surface(mesh, 100, seed=3).points, sample_surface(mesh, 100, seed=4).points)


@pytest.mark.parametrize("height", [0.0, 0.01, 0.3])
def test_parallel_squares_are_as_far_apart_as_their_planes(height: float) -> None:
    comparison = compare_surfaces(square(0.0), square(height), 1000)
    assert float(chamfer_distance(comparison)) == pytest.approx(height, abs=1e-7)
    assert float(f_score(comparison, 0.02)) == (height < 0.02)
    assert float(normal_consistency(comparison)) == pytest.approx(1)


def test_a_square_in_a_larger_one_has_precision_one_and_recall_of_its_area() -> None:
    comparison = compare_surfaces(square(0.0, 0.5), square(0.0, 1.0), 20_000)
    precision, recall = 1.0, (1 + 2 * 0.1) ** 2 / 4 - 0.1**2 * (4 - np.pi) / 4  # the square and its rim of 0.1
    assert float(f_score(comparison, 0.1)) == pytest.approx(2 * precision * recall / (1 + recall), abs=0.005)
    assert float(comparison.from_reconstruction.max()) == pytest.approx(0, abs=1e-7)
    # The mean distance of the larger square: four sides and four corners, in closed form.
    corner = (np.sqrt(2) + np.log(1 + np.sqrt(2))) / 3 * 0.5
    mean = (4 * 0.5 * 0.25 + 4 * 0.25 * corner) / 4
    assert float(comparison.from_truth.mean()) == pytest.approx(mean, abs=0.005)


def test_concentric_spheres_are_as_far_apart_as_their_radii() -> None:
    comparison = compare_surfaces(sphere(0.5, 4), sphere(0.6, 4), 4000)
    assert float(chamfer_distance(comparison)) == pytest.approx(0.1, abs=0.001)
    assert float(f_score(comparison, 0.11)) == 1
    assert float(f_score(comparison, 0.09)) == 0
    assert float(normal_consistency(comparison)) > 0.998


@settings(max_examples=20, deadline=None)
@given(scale=st.floats(0.01, 100), shift=st.floats(-1, 1))
def test_metrics_follow_the_unit_and_not_the_place(scale: float, shift: float) -> None:
    def moved(mesh: TriangleMesh) -> TriangleMesh:
        return TriangleMesh((mesh.vertices.double() + shift) * scale, mesh.faces)

    first, second = torus(), box(0.4, 0.5, 0.3)
    here, there = compare_surfaces(first, second, 500), compare_surfaces(moved(first), moved(second), 500)
    assert float(chamfer_distance(there)) == pytest.approx(scale * float(chamfer_distance(here)), rel=1e-4)
    assert float(f_score(there, 0.123 * scale)) == pytest.approx(float(f_score(here, 0.123)), abs=0.005)
    assert float(normal_consistency(there)) == pytest.approx(float(normal_consistency(here)), abs=0.02)


def test_metrics_are_symmetric_and_perfect_for_the_same_surface() -> None:
    first, second = torus(), sphere(0.6)
    ahead, back = compare_surfaces(first, second, 2000), compare_surfaces(second, first, 2000)
    swapped = SurfaceComparison(
        back.from_truth, back.from_reconstruction, back.truth_alignment, back.reconstruction_alignment
    )
    for measured, expected in zip(ahead, swapped, strict=True):
        assert torch.equal(measured, expected)
    for metric in (chamfer_distance, normal_consistency, lambda comparison: f_score(comparison, 0.05)):
        assert float(metric(ahead)) == pytest.approx(float(metric(back)), rel=1e-12)
    itself = compare_surfaces(first, first, 2000)
    assert float(chamfer_distance(itself)) < 1e-7
    assert float(f_score(itself, 1e-6)) == 1
    assert float(normal_consistency(itself)) == pytest.approx(1, abs=2e-3)  # samples beside an edge see both its faces


def test_a_surface_inside_out_is_seen_in_the_alignment_and_forgiven_by_the_consistency() -> None:
    mesh = sphere(0.5, 3)
    turned = compare_surfaces(TriangleMesh(mesh.vertices, mesh.faces.flip(1)), mesh, 1000)
    assert float(turned.truth_alignment.max()) < -0.9
    assert float(normal_consistency(turned)) > 0.99


def test_a_missing_surface_is_infinitely_far_and_scores_nothing() -> None:
    mesh = sphere(0.5, 1)
    empty = TriangleMesh(torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.int64))
    for comparison in (compare_surfaces(empty, mesh, 10), compare_surfaces(mesh, empty, 10)):
        assert float(chamfer_distance(comparison)) == torch.inf
        assert float(f_score(comparison, 0.1)) == 0
        assert float(normal_consistency(comparison)) == 0


def test_surfaces_that_cannot_be_sampled_are_refused() -> None:
    flat = TriangleMesh(torch.tensor([[0.0, 0, 0], [1, 0, 0], [2, 0, 0]]), torch.tensor([[0, 1, 2]]))
    with pytest.raises(ValueError, match="no area"):
        sample_surface(flat, 10)
    with pytest.raises(ValueError, match="num_samples must be 1 or more"):
        sample_surface(sphere(0.5, 1), 0)
    with pytest.raises(ValueError, match="NaN"):
        compare_surfaces(TriangleMesh(flat.vertices + torch.nan, flat.faces), sphere(0.5, 1))
