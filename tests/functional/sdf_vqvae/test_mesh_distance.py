import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import ConvexHull

from lightning_modules.functional.sdf_vqvae import mesh_distance
from lightning_modules.functional.sdf_vqvae.marching_cubes import marching_cubes
from lightning_modules.functional.sdf_vqvae.mesh_distance import sparse_sdf
from lightning_modules.functional.sdf_vqvae.mesh_metrics import chamfer_distance, compare_surfaces
from lightning_modules.functional.sdf_vqvae.meshes import (
    TriangleMesh,
    euler_number,
    is_watertight,
    merge_vertices,
    normalised,
)
from tests.functional.sdf_vqvae.solids import (
    box,
    brute_force_distances,
    exact_winding_numbers,
    grid_points,
    joined,
    real_mesh,
    soup,
    sphere,
    torus,
)

MESHES = ("featuretype.stl", "spot.obj", "torus.obj", "wingnut.obj")


def whole_grid(resolution: int) -> torch.Tensor:
    return torch.cartesian_prod(*[torch.arange(resolution, dtype=torch.int32)] * 3)


@pytest.mark.parametrize("resolution", [3, 9, 16, 21])
@pytest.mark.parametrize("band", [0.7, 2.5])
def test_all_points_within_the_band_are_found_with_their_distances(resolution: int, band: float) -> None:
    mesh = joined(torus(resolution), sphere(0.15, 1))
    coords, sdf = sparse_sdf(mesh, resolution, band)
    grid = whole_grid(resolution)
    points = grid_points(grid, resolution)
    reach = band * 2 / (resolution - 1)
    distances = brute_force_distances(points, mesh)
    assert np.abs(distances - reach).min() > 1e-6, "the case is ambiguous"
    near = torch.from_numpy(distances < reach)
    assert coords.dtype == torch.int32
    assert torch.equal(coords, grid[near])  # sorted by key, as the grid is
    inside = exact_winding_numbers(points, mesh)[near.numpy()] > 0.5
    expected = np.where(inside, -1, 1) * distances[near.numpy()] / reach
    np.testing.assert_allclose(sdf.numpy(), expected, atol=1e-6 / reach)


@settings(max_examples=20, deadline=None)
@given(half=st.tuples(*[st.floats(0.1, 0.9)] * 3), band=st.floats(1.0, 5.0))
def test_a_box_has_its_closed_form(half: tuple[float, float, float], band: float) -> None:
    half = tuple(float(np.float32(side)) for side in half)
    coords, sdf = sparse_sdf(box(*half), 24, band)
    offsets = np.abs(grid_points(coords, 24)) - np.array(half)
    outside = np.linalg.norm(offsets.clip(min=0), axis=1)
    expected = outside + offsets.max(axis=1).clip(max=0)
    np.testing.assert_allclose(sdf.numpy() * band * 2 / 23, expected, atol=1e-6)


