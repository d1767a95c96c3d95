"""Posed photographs: their split, their sizes, what is refused before the work, exact resumes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from plyfile import PlyData, PlyElement
from torchdata.stateful_dataloader import StatefulDataLoader

from datamodules.posed_images import PosedImagesDataModule
from datamodules.readers.colmap import read_colmap_cameras, write_colmap_model
from datamodules.readers.photos import target_size
from lightning_modules.functional.cameras import resize_camera
from tests.datamodules.tiny_scene import HEIGHT, WIDTH, random_camera

NAMES = [f"frame_{index:05d}" for index in range(1, 11)]


def write_scene(root: Path, names: list[str] = NAMES, num_points: int = 5) -> Path:
    rng = np.random.default_rng(0)
    (root / "images").mkdir(parents=True)
    for name in names:
        Image.fromarray(rng.integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)).save(root / "images" / f"{name}.png")
    cameras = {f"{name}.png": random_camera(index) for index, name in enumerate(names)}
    colors = rng.integers(0, 255, (num_points, 3), dtype=np.uint8)
    write_colmap_model(root / "sparse" / "0", cameras, rng.normal(size=(num_points, 3)), colors)
    return root


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_scene(tmp_path / "kitchen")


def ready(root: Path, stage: str = "fit", **settings) -> PosedImagesDataModule:
    data = PosedImagesDataModule(root, **settings)
    data.setup(stage)
    return data


def test_every_eighth_view_is_kept_out_of_training(root: Path) -> None:
    data = ready(root)
    assert data.views.names == NAMES
    assert data.test_views.names == [NAMES[0], NAMES[8]]
    assert sorted(view.name for view in data.train_dataloader()) == sorted(set(NAMES) - {NAMES[0], NAMES[8]})
    assert [view.name for view in data.val_dataloader()] == [NAMES[0], NAMES[8]]
    assert [view.view_id for view in data.test_dataloader()] == [0, 8]
    assert ready(root, test_every=0).train_views.names == NAMES


@pytest.mark.parametrize("image_cache_mib", [4096, 0])
def test_every_view_has_the_photo_and_camera_of_its_own_name(root: Path, image_cache_mib: int) -> None:
    data = ready(root, image_cache_mib=image_cache_mib, num_workers=0)
    cameras = read_colmap_cameras(root / "sparse" / "0")
    for view in data.views:
        assert np.array_equal(view.image, np.asarray(Image.open(root / "images" / f"{view.name}.png")))
        assert torch.equal(view.camera.camera_from_world, cameras[view.name].camera.camera_from_world)
        assert torch.equal(view.camera.intrinsics, cameras[view.name].camera.intrinsics)


def test_photographs_are_decoded_once_where_they_fit(root: Path) -> None:
    data = ready(root)
    assert data.train_dataloader().num_workers == 0
    shutil.rmtree(root / "images")
    assert len(list(data.views)) == 10
    one_fits = ready(write_scene(root.parent / "large"), image_cache_mib=0)
    assert one_fits.train_dataloader().num_workers > 0


def test_points_come_with_their_colours(root: Path) -> None:
    data = ready(root)
    assert (data.points.shape, data.points.dtype) == ((5, 3), torch.float32)
    assert (data.point_colors.shape, data.point_colors.dtype) == ((5, 3), torch.uint8)


def test_points_of_a_transforms_file_come_from_its_ply(root: Path) -> None:
    frames = [{"file_path": f"images/{name}.png", "transform_matrix": np.eye(4).tolist()} for name in NAMES]
    shared = {"w": WIDTH, "h": HEIGHT, "fl_x": 30.0, "ply_file_path": "points.ply"}
    (root / "transforms.json").write_text(json.dumps({**shared, "frames": frames}))
    columns = [(key, "f4") for key in "xyz"] + [(key, "u1") for key in ("red", "green", "blue")]
    vertices = np.array([(1, 2, 3, 10, 20, 30), (4, 5, 6, 40, 50, 60)], columns)
    PlyData([PlyElement.describe(vertices, "vertex")]).write(root / "points.ply")
    data = ready(root, cameras="transforms.json")
    assert data.points.tolist() == [[1, 2, 3], [4, 5, 6]]
    assert data.point_colors.tolist() == [[10, 20, 30], [40, 50, 60]]
    (root / "transforms.json").write_text(json.dumps({**shared, "ply_file_path": None, "frames": frames}))
    with pytest.raises(ValueError, match=r"no 3D points.*ply_file_path"):
        ready(root, cameras="transforms.json")


@pytest.mark.parametrize(
    ("size", "resolution", "expected"),
    [
        ((1440, 1080), -1, (1440, 1080)),
        ((3840, 2160), -1, (1920, 1080)),
        ((1001, 751), 2, (500, 376)),
        ((1001, 751), 320, (320, 240)),
    ],
)
def test_sizes_follow_langsplats_rule(size: tuple[int, int], resolution: int, expected: tuple[int, int]) -> None:
    assert target_size(*size, resolution) == expected


def test_photographs_and_cameras_shrink_together(root: Path) -> None:
    cameras = read_colmap_cameras(root / "sparse" / "0")
    for view in ready(root, resolution=2).views:
        assert view.image.shape == (HEIGHT // 2, WIDTH // 2, 3)
        expected = resize_camera(cameras[view.name].camera, WIDTH // 2, HEIGHT // 2)
        assert torch.equal(view.camera.intrinsics, expected.intrinsics)


def test_reduced_photographs_are_not_enlarged_to_their_cameras(root: Path) -> None:
    for name in NAMES:
        path = root / "images" / f"{name}.png"
        Image.open(path).resize((WIDTH // 2, HEIGHT // 2)).save(path)
    data = ready(root)
    assert {tuple(view.image.shape) for view in data.views} == {(HEIGHT // 2, WIDTH // 2, 3)}
    data.setup("predict")
    assert {(file.width, file.height) for file in data.photographs} == {(WIDTH // 2, HEIGHT // 2)}


def names_from(loader: StatefulDataLoader, count: int) -> list[str]:
    views = iter(loader)
    return [next(views).name for _ in range(count)]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_run_resumed_within_an_epoch_sees_the_same_views(root: Path, num_workers: int) -> None:
    loader = ready(root, num_workers=num_workers).train_dataloader()
    iterator = iter(loader)
    for _ in range(3):
        next(iterator)
    state = loader.state_dict()
    rest = [view.name for view in iterator]
    assert len(rest) == 5
    resumed = ready(root, num_workers=num_workers).train_dataloader()
    resumed.load_state_dict(state)
    assert [view.name for view in resumed] == rest


def remove_points(root: Path) -> None:
    cameras = {image.name: image.camera for image in read_colmap_cameras(root / "sparse" / "0").values()}
    write_colmap_model(root / "sparse" / "0", cameras, np.zeros((0, 3)), np.zeros((0, 3), np.uint8))


def keep_one_camera(root: Path) -> None:
    write_colmap_model(
        root / "sparse" / "0", {"frame_00001.png": random_camera()}, np.zeros((1, 3)), np.zeros((1, 3), np.uint8)
    )


def remove_photos(root: Path) -> None:
    for path in (root / "images").iterdir():
        path.unlink()


def rename_photos(root: Path) -> None:
    for path in (root / "images").iterdir():
        path.rename(path.with_name(path.name.replace("frame_", "frame-")))


def turn_two_photos(root: Path) -> None:
    for name in NAMES[2:4]:
        Image.new("RGB", (HEIGHT, WIDTH)).save(root / "images" / f"{name}.png")


def truncate_a_photo(root: Path) -> None:
    path = root / "images" / "frame_00005.png"
    path.write_bytes(path.read_bytes()[:900])


@pytest.mark.parametrize(
    ("break_scene", "error", "message"),
    [
        (remove_points, ValueError, r"no 3D points.*Run COLMAP"),
        (keep_one_camera, ValueError, r"one photo; allowed: two or more"),
        (remove_photos, FileNotFoundError, r"holds no photos; allowed: \.png"),
        (rename_photos, FileNotFoundError, r"lacks 10 of the 10 .*frame_00001\.png.* and 5 more.*such as frame-00001"),
        (turn_two_photos, ValueError, r"is 24 x 32, but its camera is 32 x 24.*2 of 10: frame_00003, frame_00004"),
        (truncate_a_photo, ValueError, r"frame_00005\.png cannot be read as a photo.*Copy it again"),
        (lambda root: shutil.rmtree(root / "sparse"), FileNotFoundError, "holds no cameras.*Run COLMAP"),
        (lambda root: shutil.rmtree(root), FileNotFoundError, "is no folder"),
    ],
)
def test_bad_scenes_are_refused_before_training(
    root: Path, break_scene: Callable[[Path], object], error: type[Exception], message: str
) -> None:
    break_scene(root)
    with pytest.raises(error, match=message):
        ready(root)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"resolution": 0}, "resolution is 0; allowed: -1"),
        ({"test_every": 1}, "test_every is 1; allowed: 0"),
        ({"photos_per_batch": 0}, "photos_per_batch is 0; allowed: 1"),
    ],
)
def test_bad_settings_are_refused(root: Path, settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PosedImagesDataModule(root, **settings)
