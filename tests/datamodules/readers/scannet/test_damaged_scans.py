import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.readers.safe_pickles import load_plain_pickle
from datamodules.readers.scannet.layouts import open_scannet
from datamodules.readers.scannet.survey import lacks, survey, survey_table
from tests.datamodules.readers.scannet import tiny_scans

SCENE = "scene0000_00"


class Hostile:
    """A pickle that would make a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_hostile_openscene_file_is_refused_and_does_not_run(tmp_path):
    root = tiny_scans.write_openscene(tmp_path)
    torch.save(
        (np.zeros((2, 3)), Hostile(tmp_path / "ran"), np.zeros(2)), root / f"scannet_3d/train/{SCENE}_vh_clean_2.pth"
    )
    with pytest.raises(ValueError, match="Nothing in it was executed"):
        open_scannet(root).mesh(SCENE)
    assert not (tmp_path / "ran").exists()


def test_a_hostile_list_of_esam_is_refused_and_does_not_run(tmp_path):
    root = tiny_scans.write_esam(tmp_path, poses_in_list=True)
    (file,) = root.glob("*.pkl")
    file.write_bytes(pickle.dumps({"data_list": [Hostile(tmp_path / "ran")]}))
    with pytest.raises(ValueError, match=r"asks for .*mkdir.*Nothing in it was executed"):
        open_scannet(root).frames(SCENE)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_plain_pickles_of_arrays_are_read(tmp_path, protocol):
    content = {"poses": [np.eye(4), np.float32(3)], "names": ("a", b"b")}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content, protocol))
    read = load_plain_pickle(tmp_path / "a.pkl")
    assert (read["poses"][0] == np.eye(4)).all()
    assert read["names"] == ("a", b"b")
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content, protocol)[:-9])
    with pytest.raises(ValueError, match="refused"):
        load_plain_pickle(tmp_path / "a.pkl")


def test_poses_that_are_not_rigid_are_left_out(tmp_path):
    root = tiny_scans.write_raw(tmp_path)
    scaled = tiny_scans.pose(20)
    scaled[:3, :3] *= 1.5
    (root / SCENE / "pose" / "20.txt").write_text(tiny_scans.text(scaled))
    (root / SCENE / "pose" / "60.txt").write_text("1 0 0 0\n0 1 nan")
    source = open_scannet(root)
    assert source.frames(SCENE) == (0,)
    assert source.report(SCENE).bad_poses == (20, 40, 60)


def test_a_survey_leaves_out_damaged_frames_and_tells_them(tmp_path):
    root = tiny_scans.write_raw(tmp_path, lost=False)
    folder = root / SCENE
    depth = folder / "depth" / "20.png"
    depth.write_bytes(depth.read_bytes()[:100])
    (folder / "color" / "60.png").write_bytes(b"no photo")
    (folder / "depth" / "0.png").unlink()
    report = survey(open_scannet(root), [SCENE], tmp_path / "index", check_images=True)[SCENE]
    assert report.kept == (40,)
    assert report.damaged == (20, 60)
    assert report.without_depth == (0,)
    assert "depth/20.png cannot be read" in report.problem
    assert lacks(report).startswith("no depth: 0; damaged: 20, 60; ")
    assert survey_table({SCENE: report}).row_count == 2


def test_a_survey_goes_on_where_it_was_broken_off(tmp_path):
    root = tiny_scans.write_raw(tmp_path, ("scene0000_00", "scene0001_00"))
    source, looked_at = watched(open_scannet(root))
    first = survey(source, source.scenes()[:1], tmp_path / "index", check_images=True)
    both = survey(source, source.scenes(), tmp_path / "index", check_images=True)
    assert looked_at == ["scene0000_00", "scene0001_00"]
    assert both["scene0000_00"] == first["scene0000_00"]


def test_a_survey_looks_again_at_scenes_that_changed_or_were_damaged(tmp_path):
    scenes = ("scene0000_00", "scene0001_00", "scene0002_00")
    root = tiny_scans.write_raw(tmp_path / "root", scenes)
    depth = root / scenes[1] / "depth" / "20.png"
    whole = depth.read_bytes()
    with depth.open("r+b") as file:
        file.truncate(100)
    survey(open_scannet(root), scenes, tmp_path / "index", check_images=True)
    with depth.open("r+b") as file:  # in place: no folder changes
        file.write(whole)
    (root / scenes[2] / "pose" / "60.txt").unlink()
    source, looked_at = watched(open_scannet(root))
    repaired = survey(source, scenes, tmp_path / "index", check_images=True)
    assert looked_at == list(scenes[1:])
    assert repaired[scenes[1]].kept == (0, 20, 60)
    assert repaired[scenes[2]].kept == (0, 20)


def watched(source):
    """Returns the source, and the scenes it will have reported on."""
    looked_at = []

    class Watched(type(source)):
        def report(self, scene):
            looked_at.append(scene)
            return super().report(scene)

    source.__class__ = Watched
    return source, looked_at


def test_damaged_annotations_are_found_before_training(tmp_path):
    root = tiny_scans.write_raw(tmp_path, ("scene0000_00", "scene0001_00"))
    segments = root / SCENE / f"{SCENE}_vh_clean_2.0.010000.segs.json"
    segments.write_text(segments.read_text()[:-20])
    source = open_scannet(root)
    reports = survey(source, source.scenes(), tmp_path / "index", check_images=True)
    assert reports[SCENE].kept == ()
    assert "segs.json is not valid JSON" in reports[SCENE].problem
    assert reports["scene0001_00"].kept == (0, 20, 60)


@pytest.mark.parametrize("single_view", [False, True])
def test_frames_whose_stored_points_are_damaged_are_left_out(tmp_path, single_view):
    root = tiny_scans.write_esam(tmp_path, single_view=single_view)
    file = root / "points" / (f"{SCENE}_20.bin" if single_view else f"{SCENE}/20.bin")
    file.write_bytes(file.read_bytes()[:-4])
    report = survey(open_scannet(root), [SCENE], tmp_path / "index", check_images=True)[SCENE]
    assert (report.kept, report.damaged) == ((0, 60), (20,))
    assert f"{file.name} holds" in report.problem


@pytest.mark.parametrize("single_view", [False, True])
def test_labels_that_come_later_are_found(tmp_path, single_view):
    root = tiny_scans.write_esam(tmp_path, single_view=single_view)
    for annotated in (root / "3D" / SCENE).iterdir():
        annotated.unlink()
    (root / "semantic_mask").rename(root / "elsewhere")
    assert survey(open_scannet(root), [SCENE], tmp_path / "index", check_images=False)[SCENE].labels == ()
    (root / "elsewhere").rename(root / "semantic_mask")
    found = survey(open_scannet(root), [SCENE], tmp_path / "index", check_images=False, recheck=False)
    assert found[SCENE].labels == ("scannet20", "scannet200")


def test_a_folder_for_reports_that_cannot_be_written_is_told(tmp_path):
    source = open_scannet(tiny_scans.write_raw(tmp_path / "root"))
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(ValueError, match=r"cannot be written .* data\.init_args\.index"):
        survey(source, [SCENE], tmp_path / "file", check_images=False)


def test_a_scan_without_frames_says_what_to_get(tmp_path):
    tiny_scans.write_annotations(tmp_path / SCENE)
    report = open_scannet(tmp_path).report(SCENE)
    assert f"has no frames: neither {SCENE}.sens nor color" in report.problem


def test_frames_without_any_depth_are_left_out(tmp_path):
    root = tiny_scans.write_raw(tmp_path)
    Image.fromarray(np.zeros((48, 64), np.uint16)).save(root / SCENE / "depth" / "20.png")
    report = survey(open_scannet(root), [SCENE], tmp_path / "index", check_images=True)[SCENE]
    assert report.kept == (0, 60)
    assert "frame 20 has no pixel with depth" in lacks(report)


def test_depth_of_eight_bits_is_refused(tmp_path):
    root = tiny_scans.write_raw(tmp_path)
    Image.fromarray(np.zeros((48, 64), np.uint8)).save(root / SCENE / "depth" / "0.png")
    with pytest.raises(ValueError, match=r"0\.png .*allowed: one channel of 16 bits"):
        open_scannet(root).load(SCENE, 0)


def test_intrinsics_of_another_size_are_told(tmp_path):
    root = tiny_scans.write_raw(tmp_path)
    (root / SCENE / f"{SCENE}.txt").unlink()  # without it nobody knows that intrinsic_color is of 96 x 72
    for frame in tiny_scans.FRAMES:
        Image.fromarray(tiny_scans.photo(frame)).resize((48, 36)).save(root / SCENE / "color" / f"{frame}.png")
    assert "belong to another size" in open_scannet(root).report(SCENE).problem
    tiny_scans.write_metadata(root / SCENE)
    frame = open_scannet(root).load(SCENE, 0)
    np.testing.assert_allclose(frame.camera.intrinsics[:2, 2], [24, 18])


def test_missing_intrinsics_are_told_and_fixed_ones_do(tmp_path):
    root = tiny_scans.write_esam(tmp_path)
    (root / "2D" / SCENE / "intrinsic.txt").unlink()
    assert "intrinsics=fixed" in open_scannet(root).report(SCENE).problem
    fixed = open_scannet(root, intrinsics="fixed").load(SCENE, 0)
    np.testing.assert_allclose(fixed.camera.intrinsics[0], [57.7870605, 0, 32], rtol=1e-6)
    np.testing.assert_allclose(fixed.camera.intrinsics[1], [0, 57.7870605, 24], rtol=1e-6)


@pytest.mark.parametrize("folder", ["points", "semantic_mask", "instance_mask", "super_points"])
def test_stored_points_of_the_wrong_length_are_refused(tmp_path, folder):
    root = tiny_scans.write_esam(tmp_path)
    file = root / folder / SCENE / "20.bin"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ValueError, match=rf"{folder}/{SCENE}/20\.bin"):
        open_scannet(root).stored_points(SCENE, 20)


def test_segments_of_another_mesh_are_refused(tmp_path):
    root = tiny_scans.write_raw(tmp_path)
    (root / SCENE / f"{SCENE}_vh_clean_2.0.010000.segs.json").write_text(json.dumps({"segIndices": [1, 2, 3]}))
    with pytest.raises(ValueError, match=r"3 segments for .* of another mesh"):
        open_scannet(root).mesh(SCENE)


def test_without_objects_scannet20_comes_from_the_labelled_mesh(tmp_path):
    tiny_scans.write_frames(tmp_path / SCENE)
    tiny_scans.write_intrinsics(tmp_path / SCENE)
    tiny_scans.write_annotations(tmp_path / SCENE, nyu40_alone=True)
    mesh = open_scannet(tmp_path).mesh(SCENE)
    _, faces = tiny_scans.mesh_vertices()
    assert (mesh.labels["scannet20"].numpy() == tiny_scans.CLASSES_20[faces]).all()
    assert set(mesh.labels) == {"scannet20"}
    assert mesh.instances is None


def test_classes_beyond_the_table_are_refused(tmp_path):
    root = tiny_scans.write_pointcept(tmp_path)
    file = root / "train" / SCENE / "segment20.npy"
    np.save(file, np.load(file) + 20)
    with pytest.raises(ValueError, match=r"segment20\.npy counts classes up to 26"):
        open_scannet(root).mesh(SCENE)


def test_pointcepts_arrays_without_frames_say_where_to_give_them(tmp_path):
    root = tiny_scans.write_pointcept(tmp_path / "arrays", with_frames=False)
    assert "data.init_args.frames_root" in open_scannet(root).report(SCENE).problem
    with pytest.raises(FileNotFoundError, match=r"nowhere is no folder\. Give raw scans"):
        open_scannet(root, frames_root=tmp_path / "nowhere")


def test_an_unknown_layout_names_those_known(tmp_path):
    (tmp_path / "stuff").mkdir()
    with pytest.raises(ValueError, match="ESAM's scannet200-mv"):
        open_scannet(tmp_path)
    with pytest.raises(FileNotFoundError, match="layout esam_mv needs it"):
        open_scannet(tmp_path, "esam_mv")


def test_a_truncated_recording_makes_its_scene_unusable_and_no_other(tmp_path):
    root = tiny_scans.write_sens_scan(tmp_path)
    whole = root / "scans" / SCENE / f"{SCENE}.sens"
    (root / "scans" / "scene0001_00").mkdir()
    (root / "scans" / "scene0001_00" / "scene0001_00.sens").write_bytes(whole.read_bytes()[:-1])
    source = open_scannet(root)
    reports = survey(source, source.scenes(), tmp_path / "index", check_images=True)
    assert reports[SCENE].kept == (0, 20, 60)
    assert reports["scene0001_00"].kept == ()
    assert "within frame 60 of 61" in reports["scene0001_00"].problem