@pytest.mark.parametrize("sign", ["parity", "winding"])
def test_faces_edges_and_vertices_on_the_lines_of_the_grid_count_once(sign: str) -> None:
    axes = torch.tensor([[0.5, 0, 0], [-0.5, 0, 0], [0, 0.5, 0], [0, -0.5, 0], [0, 0, 0.5], [0, 0, -0.5]])
    faces = [[0, 2, 4], [2, 1, 4], [1, 3, 4], [3, 0, 4], [2, 0, 5], [1, 2, 5], [3, 1, 5], [0, 3, 5]]
    octahedron = TriangleMesh(axes, torch.tensor(faces))
    for mesh, inside in (
        (octahedron, lambda p: 0.5 - np.abs(p).sum(axis=1)),
        (box(0.5, 0.5, 0.5), lambda p: 0.5 - np.abs(p).max(axis=1)),
        (box(0.5, 0.25, 0.5, centre=(0, 0.25, 0)), lambda p: 0.5 - np.abs(p * [1, 2, 1] - [0, 0.5, 0]).max(axis=1)),
    ):
        coords, sdf = sparse_sdf(mesh, 33, 30, sign)
        margin = inside(grid_points(coords, 33))
        off_surface = np.abs(margin) > 1e-9
        assert len(coords) == 33**3
        assert off_surface.sum() < len(coords)
        np.testing.assert_array_equal((sdf.numpy() < 0)[off_surface], (margin > 0)[off_surface])


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), num_corners=st.integers(5, 20))
def test_solids_with_corners_on_grid_points_contain_what_their_half_spaces_contain(seed: int, num_corners: int) -> None:
    corners = np.random.default_rng(seed).integers(1, 8, (num_corners, 3))
    if np.linalg.matrix_rank(corners - corners[0]) < 3:
        return
    hull = ConvexHull(corners)
    away = np.einsum("ij,ij->i", hull.equations[:, :3], corners[hull.simplices[:, 0]] - corners.mean(axis=0))
    points = corners[hull.simplices]
    ccw = np.einsum(
        "ij,ij->i", np.cross(points[:, 1] - points[:, 0], points[:, 2] - points[:, 0]), hull.equations[:, :3]
    )
    assert (away > 0).all()
    faces = np.where(ccw[:, None] > 0, hull.simplices, hull.simplices[:, ::-1])
    mesh = TriangleMesh(torch.from_numpy(corners).float() / 4 - 1, torch.from_numpy(faces.astype(np.int64)))
    for sign in ("parity", "winding"):
        coords, sdf = sparse_sdf(mesh, 9, 8.5, sign)
        heights = (coords.numpy() @ hull.equations[:, :3].T + hull.equations[:, 3]).max(axis=1)
        off_surface = np.abs(heights) > 1e-9
        np.testing.assert_array_equal((sdf.numpy() < 0)[off_surface], (heights < 0)[off_surface])


@pytest.mark.parametrize("name", MESHES)
def test_signs_of_real_meshes_are_those_of_exact_winding_numbers(shared_data, name: str) -> None:
    mesh = merge_vertices(normalised(real_mesh(shared_data / "meshes" / name))[0])
    coords, sdf = sparse_sdf(mesh, 96)
    rows = torch.randperm(len(coords), generator=torch.Generator().manual_seed(0))[:600]
    inside = exact_winding_numbers(grid_points(coords[rows], 96), mesh) > 0.5
    off_surface = sdf[rows].abs().numpy() > 1e-4
    np.testing.assert_array_equal((sdf[rows].numpy() < 0)[off_surface], inside[off_surface])
    by_turns = sparse_sdf(mesh, 96, sign="winding")[1]
    assert torch.equal(by_turns, sdf)


@pytest.mark.parametrize("name", MESHES)
def test_real_meshes_come_back_from_their_distances(shared_data, name: str) -> None:
    mesh = merge_vertices(normalised(real_mesh(shared_data / "meshes" / name))[0])
    resolution = 128
    back = marching_cubes(*sparse_sdf(mesh, resolution), resolution)
    assert is_watertight(back)
    assert euler_number(back) == euler_number(mesh)
    step = 2 / (resolution - 1)
    assert float(chamfer_distance(compare_surfaces(back, mesh, 20_000))) < 0.05 * step


def test_defects_that_parity_forgives_change_nothing() -> None:
    mesh = torus()
    coords, sdf = sparse_sdf(mesh, 40)
    random = torch.Generator().manual_seed(0)
    turned = torch.rand(len(mesh.faces), generator=random) < 0.2
    flipped = TriangleMesh(mesh.vertices, torch.where(turned[:, None], mesh.faces.flip(1), mesh.faces))
    doubled = TriangleMesh(mesh.vertices, torch.cat([mesh.faces, mesh.faces[turned].roll(1, dims=1)]))
    both_sides = TriangleMesh(mesh.vertices, torch.cat([mesh.faces, mesh.faces.flip(1)]))
    collapsed = TriangleMesh(mesh.vertices, torch.cat([mesh.faces, torch.tensor([[3, 3, 8], [5, 9, 5]])]))
    for damaged in (soup(mesh), flipped, doubled, both_sides, collapsed):
        found, measured = sparse_sdf(damaged, 40)
        assert torch.equal(found, coords)
        torch.testing.assert_close(measured, sdf, atol=2e-6, rtol=0)


