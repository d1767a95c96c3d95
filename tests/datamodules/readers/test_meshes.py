import numpy as np
import pytest
import torch
import trimesh

from datamodules.readers.meshes import SUFFIXES, read_mesh
from lightning_modules.functional.sdf_vqvae.meshes import (
    euler_number,
    face_normals,
    is_watertight,
    merge_vertices,
    normalised,
)

SQUARE_OBJ = "v 0 0 0\nv 1 0 0\nv 1 1 0\nv 0 1 0\nf 1 2 3 4\n"


def solid_of(mesh) -> float:
    """The enclosed volume, negative where faces are wound inwards."""
    a, b, c = mesh.vertices.double()[mesh.faces].unbind(1)
    return float((a * torch.linalg.cross(b, c)).sum() / 6)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_box_is_read_from_every_format(tmp_path, suffix):
    path = tmp_path / f"box{suffix}"
    trimesh.creation.box((1.0, 2.0, 3.0)).export(path)
    mesh = merge_vertices(read_mesh(path))
    assert mesh.vertices.dtype == torch.float64
    assert len(mesh.vertices) == 8
    assert len(mesh.faces) == 12
    assert is_watertight(mesh)
    assert solid_of(mesh) == pytest.approx(6.0)


def test_suffixes_are_read_in_capitals_too(tmp_path):
    trimesh.creation.box().export(tmp_path / "box.stl")
    (tmp_path / "box.stl").rename(tmp_path / "BOX.STL")
    assert len(read_mesh(tmp_path / "BOX.STL").faces) == 12


def test_a_scene_graph_is_flattened_with_its_transforms(tmp_path):
    scene = trimesh.Scene()
    box = trimesh.creation.box()
    mirrored = np.diag([-2.0, 1, 1, 1])
    mirrored[:3, 3] = (5, 0, 0)
    scene.add_geometry(
        box, node_name="parent", geom_name="box", transform=trimesh.transformations.translation_matrix((0, 0, 9))
    )
    scene.graph.update("child", "parent", matrix=mirrored, geometry="box")
    scene.export(tmp_path / "scene.glb")
    mesh = merge_vertices(read_mesh(tmp_path / "scene.glb"))
    assert len(mesh.faces) == 24
    torch.testing.assert_close(mesh.vertices.amin(0), torch.tensor([-0.5, -0.5, 8.5]).double())
    torch.testing.assert_close(mesh.vertices.amax(0), torch.tensor([6.0, 0.5, 9.5]).double())
    assert solid_of(mesh) == pytest.approx(3.0, rel=1e-5)  # the mirrored one is wound outwards, too


def test_polygons_become_triangles(tmp_path):
    (tmp_path / "a.obj").write_text(SQUARE_OBJ)
    mesh = read_mesh(tmp_path / "a.obj")
    assert len(mesh.faces) == 2
    torch.testing.assert_close(face_normals(mesh), torch.tensor([[0.0, 0, 1], [0, 0, 1]]).double())


def test_a_mesh_in_map_coordinates_keeps_its_shape(tmp_path):
    ball = trimesh.creation.icosphere(3)
    ball.vertices += (500_000.0, 4_000_000.0, 100.0)  # float32 would move vertices by a quarter of the radius
    ball.export(tmp_path / "ball.obj", digits=8)
    mesh, _ = normalised(merge_vertices(read_mesh(tmp_path / "ball.obj")))
    assert len(mesh.vertices) == 642
    torch.testing.assert_close(mesh.vertices.norm(dim=1), torch.full((642,), 0.95), rtol=0, atol=1e-6)


def test_what_a_file_refers_to_is_not_opened(tmp_path):
    (tmp_path / "a.mtl").write_text("newmtl m\nmap_Kd a.png\n")
    (tmp_path / "a.png").write_bytes(b"no picture")
    (tmp_path / "a.obj").write_text("mtllib a.mtl\nusemtl m\n" + SQUARE_OBJ)
    assert len(read_mesh(tmp_path / "a.obj").faces) == 2


@pytest.mark.parametrize(("name", "euler"), [("spot", 2), ("torus", 0), ("wingnut", 2)])
def test_real_meshes_are_watertight_once_merged(shared_data, name, euler):
    mesh = merge_vertices(read_mesh(shared_data / "meshes" / f"{name}.obj"))
    assert is_watertight(mesh)
    assert euler_number(mesh) == euler


def test_a_real_stl_is_watertight_once_merged(shared_data):
    mesh = read_mesh(shared_data / "meshes" / "featuretype.stl")
    assert not is_watertight(mesh)
    assert is_watertight(merge_vertices(mesh))


@pytest.mark.parametrize(
    ("suffix", "settings"),
    [
        (".ply", {}),
        (".ply", {"encoding": "ascii"}),
        (".stl", {}),
        (".stl", {"file_type": "stl_ascii"}),
        (".off", {}),
        (".glb", {}),
    ],
)
def test_a_file_that_ends_early_is_refused(tmp_path, suffix, settings):
    path = tmp_path / f"ball{suffix}"
    trimesh.creation.icosphere(2).export(path, **settings)
    whole = path.read_bytes()
    assert len(read_mesh(path).faces) == 320
    for length in (0, 20, len(whole) // 2, len(whole) - 300, len(whole) - 30):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=f"ball{suffix}"):
            read_mesh(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no triangles"),
        ("v 0 0 0\nv 1 0 0\nv 0 1 0\n", "no triangles"),
        ("v 0 0 0\nv nan 0 0\nv 0 1 0\nf 1 2 3\n", "1 of 3 vertices are NaN"),
        ("v 0 0 0\nv inf 0 0\nv 0 1 0\nf 1 2 3\n", "1 of 3 vertices are NaN or infinite"),
        ("v 0 0 0\nv 1 0 0\nv 2 0 0\nf 1 2 3\n", "all 1 faces have zero area"),
        ("v 0 0 0\nv 1 0 0\nf 1 2 3\n", "bad.obj"),
    ],
)
def test_a_mesh_that_nothing_can_be_made_of_is_refused(tmp_path, content, message):
    (tmp_path / "bad.obj").write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        read_mesh(tmp_path / "bad.obj")
    assert "bad.obj" in str(error.value)


def test_zero_area_faces_beside_others_stay(tmp_path):
    (tmp_path / "a.obj").write_text(SQUARE_OBJ + "v 2 0 0\nf 1 2 5\n")
    assert len(read_mesh(tmp_path / "a.obj").faces) == 3


def test_another_format_and_an_absent_file_are_refused(tmp_path):
    (tmp_path / "a.fbx").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"a\.fbx.*\.obj, \.ply"):
        read_mesh(tmp_path / "a.fbx")
    with pytest.raises(FileNotFoundError, match=r"none\.obj"):
        read_mesh(tmp_path / "none.obj")
