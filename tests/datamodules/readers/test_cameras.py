import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from datamodules.readers.colmap import read_colmap_cameras, read_colmap_points, write_colmap_model
from datamodules.readers.nerfstudio import read_transforms
from lightning_modules.functional.cameras import Camera, project_points
from tests.datamodules.tiny_scene import HEIGHT, WIDTH, random_camera

NAMES = ("b.2.png", "a.png", "rig/c.jpg")


@pytest.fixture
def model(tmp_path: Path) -> tuple[Path, dict[str, Camera]]:
    cameras = {name: random_camera(seed) for seed, name in enumerate(NAMES)}
    points = np.arange(12.0).reshape(4, 3)
    write_colmap_model(tmp_path / "sparse", cameras, points, np.arange(12, dtype=np.uint8).reshape(4, 3))
    return tmp_path / "sparse", cameras


def write_text_model(folder: Path, camera_line: str, image_lines: str = "1 1 0 0 0 0 0 0 1 a.png\n\n") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cameras.txt").write_text(camera_line + "\n")
    (folder / "images.txt").write_text(image_lines)
    (folder / "points3D.txt").write_text("1 0 0 0 1 2 3 0.5\n")
    return folder


@pytest.mark.parametrize("as_text", [False, True])
def test_colmap_round_trip_keeps_poses_and_principal_points(model, as_text: bool) -> None:
    folder, cameras = model
    if as_text:
        import pycolmap

        pycolmap.Reconstruction(str(folder)).write_text(str(folder))
        for file in folder.glob("*.bin"):
            file.unlink()
    read = read_colmap_cameras(folder)
    assert list(read) == ["a", "b.2", "c"]  # sorted stems; a dot inside a name stays
    for image in read.values():
        written = cameras[image.name]
        torch.testing.assert_close(image.camera.camera_from_world, written.camera_from_world, rtol=0, atol=2e-6)
        torch.testing.assert_close(image.camera.intrinsics, written.intrinsics, rtol=0, atol=0)
        assert (image.camera.width, image.camera.height) == (WIDTH, HEIGHT)
    positions, colors = read_colmap_points(folder)
    np.testing.assert_array_equal(np.sort(positions, axis=0), np.arange(12.0).reshape(4, 3))
    np.testing.assert_array_equal(np.sort(colors, axis=0), np.arange(12).reshape(4, 3))


def test_colmap_projection_of_a_known_point(tmp_path: Path) -> None:
    folder = write_text_model(tmp_path, "1 SIMPLE_PINHOLE 40 30 20 18 14", "1 1 0 0 0 0.5 0 2 1 a.png\n\n")
    camera = read_colmap_cameras(folder)["a"].camera
    pixel, depth = project_points(torch.tensor([[0.0, 1.0, 0.0]]), camera)
    torch.testing.assert_close(pixel, torch.tensor([[18 + 20 * 0.25, 14 + 20 * 0.5]]))
    assert depth.item() == 2


@pytest.mark.parametrize("line", ["1 SIMPLE_RADIAL 40 30 20 20 15 0", "1 OPENCV 40 30 20 21 20 15 0 0 0 0"])
def test_models_with_zero_distortion_are_pinholes(tmp_path: Path, line: str) -> None:
    assert read_colmap_cameras(write_text_model(tmp_path, line))["a"].camera.intrinsics[0, 0] == 20


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("1 SIMPLE_RADIAL 40 30 20 20 15 0.01", "SIMPLE_RADIAL"),
        ("1 OPENCV 40 30 20 20 20 15 0 0 0 1e-4", "OPENCV"),
        ("1 OPENCV_FISHEYE 40 30 20 20 20 15 0 0 0 0", "OPENCV_FISHEYE"),
    ],
)
def test_distorted_models_are_refused_by_name_with_the_remedy(tmp_path: Path, line: str, name: str) -> None:
    with pytest.raises(ValueError, match=rf"distorted model {name} .*colmap image_undistorter"):
        read_colmap_cameras(write_text_model(tmp_path, line))


def test_two_images_of_one_stem_are_refused(tmp_path: Path) -> None:
    lines = "1 1 0 0 0 0 0 0 1 left/a.png\n\n2 1 0 0 0 1 0 0 1 right/a.png\n\n"
    with pytest.raises(ValueError, match=r"'left/a.png' and 'right/a.png' share the stem 'a'.*names that differ"):
        read_colmap_cameras(write_text_model(tmp_path, "1 SIMPLE_PINHOLE 40 30 20 20 15", lines))


def test_a_folder_without_a_model_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"the folder does not exist\. Give the folder"):
        read_colmap_cameras(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"it holds nothing\. Give the folder"):
        read_colmap_cameras(tmp_path)
    write_text_model(tmp_path, "1 SIMPLE_PINHOLE 40 30 20 20 15", "")
    with pytest.raises(ValueError, match="holds no posed images"):
        read_colmap_cameras(tmp_path)


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.97])
@pytest.mark.parametrize("name", ["cameras.bin", "images.bin", "points3D.bin", "rigs.bin", "frames.bin"])
def test_truncated_binary_models_are_named_instead_of_hanging(model, name: str, kept: float) -> None:
    folder, _ = model
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ValueError, match=rf"{name} is truncated.*Copy it again"):
        read_colmap_cameras(folder)


