import pickle

import numpy as np
import pytest
import torch

from datamodules.readers.scannet.frame_source import registered_depth
from datamodules.readers.scannet.layouts import open_scannet
from lightning_modules.functional.cameras import back_project
from tests.datamodules.readers.scannet import tiny_scans

SCENE = "scene0000_00"
WRITERS = {
    "raw": tiny_scans.write_raw,
    "sens": tiny_scans.write_sens_scan,
    "esam_mv": tiny_scans.write_esam,
    "esam_mv, poses in the list": lambda root: tiny_scans.write_esam(root, poses_in_list=True),
    "esam_sv": lambda root: tiny_scans.write_esam(root, single_view=True),
    "openscene": tiny_scans.write_openscene,
    "pointcept": tiny_scans.write_pointcept,
}


@pytest.fixture(params=WRITERS)
def source(request, tmp_path):
    return open_scannet(WRITERS[request.param](tmp_path))


def test_every_layout_gives_the_same_frames_and_poses(source):
    assert source.scenes() == (SCENE,)
    assert source.frames(SCENE) == (0, 20, 60)  # tracking was lost at 40
    for frame_id in source.frames(SCENE):
        frame = source.load(SCENE, frame_id)
        np.testing.assert_allclose(frame.camera.world_from_camera, tiny_scans.pose(frame_id), atol=2e-6)
        np.testing.assert_allclose(frame.depth, tiny_scans.millimetres(frame_id) / 1000, atol=1e-6)


def test_every_layout_lifts_depth_to_the_same_points(source):
    for frame_id in source.frames(SCENE):
        frame = source.load(SCENE, frame_id, with_image=False)
        assert frame.image is None
        points, valid = back_project(frame.depth, frame.depth_camera)
        truth, _ = tiny_scans.lifted(frame_id)
        np.testing.assert_allclose(points[valid], truth[:, :3], atol=2e-3)  # depth is in whole millimetres


def test_every_layout_shows_a_lifted_point_in_its_own_photo(source):
    frame = source.load(SCENE, 20)
    points, valid = back_project(frame.depth, frame.depth_camera)
    in_camera = points[valid] @ frame.camera.camera_from_world[:3, :3].T + frame.camera.camera_from_world[:3, 3]
    pixels = in_camera @ frame.camera.intrinsics.T
    columns, rows = (pixels[:, :2] / pixels[:, 2:]).floor().long().unbind(1)
    inside = (columns >= 0) & (rows >= 0) & (columns < frame.camera.width) & (rows < frame.camera.height)
    colours = frame.image[rows[inside], columns[inside]]
    truth = tiny_scans.lifted(20)[0][inside.numpy(), 3:]
    assert (colours.numpy() == truth).all(axis=1).mean() > 0.97  # the pixels at the edges of faces may go either way


def test_every_layout_gives_the_same_labels(source):
    if source.layout.startswith("esam"):
        stored = [source.stored_points(SCENE, frame_id) for frame_id in source.frames(SCENE)]
        for frame_id, known in zip(source.frames(SCENE), stored, strict=True):
            truth, faces = tiny_scans.lifted(frame_id)
            np.testing.assert_allclose(known.points[:, :3], truth[:, :3], atol=1e-5)
            np.testing.assert_allclose(known.points[:, 3:] * 255, truth[:, 3:], atol=1e-4)
            assert (known.labels["scannet200"].numpy() == tiny_scans.CLASSES_200[faces]).all()
            assert (known.labels["scannet20"].numpy() == tiny_scans.CLASSES_20[faces]).all()
            assert (known.instances.numpy() == faces).all()
            assert (known.superpoints.numpy() == 2 * faces).all()
    assert source.has_mesh(SCENE)
    mesh = source.mesh(SCENE)
    points, faces = tiny_scans.mesh_vertices()
    np.testing.assert_allclose(mesh.points[:, :3], points, atol=1e-6)
    np.testing.assert_allclose(mesh.points[:, 3:] * 255, tiny_scans.FACE_COLOURS[faces], atol=1e-4)
    assert (mesh.labels["scannet20"].numpy() == tiny_scans.CLASSES_20[faces]).all()
    if source.layout == "openscene":
        assert set(mesh.labels) == {"scannet20"}
    else:
        assert (mesh.labels["scannet200"].numpy() == tiny_scans.CLASSES_200[faces]).all()
        assert (mesh.instances.numpy() == faces).all()
    assert (mesh.vertex_ids == torch.arange(len(points))).all()


def test_every_layout_reports_the_lost_frame(source):
    report = source.report(SCENE)
    assert (report.num_frames, report.kept, report.problem) == (4, (0, 20, 60), None)
    lost = report.without_pose if source.layout == "esam_mv" and not report.bad_poses else report.bad_poses
    assert lost == (40,)
    assert "scannet20" in report.labels


def test_every_layout_can_be_sent_to_another_process(source):
    copied = pickle.loads(pickle.dumps(source))
    assert copied.frames(SCENE) == source.frames(SCENE)
    assert torch.equal(copied.load(SCENE, 0).image, source.load(SCENE, 0).image)


def test_registered_depth_is_what_the_colour_camera_sees(tmp_path):
    frame = open_scannet(tiny_scans.write_raw(tmp_path)).load(SCENE, 20)
    truth, _, _ = tiny_scans.seen(20, tiny_scans.COLOUR_K, tiny_scans.COLOUR_SIZE)
    found = registered_depth(frame, 72, 96).numpy()
    known = found > 0
    assert known.mean() > 0.9
    assert np.median(np.abs(found - truth)[known]) < 0.01
    assert (np.abs(found - truth)[known] < 0.06).mean() > 0.99
