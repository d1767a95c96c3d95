import torch

from lightning_modules.functional.sdf_vqvae.marching_cubes import marching_cubes
from lightning_modules.functional.sdf_vqvae.mesh_pictures import GROUND, HALF_WIDTH, shaded_picture
from lightning_modules.functional.sdf_vqvae.meshes import TriangleMesh
from tests.functional.sdf_vqvae.test_shape_scores import ball


def covered(picture):
    return (picture - torch.tensor(GROUND)).abs().amax(-1) > 0.02


def test_a_ball_covers_a_disc_of_its_size_from_every_side():
    mesh = marching_cubes(*ball(32, 0.7), 32)
    for azimuth, elevation in ((0, 0), (35, 25), (120, -60)):
        disc = covered(shaded_picture(mesh, 128, azimuth, elevation))
        radius = (disc.sum() / torch.pi).sqrt() * 2 * HALF_WIDTH / 128
        assert abs(float(radius) - 0.7) < 0.03
        rows, columns = disc.nonzero().float().mean(0) + 0.5
        assert abs(float(rows) - 64) < 0.7
        assert abs(float(columns) - 64) < 0.7


def test_z_is_up_and_y_is_right_of_a_camera_on_x():
    mesh = marching_cubes(*ball(32, 0.2, centre=(0.0, 0.5, 0.6)), 32)
    rows, columns = covered(shaded_picture(mesh, 128, 0, 0)).nonzero().float().mean(0)
    assert rows < 40
    assert columns > 80


def test_faces_seen_from_behind_are_red():
    mesh = marching_cubes(*ball(32, 0.7), 32)
    for faces, reddish in ((mesh.faces, False), (mesh.faces.flip(1), True)):
        picture = shaded_picture(TriangleMesh(mesh.vertices, faces), 64)
        colour = picture[covered(picture)].mean(0)
        assert bool(colour[0] > colour[2]) == reddish


def test_a_mesh_without_faces_is_an_empty_picture():
    empty = TriangleMesh(torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.int64))
    assert not covered(shaded_picture(empty, 16)).any()