def test_damaged_text_models_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot be read as a COLMAP model .*run the reconstruction again"):
        read_colmap_cameras(write_text_model(tmp_path, "1 PINHOLE 40 30", "1 1 0 0\n"))


def test_saving_a_png_after_reading_a_model_does_not_abort(model) -> None:
    # pycolmap loaded before zlib breaks Pillow; only a fresh process shows it.
    folder, _ = model
    code = (
        f"from datamodules.readers.colmap import read_colmap_cameras; read_colmap_cameras({str(folder)!r});"
        f"from PIL import Image; Image.new('RGB', (64, 64)).save({str(folder / 'x.png')!r})"
    )
    root = Path(__file__).parents[3]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, timeout=60, check=False).returncode == 0


def transforms(path: Path, **changes: object) -> Path:
    pose = torch.eye(4).tolist()
    content = {
        "w": 40, "h": 30, "fl_x": 20.0, "fl_y": 21.0, "cx": 18.0, "cy": 14.0, "camera_model": "OPENCV", "k1": 0.0,
        "frames": [{"file_path": "images/frame.01.png", "transform_matrix": pose}],
    }  # fmt: skip
    path.write_text(json.dumps(content | changes))
    return path


def test_nerfstudio_poses_turn_from_opengl_to_opencv(tmp_path: Path) -> None:
    # A camera at (1, 2, 3) without rotation looks along -z in OpenGL; y is up in the world and in the camera.
    pose = torch.eye(4)
    pose[:3, 3] = torch.tensor([1.0, 2.0, 3.0])
    frame = {"file_path": "images/frame.01.png", "transform_matrix": pose.tolist()}
    camera = read_transforms(transforms(tmp_path / "transforms.json", frames=[frame]))["frame.01"].camera
    torch.testing.assert_close(camera.position, torch.tensor([1.0, 2.0, 3.0]))
    pixel, depth = project_points(torch.tensor([[1.0, 2.0, 1.0], [1.2, 2.4, 1.0]]), camera)
    torch.testing.assert_close(depth, torch.tensor([2.0, 2.0]))
    torch.testing.assert_close(pixel, torch.tensor([[18.0, 14.0], [18 + 2.0, 14 - 4.2]]))  # up is a smaller row


def test_nerfstudio_frames_may_bring_their_own_intrinsics(tmp_path: Path) -> None:
    poses = {"transform_matrix": torch.eye(4).tolist()}
    frames = [{"file_path": "a.png", "fl_x": 33.0, "w": 50, **poses}, {"file_path": "./train/r_0", **poses}]
    read = read_transforms(transforms(tmp_path / "transforms.json", frames=frames))
    assert (read["a"].camera.intrinsics[0, 0], read["a"].camera.width) == (33.0, 50)
    assert (read["r_0"].camera.intrinsics[0, 0], read["r_0"].camera.width) == (20.0, 40)


def test_blender_field_of_view_gives_the_focal_length(tmp_path: Path) -> None:
    content = {"w": 40, "h": 30, "camera_angle_x": math.pi / 2, "frames": [
        {"file_path": "./train/r_0", "transform_matrix": torch.eye(4).tolist()}
    ]}  # fmt: skip
    (tmp_path / "transforms.json").write_text(json.dumps(content))
    intrinsics = read_transforms(tmp_path / "transforms.json")["r_0"].camera.intrinsics
    torch.testing.assert_close(intrinsics, torch.tensor([[20.0, 0, 20], [0, 20, 15], [0, 0, 1]]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k1": 0.1}, r"distortion \{'k1': 0.1\}.*image_undistorter"),
        ({"camera_model": "OPENCV_FISHEYE"}, "camera model OPENCV_FISHEYE.*image_undistorter"),
        ({"frames": None}, "no list 'frames'"),
        ({"frames": []}, "no posed images"),
        ({"frames": [{"file_path": "a.png", "transform_matrix": [[1.0]]}]}, "'a.png': transform_matrix must be 4 x 4"),
        ({"frames": [{"file_path": "a.png", "transform_matrix": (2 * torch.eye(4)).tolist()}]}, "not orthonormal"),
        ({"frames": [{"transform_matrix": torch.eye(4).tolist()}]}, "a frame has no 'file_path'"),
    ],
)  # fmt: skip
def test_transforms_that_cannot_be_used_are_refused_by_name(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=rf"transforms\.json.*{message}"):
        read_transforms(transforms(tmp_path / "transforms.json", **changes))


def test_missing_or_truncated_transforms_are_named(tmp_path: Path) -> None:
    path = tmp_path / "transforms.json"
    with pytest.raises(FileNotFoundError, match=r"transforms\.json is not a file"):
        read_transforms(path)
    transforms(path)
    path.write_text(path.read_text()[:-40])
    with pytest.raises(ValueError, match=r"transforms\.json is not valid JSON.*write it again"):
        read_transforms(path)
    path.write_text(json.dumps({"frames": [{"file_path": "a.png", "transform_matrix": torch.eye(4).tolist()}]}))
    with pytest.raises(ValueError, match=r"frame 'a.png' lacks 'w'; needed"):
        read_transforms(path)
