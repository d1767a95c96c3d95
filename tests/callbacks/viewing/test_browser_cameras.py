import math

import pytest
import torch

from callbacks.viewing.browser_cameras import (
    BrowserCamera,
    browser_camera,
    camera_of_browser,
    canvas_size,
    point_in_front,
    scene_up,
)
from lightning_modules.functional.cameras import project_points, resize_camera
from lightning_modules.functional.splatting.gaussians import quaternions_to_matrices
from tests.callbacks.viewing.shelf import aside, front
from tests.functional.random_scenes import random_camera


def test_points_land_where_viser_says_its_axes_point():
    # viser: P_world = R p_camera + t, z forward, x right, y down; fov is vertical.
    wxyz = torch.nn.functional.normalize(torch.tensor([0.3, -0.5, 0.2, 0.7]), dim=0)
    rotation, position = quaternions_to_matrices(wxyz.double()), torch.tensor([0.5, -1.0, 2.0]).double()
    browser = BrowserCamera(tuple(wxyz.tolist()), tuple(position.tolist()), math.radians(50))
    camera = camera_of_browser(browser, 200, 100)
    half = math.tan(math.radians(25))
    in_camera = torch.tensor([[0.0, 0, 3], [0, 3 * half, 3], [3 * 2 * half, -3 * half, 3]]).double()
    pixels, depth = project_points((in_camera @ rotation.T + position).float(), camera)
    torch.testing.assert_close(pixels, torch.tensor([[100.0, 50.0], [100.0, 100.0], [200.0, 0.0]]), atol=1e-3, rtol=0)
    torch.testing.assert_close(depth, torch.full((3,), 3.0))


@pytest.mark.parametrize("seed", range(4))
def test_a_camera_survives_the_browser(seed):
    camera = random_camera(seed)
    camera = camera._replace(intrinsics=torch.tensor([[40.0, 0, 26.5], [0, 40.0, 19.0], [0, 0, 1]]))
    again = camera_of_browser(browser_camera(camera), camera.width, camera.height)
    torch.testing.assert_close(again.camera_from_world, camera.camera_from_world, atol=1e-5, rtol=0)
    torch.testing.assert_close(again.intrinsics, camera.intrinsics, atol=1e-4, rtol=0)


def test_a_coarse_picture_shows_what_the_fine_one_does():
    browser = browser_camera(front())
    fine, coarse = camera_of_browser(browser, 640, 480), camera_of_browser(browser, 160, 120)
    torch.testing.assert_close(resize_camera(fine, 160, 120).intrinsics, coarse.intrinsics)


def test_pictures_keep_to_their_pixels_and_to_the_canvas_aspect():
    assert canvas_size(640, 480, 10**9) == (640, 480)  # never more than the canvas
    width, height = canvas_size(1920, 1080, 272_160)
    assert 0.98 < width * height / 272_160 <= 1.01
    assert width / height == pytest.approx(16 / 9, rel=0.01)
    assert canvas_size(1920, 1080, 272_160, 0.25) == (round(width / 4), round(height / 4))
    assert canvas_size(4000, 3, 1000) >= (16, 16)  # a window folded to a line


def test_up_is_up_on_average():
    torch.testing.assert_close(scene_up([front(), aside()]), torch.tensor([0.0, -1.0, 0.0]).double())
    upside_down = front()._replace(camera_from_world=torch.diag(torch.tensor([-1.0, -1, 1, 1])))
    torch.testing.assert_close(scene_up([upside_down]), torch.tensor([0.0, 1.0, 0.0]).double())
    assert scene_up([front(), upside_down]).norm() == 1  # they cancel out


def test_an_orbit_turns_about_what_is_in_front():
    for camera in (front(), random_camera(1)):
        pixels, depth = project_points(point_in_front(camera, 4.0)[None], camera)
        assert float(depth) == pytest.approx(4.0, abs=1e-4)
        torch.testing.assert_close(pixels[0], camera.intrinsics[:2, 2], atol=1e-2, rtol=0)