def test_slivers_and_flat_faces_change_distances_by_rounding_only() -> None:
    mesh = torus()
    a, b, c = mesh.faces[7].tolist()
    num = len(mesh.vertices)
    reference = sparse_sdf(mesh, 40)
    for lift in (0.0, 1e-7, 1e-5):  # of a vertex in the middle of a side, which all three new faces share
        middle = mesh.vertices[[a, b]].mean(dim=0) + lift * (mesh.vertices[c] - mesh.vertices[a])
        vertices = torch.cat([mesh.vertices, middle[None]])
        faces = torch.cat([mesh.faces[:7], mesh.faces[8:], torch.tensor([[a, num, c], [num, b, c], [a, b, num]])])
        coords, sdf = sparse_sdf(TriangleMesh(vertices, faces), 40, sign="parity")
        assert torch.equal(coords, reference[0])
        reach = 4 * 2 / 39
        torch.testing.assert_close(sdf, reference[1], atol=(2 * lift + 2e-6) / reach, rtol=0)


def test_an_open_mesh_is_signed_by_its_winding_number_or_not_at_all() -> None:
    mesh = sphere(0.7)
    kept = torch.rand(len(mesh.faces), generator=torch.Generator().manual_seed(0)) > 0.05
    damaged = TriangleMesh(mesh.vertices, mesh.faces[kept])
    coords, sdf = sparse_sdf(damaged, 32)
    winding = exact_winding_numbers(grid_points(coords, 32), damaged)
    sure = np.abs(winding - 0.5) > 0.03  # Warp sums far faces up
    assert sure.mean() > 0.95
    np.testing.assert_array_equal((sdf.numpy() < 0)[sure], (winding > 0.5)[sure])
    unsigned_coords, unsigned = sparse_sdf(damaged, 32, sign="unsigned")
    assert torch.equal(unsigned_coords, coords)
    assert torch.equal(unsigned, sdf.abs())
    with pytest.raises(ValueError, match="The mesh is open"):
        sparse_sdf(damaged, 32, sign="parity")


def test_overlapping_bodies_join_by_winding_number_and_cancel_by_parity() -> None:
    left, right = box(0.4, 0.3, 0.3, centre=(-0.2, 0, 0)), box(0.4, 0.2, 0.2, centre=(0.2, 0.01, 0.02))
    coords, parity = sparse_sdf(joined(left, right), 32, 6, "parity")
    _, winding = sparse_sdf(joined(left, right), 32, 6, "winding")
    turns = exact_winding_numbers(grid_points(coords, 32), joined(left, right)).round()
    np.testing.assert_array_equal(parity.numpy() < 0, turns == 1)
    np.testing.assert_array_equal(winding.numpy() < 0, turns >= 1)
    assert (turns == 2).any()
    inner = box(0.2, 0.2, 0.2)
    hollow = joined(box(0.5, 0.5, 0.5), TriangleMesh(inner.vertices, inner.faces.flip(1)))
    for sign in ("auto", "winding"):
        assert float(marching_volume(*sparse_sdf(hollow, 40, sign=sign))) == pytest.approx(1 - 0.064, rel=0.02)


def marching_volume(coords: torch.Tensor, sdf: torch.Tensor) -> torch.Tensor:
    mesh = marching_cubes(coords, sdf, 40)
    a, b, c = mesh.vertices.double()[mesh.faces].unbind(1)
    return (torch.linalg.cross(a, b) * c).sum() / 6


