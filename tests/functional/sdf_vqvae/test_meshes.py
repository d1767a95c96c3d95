import numpy as np
import pytest
import torch
import trimesh
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_modules.functional.sdf_vqvae.meshes import (
    TriangleMesh,
    check_mesh,
    euler_number,
    face_normals,
    is_closed,
    is_consistently_wound,
    is_watertight,
    merge_vertices,
    mesh_report,
    normalised,
    transformed,
    without_zero_area_faces,
)
from tests.functional.sdf_vqvae.solids import box, joined, real_mesh, soup, sphere, torus


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), kept=st.floats(0.3, 1.0), flipped=st.sampled_from([0.0, 0.2]))
def test_topology_is_that_of_trimesh(seed: int, kept: float, flipped: float) -> None:
    rng = np.random.default_rng(seed)
    mesh = (sphere(0.8, 1), torus(), box(0.3, 0.4, 0.5))[seed % 3]
    faces = mesh.faces[torch.from_numpy(rng.permutation(len(mesh.faces)) < max(1, kept * len(mesh.faces)))]
    turned = torch.from_numpy(rng.random(len(faces)) < flipped)
    faces = torch.where(turned[:, None], faces.flip(1), faces)
    solid = trimesh.Trimesh(mesh.vertices.numpy(), faces.numpy(), process=False)
    mesh = TriangleMesh(mesh.vertices, faces)
    assert is_watertight(mesh) == solid.is_watertight
    assert (is_watertight(mesh) and is_consistently_wound(mesh)) == solid.is_volume
    assert euler_number(mesh) == solid.euler_number
    report = mesh_report(mesh)
    assert report.num_open_edges == len(trimesh.grouping.group_rows(solid.edges_sorted, require_count=1))
    assert report.is_watertight == solid.is_watertight
    if not flipped:
        assert report.num_misaligned_edges == 0


def test_euler_numbers_count_balls_and_handles() -> None:
    assert euler_number(sphere(0.5)) == 2
    assert euler_number(torus()) == 0
    assert euler_number(joined(sphere(0.5), torus(), box(0.1, 0.1, 0.1))) == 4


def test_merging_restores_a_mesh_without_shared_vertices() -> None:
    for mesh in (sphere(0.7), torus(), box(0.2, 0.3, 0.4)):
        apart = soup(mesh)
        assert not is_watertight(apart)
        merged = merge_vertices(apart)
        assert is_watertight(merged)
        assert is_consistently_wound(merged)
        assert euler_number(merged) == euler_number(mesh)
        assert torch.equal(merged.vertices[merged.faces], mesh.vertices[mesh.faces])


def test_merging_joins_both_zeros_and_what_exporters_round_apart() -> None:
    apart = soup(box(0.5, 0.5, 0.5, centre=(0.5, 0.5, 0.5)))
    torch.manual_seed(1)
    vertices = torch.where(apart.vertices == 0, -0.0 * torch.ones(()), apart.vertices)
    vertices[::3] = vertices[::3].abs()
    assert is_watertight(merge_vertices(TriangleMesh(vertices, apart.faces), tolerance=0))
    noisy = TriangleMesh(vertices + 1e-8 * torch.randn(vertices.shape), apart.faces)
    assert not is_watertight(merge_vertices(noisy, tolerance=0))
    assert is_watertight(merge_vertices(noisy))


def test_a_stray_vertex_far_away_joins_nothing_else() -> None:
    mesh = sphere(1e-8, 5)
    far = torch.tensor([[1.0, 1, 1], [1, 1, 0.9], [1, 0.9, 1]])
    num = len(mesh.vertices)
    stray = TriangleMesh(torch.cat([mesh.vertices, far]), torch.cat([mesh.faces[5:], num + torch.arange(3)[None]]))
    assert len(merge_vertices(stray).faces) == len(mesh.faces) - 4


def test_merging_drops_repeated_and_collapsed_faces_and_unused_vertices() -> None:
    mesh = sphere(0.5, 1)
    faces = torch.cat([mesh.faces, mesh.faces[3:5].roll(1, dims=1), torch.tensor([[4, 4, 7], [9, 2, 9]])])
    vertices = torch.cat([mesh.vertices, torch.full((3, 3), 9.0)])
    merged = merge_vertices(TriangleMesh(vertices, faces))
    assert torch.equal(merged.faces, mesh.faces)
    assert torch.equal(merged.vertices, mesh.vertices)
    report = mesh_report(TriangleMesh(vertices, faces))
    assert (report.num_removed_faces, report.num_zero_area_faces, report.is_watertight) == (4, 2, True)


