"""Cameras of the browser and cameras of the scene.

viser gives a camera as the rotation and position of ``world_from_camera`` with OpenCV axes, and one vertical field of
view: square pixels, principal point in the centre. A photograph's own camera may have neither; what the browser shows
of it is the nearest that it can.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_modules.functional.cameras import Camera
from lightning_modules.functional.splatting.gaussians import matrices_to_quaternions, quaternions_to_matrices


class BrowserCamera(NamedTuple):
    """A camera as the browser has it.

    Attributes:
        wxyz: Rotation of ``world_from_camera``, OpenCV axes.
        position: Centre of projection, world.
        fov: Vertical field of view, radians.
    """

    wxyz: tuple[float, ...]
    position: tuple[float, ...]
    fov: float


def camera_of_browser(browser: BrowserCamera, width: int, height: int) -> Camera:
    """Returns the camera of a browser's view at an image size in pixels; its aspect must be that of the canvas."""
    rotation = quaternions_to_matrices(torch.tensor(browser.wxyz, dtype=torch.float64)).T
    camera_from_world = torch.eye(4, dtype=torch.float64)
    camera_from_world[:3, :3] = rotation
    camera_from_world[:3, 3] = -rotation @ torch.tensor(browser.position, dtype=torch.float64)
    focal = 0.5 * height / math.tan(0.5 * browser.fov)
    intrinsics = torch.tensor([[focal, 0.0, 0.5 * width], [0.0, focal, 0.5 * height], [0.0, 0.0, 1.0]])
    return Camera(camera_from_world.float(), intrinsics, width, height)


def browser_camera(camera: Camera) -> BrowserCamera:
    """Returns what the browser needs to look through a camera."""
    wxyz = matrices_to_quaternions(camera.camera_from_world[:3, :3].double().T)
    fov = 2 * math.atan(0.5 * camera.height / float(camera.intrinsics[1, 1]))
    return BrowserCamera(tuple(wxyz.tolist()), tuple(camera.position.tolist()), fov)


def canvas_size(width: int, height: int, max_pixels: int, scale: float = 1.0) -> tuple[int, int]:
    """Returns the size to draw a canvas at: at most ``max_pixels``, times ``scale`` along both sides."""
    share = min(1.0, math.sqrt(max_pixels / (width * height))) * scale
    return max(16, round(width * share)), max(16, round(height * share))


def scene_up(cameras: Sequence[Camera]) -> Float[Tensor, "3"]:
    """Returns the direction that is up on average over the cameras, unit; -y where they cancel out."""
    up = -torch.stack([camera.camera_from_world[1, :3].double() for camera in cameras]).mean(dim=0)
    length = up.norm()
    return up / length if length > 1e-6 else torch.tensor([0.0, -1.0, 0.0], dtype=torch.float64)


def point_in_front(camera: Camera, distance: float) -> Float[Tensor, "3"]:
    """Returns the point at a distance along the camera's axis: what an orbit turns about."""
    return camera.position + distance * camera.camera_from_world[2, :3]
