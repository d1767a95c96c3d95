import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.measure import marching_cubes as dense_marching_cubes
from torch import Tensor

from lightning_modules.functional.sdf_vqvae.marching_cubes import CORNERS, EDGES, marching_cubes, triangle_table
from lightning_modules.functional.sdf_vqvae.meshes import (
    TriangleMesh,
    euler_number,
    face_normals,
    is_consistently_wound,
    is_watertight,
    mesh_report,
)


def whole_grid(resolution: int) -> Tensor:
    return torch.cartesian_prod(*[torch.arange(resolution, dtype=torch.int32)] * 3)


def positions(coords: Tensor, resolution: int) -> Tensor:
    return coords.double() * (2 / (resolution - 1)) - 1


def enclosed_volume(mesh: TriangleMesh) -> float:
    a, b, c = mesh.vertices.double()[mesh.faces].unbind(1)
    return float((torch.linalg.cross(a, b) * c).sum() / 6)


def smooth_solid(points: Tensor) -> Tensor:
    """A torus joined with a ball, not an exact distance, without grid points on the surface."""
    x, y, z = points.unbind(1)
    ring = ((x.square() + y.square()).sqrt() - 0.6).square() + z.square()
    return torch.minimum(ring.sqrt() - 0.2137, (points - 0.3).norm(dim=1) - 0.35123)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), resolution=st.integers(3, 12), inside=st.floats(0.1, 0.9))
