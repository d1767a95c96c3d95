"""Pinhole cameras: OpenCV axes (x right, y down, z forward), metres, pixel (0, 0) centred at (0.5, 0.5)."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor


class Camera(NamedTuple):
    """One pinhole camera.

    Attributes:
        camera_from_world: [4, 4] rigid transform from world to camera coordinates, OpenCV axes, metres.
        intrinsics: [3, 3] pinhole matrix in pixels; zero skew.
        width: Image width in pixels.
        height: Image height in pixels.
    """

    camera_from_world: Float[Tensor, "4 4"]
    intrinsics: Float[Tensor, "3 3"]
    width: int
    height: int

    @property
    def world_from_camera(self) -> Float[Tensor, "4 4"]:
        """[4, 4] rigid transform from camera to world coordinates."""
        rotation = self.camera_from_world[:3, :3]
        inverse = torch.eye(4, dtype=rotation.dtype, device=rotation.device)
        inverse[:3, :3] = rotation.T
        inverse[:3, 3] = -rotation.T @ self.camera_from_world[:3, 3]
        return inverse

    @property
    def position(self) -> Float[Tensor, "3"]:
        """Centre of projection in world coordinates, metres."""
        return -self.camera_from_world[:3, :3].T @ self.camera_from_world[:3, 3]

    @property
    def num_pixels(self) -> int:
        """Pixels of the image; flat pixel ids run row by row from 0 to this."""
        return self.width * self.height


def resize_camera(camera: Camera, width: int, height: int) -> Camera:
    """Returns the camera of the same view at another image size; both focal lengths and the centre scale with it."""
    scale = camera.intrinsics.new_tensor([width / camera.width, height / camera.height, 1.0])
    return camera._replace(intrinsics=camera.intrinsics * scale[:, None], width=width, height=height)


def pixel_rays(camera: Camera) -> tuple[Float[Tensor, "3"], Float[Tensor, "height width 3"]]:
    """Returns the rays through all pixel centres in world coordinates.

    Returns:
        The common origin [3], metres, and directions [H, W, 3] scaled so that the camera-space z is 1: a point at depth
        z is ``origin + z * direction``.
    """
    device, dtype = camera.intrinsics.device, camera.intrinsics.dtype
    (fx, _, cx), (_, fy, cy), _ = camera.intrinsics
    x = (torch.arange(camera.width, device=device, dtype=dtype) + 0.5 - cx) / fx
    y = (torch.arange(camera.height, device=device, dtype=dtype) + 0.5 - cy) / fy
    grid_y, grid_x = torch.meshgrid(y, x, indexing="ij")
    directions = torch.stack([grid_x, grid_y, torch.ones_like(grid_x)], dim=-1) @ camera.camera_from_world[:3, :3]
    return camera.position, directions


def project_points(
    points: Float[Tensor, "points 3"], camera: Camera
) -> tuple[Float[Tensor, "points 2"], Float[Tensor, " points"]]:
    """Projects world points to pixel coordinates; also returns their camera-space depth, metres.

    Pixel (0, 0) covers 0 to 1. Points at or behind the camera plane have a depth of zero or less and meaningless
    pixels; the caller masks them.
    """
    in_camera = points @ camera.camera_from_world[:3, :3].T + camera.camera_from_world[:3, 3]
    depth = in_camera[:, 2]
    homogeneous = in_camera @ camera.intrinsics.T
    return homogeneous[:, :2] / torch.where(depth == 0, torch.ones_like(depth), depth)[:, None], depth


def back_project(
    depth: Float[Tensor, "height width"], camera: Camera
) -> tuple[Float[Tensor, "height width 3"], Bool[Tensor, "height width"]]:
    """Lifts a depth map to world points; also returns which pixels are valid.

    Args:
        depth: [H, W] camera-space z, metres; 0, less, or not finite = none.
        camera: The camera at the size of the map.
    """
    origin, directions = pixel_rays(camera)
    valid = torch.isfinite(depth) & (depth > 0)
    return origin + directions * torch.where(valid, depth, torch.zeros_like(depth))[..., None], valid