def test_a_surface_written_once_for_each_side_keeps_one_but_a_wall_between_two_solids_keeps_both() -> None:
    mesh = torus()
    twice = TriangleMesh(mesh.vertices, torch.cat([mesh.faces, mesh.faces.flip(1)]))
    assert torch.equal(merge_vertices(twice).faces, mesh.faces)
    left, right = box(0.2, 0.2, 0.2, centre=(-0.2, 0, 0)), box(0.2, 0.2, 0.2, centre=(0.2, 0, 0))
    mirrored = TriangleMesh(left.vertices * torch.tensor([-1.0, 1, 1]), left.faces.flip(1))
    wall = merge_vertices(joined(left, mirrored))
    assert len(wall.faces) == 24
    assert is_closed(wall)
    assert not is_watertight(wall)
    assert mesh_report(wall).num_crowded_edges == 4 + 1
    assert len(merge_vertices(joined(left, right)).vertices) == 12


def test_a_closed_mesh_may_contain_flat_faces() -> None:
    mesh = box(0.4, 0.4, 0.4)
    a, b, c = mesh.faces[0].tolist()
    middle = len(mesh.vertices)
    vertices = torch.cat([mesh.vertices, mesh.vertices[[a, b]].mean(dim=0, keepdim=True)])
    faces = torch.cat([mesh.faces[1:], torch.tensor([[a, middle, c], [middle, b, c], [a, b, middle]])])
    report = mesh_report(TriangleMesh(vertices, faces))
    assert (report.num_zero_area_faces, report.is_watertight, report.num_faces) == (1, True, 14)
    without, num_dropped = without_zero_area_faces(TriangleMesh(vertices, faces))
    assert num_dropped == 1
    assert torch.equal(without.faces, faces[:-1])


def test_real_meshes_are_closed_once_merged(shared_data) -> None:
    expected = {"featuretype.stl": -16, "spot.obj": 2, "torus.obj": 0, "wingnut.obj": 2}
    for name, euler in expected.items():
        merged = merge_vertices(real_mesh(shared_data / "meshes" / name))
        assert is_watertight(merged), name
        assert is_consistently_wound(merged), name
        assert euler_number(merged) == euler, name


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), scale=st.floats(1e-3, 1e6), shift=st.floats(-1e6, 1e6))
def test_normalised_meshes_fill_the_cube_and_the_matrix_leads_there(seed: int, scale: float, shift: float) -> None:
    mesh = torus(seed)
    far = torch.cat([mesh.vertices.double() * scale + shift, torch.full((1, 3), 1e9, dtype=torch.float64)])
    placed, cube_from_mesh = normalised(TriangleMesh(far, mesh.faces))
    used = placed.vertices[:-1].double()
    torch.testing.assert_close(used.abs().max(), torch.tensor(0.95, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(used.amax(dim=0), -used.amin(dim=0), atol=1e-6, rtol=0)
    back = transformed(TriangleMesh(used, mesh.faces), cube_from_mesh.inverse()).vertices
    torch.testing.assert_close(back, far[:-1], atol=2e-7 * scale + 1e-9 * abs(shift), rtol=0)


def test_a_reflection_keeps_the_outside_outside() -> None:
    mesh = sphere(0.5, 1)
    mirrored = transformed(mesh, torch.diag(torch.tensor([-1.0, 1, 1, 1])))
    outwards = mirrored.vertices[mirrored.faces].mean(dim=1)
    assert bool(((face_normals(mirrored) * outwards).sum(dim=1) > 0).all())


def test_impossible_meshes_are_refused() -> None:
    mesh = sphere(0.5, 1)
    with pytest.raises(ValueError, match="empty"):
        check_mesh(TriangleMesh(mesh.vertices, mesh.faces[:0]))
    with pytest.raises(ValueError, match=r"vertex 42.*0 to 41"):
        check_mesh(TriangleMesh(mesh.vertices, mesh.faces + 1))
    with pytest.raises(ValueError, match="vertex -1"):
        check_mesh(TriangleMesh(mesh.vertices, mesh.faces - 1))
    broken = mesh.vertices.clone()
    broken[3, 1], broken[5, 0] = torch.nan, torch.inf
    with pytest.raises(ValueError, match="2 of 42 vertices are NaN"):
        mesh_report(TriangleMesh(broken, mesh.faces))
    with pytest.raises(ValueError, match="All vertices are at"):
        normalised(TriangleMesh(torch.ones(3, 3), torch.tensor([[0, 1, 2]])))