@pytest.mark.parametrize("sign", ["parity", "winding", "unsigned"])
def test_results_depend_neither_on_threads_nor_on_the_size_of_chunks(
    monkeypatch: pytest.MonkeyPatch, sign: str
) -> None:
    mesh = torus()
    expected = sparse_sdf(mesh, 64, sign=sign)
    monkeypatch.setattr(mesh_distance, "_CHUNK", 500)
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if threads > 1 else 2)
    try:
        coords, sdf = sparse_sdf(mesh, 64, sign=sign)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(coords, expected[0])
    assert torch.equal(sdf, expected[1])


def test_a_mirrored_mesh_has_mirrored_distances() -> None:
    mesh = torus()
    mirror = torch.tensor([1.0, -1, -1])
    coords, sdf = sparse_sdf(mesh, 32)
    turned, of_turned = sparse_sdf(TriangleMesh(mesh.vertices * mirror, mesh.faces), 32)
    back = torch.where(mirror < 0, 31 - turned, turned).long()
    order = ((back[:, 0] * 32 + back[:, 1]) * 32 + back[:, 2]).argsort()
    assert torch.equal(back[order].int(), coords)
    torch.testing.assert_close(of_turned[order], sdf, atol=1e-5, rtol=0)


def test_a_surface_between_grid_points_farther_than_the_band_gives_none() -> None:
    coords, sdf = sparse_sdf(box(0.01, 0.01, 0.01), 4, 0.1)
    assert coords.shape == (0, 3)
    assert sdf.shape == (0,)


def test_impossible_meshes_and_settings_are_refused() -> None:
    mesh = sphere(0.7, 1)
    with pytest.raises(ValueError, match=r"reaches to 1\.05, out of the cube"):
        sparse_sdf(TriangleMesh(mesh.vertices * 1.5, mesh.faces), 32)
    with pytest.raises(ValueError, match="empty"):
        sparse_sdf(TriangleMesh(mesh.vertices, mesh.faces[:0]), 32)
    with pytest.raises(ValueError, match="1 of 42 vertices are NaN"):
        sparse_sdf(TriangleMesh(mesh.vertices.index_fill(0, torch.tensor(4), torch.nan), mesh.faces), 32)
    with pytest.raises(ValueError, match="vertex 999"):
        sparse_sdf(TriangleMesh(mesh.vertices, mesh.faces.index_fill(0, torch.tensor(4), 999)), 32)
    with pytest.raises(ValueError, match="All 2 faces are segments or points"):
        sparse_sdf(TriangleMesh(mesh.vertices, torch.tensor([[1, 1, 2], [3, 3, 3]])), 32)
    in_line = torch.tensor([[-0.5, 0, 0.1], [0.2, 0, 0.1], [0.5, 0, 0.1]])
    with pytest.raises(ValueError, match="All 1 faces are segments or points"):
        sparse_sdf(TriangleMesh(in_line, torch.tensor([[0, 1, 2]])), 32)
    with pytest.raises(ValueError, match="resolution must be 2 or more, got 1"):
        sparse_sdf(mesh, 1)
    with pytest.raises(ValueError, match="band must be above 0"):
        sparse_sdf(mesh, 32, 0.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("sign", ["auto", "winding", "unsigned"])
def test_cuda_gives_what_the_cpu_gives(sign: str) -> None:
    mesh = torus()
    if sign == "winding":  # by Warp's winding numbers, not by lines
        mesh = TriangleMesh(mesh.vertices, mesh.faces[3:])
    coords, sdf = sparse_sdf(mesh, 64, sign=sign)
    on_device = sparse_sdf(mesh.to("cuda"), 64, sign=sign)
    assert torch.equal(on_device[0].cpu(), coords)
    torch.testing.assert_close(on_device[1].cpu(), sdf, atol=1e-5, rtol=0)
    back = marching_cubes(*on_device, 64)
    assert back.vertices.device.type == "cuda"
    torch.testing.assert_close(back.vertices.cpu(), marching_cubes(coords, sdf, 64).vertices, atol=1e-5, rtol=0)
