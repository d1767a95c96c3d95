import pytest
import torch

from lightning_modules.functional.camera_paths import camera_path
from lightning_modules.functional.cameras import Camera, resize_camera


def orbit(count: int, turn: float = 2 * torch.pi) -> list[Camera]:
    """Cameras on a circle of radius 2 that look at the origin."""
    cameras = []
    for angle in torch.arange(count) / count * turn:
        position = 2 * torch.stack([angle.cos(), angle.sin(), torch.tensor(0.3)])
        forward = -position / position.norm()
        right = torch.linalg.cross(forward, torch.tensor([0.0, 0.0, 1.0]))
        right = right / right.norm()
        rotation = torch.stack([right, torch.linalg.cross(forward, right), forward])
        pose = torch.eye(4)
        pose[:3, :3], pose[:3, 3] = rotation, -rotation @ position
        cameras.append(Camera(pose, torch.tensor([[50.0, 0, 32], [0, 50, 24], [0, 0, 1]]), 64, 48))
    return cameras


def test_an_open_path_passes_the_first_and_the_last_camera():
    cameras = orbit(5, 3.0)
    path = camera_path(cameras, 9)
    for frame, camera in ((path[0], cameras[0]), (path[-1], cameras[-1])):
        torch.testing.assert_close(frame.camera_from_world, camera.camera_from_world, atol=1e-5, rtol=0)
        torch.testing.assert_close(frame.intrinsics, camera.intrinsics)
    assert (path[4].width, path[4].height) == (64, 48)


def test_a_closed_path_through_an_even_orbit_is_that_orbit():
    cameras, path = orbit(12), camera_path(orbit(12), 48, closed=True)
    assert len(path) == 48
    for number, camera in enumerate(cameras):
        torch.testing.assert_close(path[4 * number].camera_from_world, camera.camera_from_world, atol=1e-4, rtol=0)
    for frame in path:
        forward = frame.camera_from_world[2, :3]
        assert torch.dot(forward, -frame.position / frame.position.norm()) > 0.9999  # looks at the origin
        torch.testing.assert_close(frame.position[:2].norm(), torch.tensor(2.0), atol=2e-3, rtol=0)
        torch.testing.assert_close(frame.camera_from_world[:3, :3].det(), torch.tensor(1.0), atol=1e-5, rtol=0)


def test_steps_of_a_path_are_even_where_cameras_are_not():
    cameras = orbit(48)
    path = camera_path([cameras[at] for at in (0, 1, 2, 10, 18, 19, 20, 32, 40)], 60)
    positions = torch.stack([frame.position for frame in path])
    steps = positions.diff(dim=0).norm(dim=1)
    assert steps.max() < 1.6 * steps.min()


def test_a_camera_given_twice_is_no_obstacle():
    cameras = orbit(6, 3.0)
    path = camera_path([*cameras[:3], cameras[2], *cameras[3:]], 30)
    assert all(bool(frame.camera_from_world.isfinite().all()) for frame in path)


def test_zoom_is_interpolated_and_other_image_sizes_follow_the_first():
    first, second = orbit(2, 1.0)
    longer = second._replace(intrinsics=torch.tensor([[100.0, 0, 32], [0, 100, 24], [0, 0, 1]]))
    assert camera_path([first, longer], 3)[1].intrinsics[0, 0] == 75
    larger = resize_camera(second, 128, 96)  # the same lens
    middle = camera_path([first, larger], 3)[1]
    torch.testing.assert_close(middle.intrinsics, first.intrinsics)
    assert (middle.width, middle.height) == (64, 48)


@pytest.mark.parametrize(("cameras", "frames"), [(orbit(1), 5), (orbit(3), 1)])
def test_too_few_cameras_or_frames_are_refused(cameras, frames):
    with pytest.raises(ValueError, match="2 cameras and 2 frames"):
        camera_path(cameras, frames)


def test_a_path_through_one_place_alone_is_refused():
    with pytest.raises(ValueError, match="all the same"):
        camera_path(orbit(1) * 3, 5)