def test_random_signs_give_a_closed_surface_wound_one_way(seed: int, resolution: int, inside: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    sdf = torch.rand((resolution,) * 3, generator=generator) - inside
    for axis in range(3):  # outside all around: a surface that leaves the grid is open
        sdf.index_fill_(axis, torch.tensor([0, resolution - 1]), 1.0)
    mesh = marching_cubes(whole_grid(resolution), sdf.flatten(), resolution)
    if not bool((sdf < 0).any()):
        assert len(mesh.faces) == 0
        return
    assert is_watertight(mesh)
    assert is_consistently_wound(mesh)
    assert enclosed_volume(mesh) > 0
    assert mesh_report(mesh).num_zero_area_faces == 0
    assert len(mesh.faces.unique()) == len(mesh.vertices)


def test_every_case_cuts_exactly_the_edges_that_change_sides() -> None:
    table, num_triangles = triangle_table()
    for case in range(256):
        is_inside = [bool(case >> c & 1) for c in range(8)]
        crossed = {e for e, (c, axis) in enumerate(EDGES) if is_inside[c] != is_inside[c | 4 >> axis]}
        triangles = table[case, : num_triangles[case]]
        assert set(triangles.flatten().tolist()) == crossed
        assert all(len(set(triangle)) == 3 for triangle in triangles.tolist())
        # Rims of the patch lie in faces of the cell, where the next cell goes on; inner diagonals do not.
        sides = [frozenset((t[i], t[i - 1])) for t in triangles.tolist() for i in range(3)]
        for side in set(sides):
            ends = np.array([CORNERS[c | bit] for c, axis in (EDGES[e] for e in side) for bit in (0, 4 >> axis)])
            assert (sides.count(side) == 1) == bool((ends == ends[0]).all(axis=0).any())


def test_vertices_are_those_of_scikit_image_on_a_smooth_solid() -> None:
    resolution = 40
    coords = whole_grid(resolution)
    sdf = smooth_solid(positions(coords, resolution))
    mesh = marching_cubes(coords, sdf.float(), resolution)
    dense = sdf.float().view((resolution,) * 3).numpy()
    vertices, faces, _, _ = dense_marching_cubes(dense, 0.0, method="lorensen")
    expected = vertices * 2 / (resolution - 1) - 1
    order, expected_order = (np.lexsort(np.round(v, 4).T) for v in (mesh.vertices.numpy(), expected))
    assert len(mesh.vertices) == len(np.unique(np.round(expected, 5), axis=0))
    assert len(mesh.faces) == len(faces)
    np.testing.assert_allclose(mesh.vertices.numpy()[order], expected[expected_order], atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    normal=st.tuples(*[st.floats(-1, 1)] * 3).filter(lambda n: np.linalg.norm(n) > 0.1),
    offset=st.floats(-0.3, 0.3),
    level=st.sampled_from([0.0, 0.1]),
)
def test_a_plane_comes_back_exactly(normal: tuple[float, float, float], offset: float, level: float) -> None:
    n = torch.nn.functional.normalize(torch.tensor(normal, dtype=torch.float64), dim=0)
    coords = whole_grid(9)
    sdf = positions(coords, 9) @ n - offset
    mesh = marching_cubes(coords, sdf, 9, level)
    # A vertex keeps 1e-4 of its edge from grid points.
    atol = 1e-4 * 2 / 8 + 1e-6
    reached = mesh.vertices.double() @ n
    torch.testing.assert_close(reached, torch.full_like(reached, offset + level), atol=atol, rtol=0)
    normals = face_normals(TriangleMesh(mesh.vertices.double(), mesh.faces))
    big = torch.linalg.cross(*mesh.vertices.double()[mesh.faces].diff(dim=1).unbind(1)).norm(dim=1) > 1e-3
    torch.testing.assert_close(normals[big], n.expand(int(big.sum()), 3), atol=0.02, rtol=0)


def test_the_volume_of_a_ball_converges_with_the_square_of_the_step() -> None:
    errors = []
    for resolution in (16, 31):
        coords = whole_grid(resolution)
        mesh = marching_cubes(coords, positions(coords, resolution).norm(dim=1) - 0.7, resolution)
        assert (is_watertight(mesh), euler_number(mesh)) == (True, 2)
        errors.append(4 / 3 * np.pi * 0.7**3 - enclosed_volume(mesh))
    assert 3.5 < errors[0] / errors[1] < 4.5


def test_a_band_gives_the_surface_of_the_whole_grid_and_a_narrow_one_only_parts_of_it() -> None:
    resolution = 32
    coords = whole_grid(resolution)
    sdf = positions(coords, resolution).norm(dim=1) - 0.63
    whole = marching_cubes(coords, sdf, resolution)
    step = 2 / (resolution - 1)
    near = sdf.abs() <= 1.7321 * step
    banded = marching_cubes(coords[near], sdf[near], resolution)
    assert torch.equal(banded.vertices, whole.vertices)
    assert torch.equal(banded.faces, whole.faces)
    near = sdf.abs() <= 1.2 * step
    narrow = marching_cubes(coords[near], sdf[near], resolution)
    assert 0 < len(narrow.faces) < len(whole.faces)
    assert not is_watertight(narrow)


def test_without_one_grid_point_its_cells_are_open_and_the_rest_is_the_same() -> None:
    resolution = 20
    coords = whole_grid(resolution)
    sdf = positions(coords, resolution).norm(dim=1) - 0.63
    whole = marching_cubes(coords, sdf, resolution)
    lost = int(sdf.abs().argmin())
    kept = torch.arange(len(coords)) != lost
    holed = marching_cubes(coords[kept], sdf[kept], resolution)
    centre = positions(coords[lost][None], resolution).float()
    far = (whole.vertices[whole.faces].mean(dim=1) - centre).abs().amax(dim=1) > 2 / (resolution - 1)
    corners = {tuple(map(tuple, face.tolist())) for face in holed.vertices[holed.faces]}
    assert corners == {tuple(map(tuple, face.tolist())) for face in whole.vertices[whole.faces[far]]}
    assert mesh_report(holed).num_open_edges > 0


def test_a_surface_that_leaves_the_grid_does_not_go_on_at_its_other_side() -> None:
    resolution = 8
    coords = whole_grid(resolution)
    mesh = marching_cubes(coords, torch.rand(len(coords), generator=torch.Generator().manual_seed(3)) - 0.5, resolution)
    extent = mesh.vertices[mesh.faces].amax(dim=1) - mesh.vertices[mesh.faces].amin(dim=1)
    assert float(extent.max()) <= 2 / (resolution - 1) + 1e-6
    # Its rim lies in the faces of the cube.
    sides = torch.stack([mesh.faces, mesh.faces.roll(-1, dims=1)], dim=2).view(-1, 2).sort(dim=1).values
    pairs, counts = sides.unique(dim=0, return_counts=True)
    rim = mesh.vertices[pairs[counts == 1]]
    assert bool(((rim.abs() == 1).all(dim=1)).any(dim=1).all())
    assert int(counts.max()) == 2


def test_the_order_of_the_grid_points_does_not_matter() -> None:
    coords = whole_grid(12)
    sdf = smooth_solid(positions(coords, 12))
    order = torch.randperm(len(coords), generator=torch.Generator().manual_seed(1))
    mesh, shuffled = marching_cubes(coords, sdf, 12), marching_cubes(coords[order], sdf[order], 12)
    assert torch.equal(mesh.vertices, shuffled.vertices)
    assert torch.equal(mesh.faces, shuffled.faces)


def test_nothing_to_extract_is_an_empty_mesh() -> None:
    coords = whole_grid(4)
    for part, sdf in ((coords, torch.ones(64)), (coords[:0], torch.zeros(0)), (coords[:5], torch.arange(5.0) - 2)):
        mesh = marching_cubes(part, sdf, 4)
        assert mesh.vertices.shape == (0, 3)
        assert mesh.faces.shape == (0, 3)


def test_impossible_grids_are_refused() -> None:
    coords, sdf = whole_grid(4), torch.linspace(-1, 1, 64)
    with pytest.raises(ValueError, match=r"from 0 to 3, but a grid of resolution 3 has 0 to 2"):
        marching_cubes(coords, sdf, 3)
    with pytest.raises(ValueError, match="from -1 to 2"):
        marching_cubes(coords - 1, sdf, 4)
    with pytest.raises(ValueError, match=r"2 of 66 grid points are given twice.*\[0, 1, 2\]"):
        marching_cubes(torch.cat([coords, coords[[6, 9]]]), torch.cat([sdf, sdf[:2]]), 4)
    with pytest.raises(ValueError, match="resolution must be 2 or more, got 1"):
        marching_cubes(coords[:1], sdf[:1], 1)
    with pytest.raises(ValueError, match="1 of 64 signed distances"):
        marching_cubes(coords, sdf.index_fill(0, torch.tensor(3), torch.nan), 4)
