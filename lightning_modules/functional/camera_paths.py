"""Camera paths: a smooth flight through given cameras, for pictures of new views and for videos."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.interpolate import CubicSpline, make_interp_spline
from scipy.spatial.transform import Rotation, RotationSpline

from lightning_modules.functional.cameras import Camera, resize_camera

LEAST_STEP = 1e-2  # of the mean step; keeps time running between two cameras at the same place


@dataclass(frozen=True)
class CameraPathSettings:
    """A flight through the cameras of a scene.

    Raises:
        ValueError: If there are fewer than two frames.
    """

    frames: int = 60
    """Views along the path."""
    closed: bool = False
    """Fly from the last camera back to the first."""

    def __post_init__(self) -> None:
        if self.frames < 2:
            raise ValueError(f"frames of a camera path is {self.frames}; allowed: 2 or more.")


def camera_path(cameras: Sequence[Camera], num_frames: int, *, closed: bool = False) -> list[Camera]:
    """Flies through cameras in their order: cubic splines of the positions and of the rotations.

    A frame looks where the cameras around it look. Time runs with distance and angle, so that the flight is even where
    the cameras are not. Intrinsics are interpolated linearly.

    Args:
        cameras: Two or more, in the order of the flight.
        num_frames: Two or more. An open path ends at the last camera; a closed one one frame before the first.
        closed: Fly from the last camera back to the first.

    Returns:
        Cameras of the first one's image size, device and dtype.

    Raises:
        ValueError: If there are fewer than two cameras or frames, or the cameras are all the same.
    """
    if len(cameras) < 2 or num_frames < 2:
        raise ValueError(f"A path needs 2 cameras and 2 frames or more, got {len(cameras)} and {num_frames}.")
    first, wrap = cameras[0], min(3, len(cameras)) if closed else 0  # a cubic spline hardly sees further than three
    order = [*cameras[len(cameras) - wrap :], *cameras, *cameras[: wrap + 1 if closed else 0]]
    poses = torch.stack([camera.world_from_camera for camera in order]).double().cpu().numpy()
    sized = [resize_camera(camera, first.width, first.height).intrinsics for camera in order]
    intrinsics = torch.stack(sized).double().cpu().numpy()
    positions, rotations = poses[:, :3, 3], Rotation.from_matrix(poses[:, :3, :3])
    times = _times(positions, rotations)
    last = wrap + len(cameras) - (0 if closed else 1)
    at = np.linspace(times[wrap], times[last], num_frames, endpoint=not closed)

    flown = np.tile(np.eye(4), (num_frames, 1, 1))
    camera_from_world = RotationSpline(times, rotations)(at).inv()
    flown[:, :3, :3] = camera_from_world.as_matrix()
    flown[:, :3, 3] = -camera_from_world.apply(CubicSpline(times, positions)(at))
    matrices = make_interp_spline(times, intrinsics, k=1)(at)
    return [
        first._replace(
            camera_from_world=torch.from_numpy(pose).to(first.camera_from_world),
            intrinsics=torch.from_numpy(matrix).to(first.intrinsics),
        )
        for pose, matrix in zip(flown, matrices, strict=True)
    ]


def _times(positions: np.ndarray, rotations: Rotation) -> np.ndarray:
    """Returns when each camera is passed: half of the time goes with distance, half with angle."""
    distances = np.linalg.norm(np.diff(positions, axis=0), axis=1)
    angles = (rotations[:-1].inv() * rotations[1:]).magnitude()
    steps = sum(part / part.mean() for part in (distances, angles) if part.mean() > 1e-9)
    if np.ndim(steps) == 0:
        raise ValueError("The cameras of a path are all the same; give two that differ.")
    return np.concatenate([[0.0], np.cumsum(np.maximum(steps, LEAST_STEP))])
