import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules.readers.rgbd import read_depth, read_rgbd_frames
from datamodules.rgbd import RgbdDataModule, gaussians_of_points
from lightning_modules.functional.cameras import back_project, project_points
from lightning_modules.functional.splatting.rasterization import prepare_view, render


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Three frames of a flat wall 2 m ahead, each 5 cm further to the right; red on the left, blue on the right."""
    folder = tmp_path / "frames"
    for name in ("color", "depth"):
        (folder / name).mkdir(parents=True)
    photo = np.zeros((30, 40, 3), np.uint8)
    photo[:, :20, 0] = photo[:, 20:, 2] = 200
    depth = np.full((30, 40), 2000, np.uint16)
    depth[:5] = 0
    lines = []
    for index in range(3):
        Image.fromarray(photo).save(folder / "color" / f"{index:05d}.png")
        Image.fromarray(depth).save(folder / "depth" / f"{index:05d}.png")
        lines += [f"{index} {index} {index + 1}", f"1 0 0 {0.05 * index}", "0 1 0 0", "0 0 1 0", "0 0 0 1"]
    (folder / "trajectory.log").write_text("\n".join(lines))
    camera = {"width": 40, "height": 30, "intrinsic_matrix": [40.0, 0, 0, 0, 40.0, 0, 19.5, 14.5, 1]}
    (folder / "camera_primesense.json").write_text(json.dumps(camera))
    return folder


def prepared(source: Path, root: Path, **settings) -> RgbdDataModule:
    data = RgbdDataModule(source, root, **({"image_size": (40, 30)} | settings))
    data.prepare_data()
    data.setup("fit")
    return data


def test_matrices_by_columns_and_pixel_centres_are_converted(source: Path) -> None:
    frames = read_rgbd_frames(source)
    assert [frame.stem for frame in frames] == ["00000", "00001", "00002"]
    camera = frames[2].camera
    torch.testing.assert_close(camera.intrinsics, torch.tensor([[40.0, 0, 20], [0, 40, 15], [0, 0, 1]]))
    torch.testing.assert_close(camera.position, torch.tensor([0.1, 0, 0]))
    assert read_depth(frames[0].depth)[5, 0] == 2.0


def test_real_poses_bring_depths_of_different_frames_together(shared_data: Path) -> None:
    frames = read_rgbd_frames(shared_data / "rgbd")
    depths = [read_depth(frame.depth) for frame in frames]
    for depth, frame in zip(depths, frames, strict=True):
        points, valid = back_project(depth, frame.camera)
        for other_depth, other in zip(depths, frames, strict=True):
            pixels, z = project_points(points[valid], other.camera)
            column, row = pixels.floor().long().unbind(1)
            inside = (z > 0) & (column >= 0) & (column < 640) & (row >= 0) & (row < 480)
            seen, z = other_depth[row[inside], column[inside]], z[inside]
            agrees = (seen - z).abs() < (0.02 * z).clamp(min=0.05)
            assert agrees[seen > 0].float().mean() > 0.95


def test_points_of_a_voxel_become_one_gaussian_of_their_mean() -> None:
    points = torch.tensor([[0.01, 0.01, 1.0], [0.03, 0.03, 1.0], [0.51, 0.01, 1.0]])
    colors = torch.tensor([[255, 0, 0], [0, 0, 255], [0, 255, 0]], dtype=torch.uint8)
    scene = gaussians_of_points(points, colors, torch.full((3,), 0.1))
    torch.testing.assert_close(scene.means, torch.tensor([[0.02, 0.02, 1.0], [0.51, 0.01, 1.0]]))
    torch.testing.assert_close(scene.scales, torch.full((2, 3), 0.05))
    rgb = 0.5 + 0.28209479 * scene.spherical_harmonics[:, 0]
    torch.testing.assert_close(rgb, torch.tensor([[0.5, 0, 0.5], [0, 1, 0]]), rtol=0, atol=1e-6)
    torch.testing.assert_close(scene.opacities, torch.full((2,), 0.95))


def test_the_held_out_photo_is_in_neither_gaussians_nor_training(source: Path, tmp_path: Path) -> None:
    green = np.zeros((30, 40, 3), np.uint8)
    green[:, :, 1] = 200
    Image.fromarray(green).save(source / "color" / "00001.png")
    data = prepared(source, tmp_path / "scene", held_out="00001")
    assert [view.name for view in data.lifting_dataloader()] == ["00000", "00002"]
    assert [view.name for view in data.test_dataloader()] == ["00001"]
    rgb = 0.5 + 0.28209479 * data.gaussians.spherical_harmonics[:, 0]
    assert rgb[:, 1].max() < 0.01


def test_the_held_out_view_brings_its_own_photo_masks_and_features(source: Path, tmp_path: Path) -> None:
    data = prepared(source, tmp_path / "scene")
    (view,) = data.test_dataloader()
    assert view.name == "00002"  # the last by default
    assert view.image.shape == (30, 40, 3)
    assert view.labels is None
    assert view.mask_ids.shape == (3, 30, 40)
    assert view.mask_ids.min() == 0  # graph-based segmentation leaves nothing out
    assert view.mask_ids[0, 15, 5] != view.mask_ids[0, 15, 35]
    assert view.mask_features.shape[1] == data.feature_dim == 512
    torch.testing.assert_close(view.mask_features.norm(dim=1), torch.ones(len(view.mask_features)))


def test_the_scene_is_written_once_and_never_over_something_else(source: Path, tmp_path: Path) -> None:
    root = tmp_path / "data" / "scene"
    prepared(source, root)
    written = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    prepared(source, root)
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == written
    assert [path.name for path in root.parent.iterdir()] == ["scene"]
    with pytest.raises(ValueError, match=r"scene holds a scene with .*the settings ask for .*Give another root"):
        prepared(source, root, seed=1)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "precious.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"photos holds something else.*Give another root"):
        prepared(source, tmp_path / "photos")


def test_a_failed_preparation_leaves_nothing_behind(source: Path, tmp_path: Path) -> None:
    (source / "depth" / "00001.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"00001\.png cannot be read as a depth image"):
        prepared(source, tmp_path / "data" / "scene")
    assert list((tmp_path / "data").iterdir()) == []


def cut(name: str, size: int):
    return lambda source: (source / name).write_text((source / name).read_text()[:size])


def wrong_depth_size(source: Path) -> None:
    Image.fromarray(np.full((15, 20), 2000, np.uint16)).save(source / "depth" / "00000.png")


def colored_depth(source: Path) -> None:
    shutil.copy(source / "color" / "00000.png", source / "depth" / "00000.png")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            lambda source: shutil.rmtree(source),
            FileNotFoundError,
            "frames is no folder. Give a folder with color, depth",
        ),
        (lambda source: (source / "depth" / "00001.png").unlink(), ValueError, "do not pair by name .single: 00001"),
        (lambda source: (source / "trajectory.log").unlink(), FileNotFoundError, r"trajectory\.log does not exist"),
        (cut("trajectory.log", 60), ValueError, r"trajectory\.log cannot be read.*copy it again"),
        (cut("trajectory.log", 39), ValueError, r"trajectory\.log has no pose for 00001\.png"),
        (cut("camera_primesense.json", 30), ValueError, r"camera_primesense\.json cannot be read"),
        (wrong_depth_size, ValueError, r"00000\.png is 20 x 15, but its camera is 40 x 30.*Register"),
        (colored_depth, ValueError, r"00000\.png is uint8 \[30, 40, 3\]; allowed: one channel of 16 bits"),
    ],
)
def test_bad_frames_are_refused_by_name(source: Path, tmp_path: Path, change, error, message: str) -> None:
    change(source)
    with pytest.raises(error, match=message):
        prepared(source, tmp_path / "scene")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"held_out": "7"}, "held_out is '7'; allowed: one of 00000, 00001, 00002"),
        ({"image_size": (30, 30)}, "image_size is 30 x 30, but .* is 40 x 30; allowed: the same aspect"),
        ({"levels": (0, 1)}, r"levels is \[0, 1\]; allowed: some of 1"),
    ],
)
def test_bad_settings_are_refused_by_name(source: Path, tmp_path: Path, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepared(source, tmp_path / "scene", **settings)


def test_back_projected_gaussians_show_the_held_out_photograph(shared_data: Path, tmp_path: Path) -> None:
    data = prepared(shared_data / "rgbd", tmp_path / "scene", image_size=(320, 240))
    (view,) = data.test_dataloader()
    pixels = render(data.gaussians, prepare_view(data.gaussians, view.camera))
    covered = pixels.alpha > 0.5
    assert covered.float().mean() > 0.9  # the depth camera saw neither the sky nor the rim
    error = pixels.rgb[covered].clamp(0, 1) - view.image.flatten(0, 1)[covered] / 255
    assert -10 * error.square().mean().log10() > 26  # dB; measured 28.1
