"""The frames of a scene as folders of files: ``color``, ``depth``, ``pose``, and what is stated of the cameras.

``color/<n>.jpg`` (or ``.png``); ``depth/<n>.png``, 16 bits, millimetres, 0 = none; ``pose/<n>.txt`` (or ``.npy``), a
``world_from_camera`` matrix of 4 x 4, OpenCV axes, metres, all ``-inf`` where tracking was lost. Files put the centre
of pixel (0, 0) at (0, 0); it is (0.5, 0.5) here.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from datamodules.readers.atomic_files import load_array
from datamodules.readers.photos import photo_size, read_photo
from datamodules.readers.rgbd import read_depth
from datamodules.readers.scannet.frame_source import Frame, fixed_intrinsics, scaled_intrinsics
from lightning_modules.functional.cameras import Camera

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")


class Calibration(NamedTuple):
    """What is stated of a scene's cameras.

    Attributes:
        source: Where it is stated.
        colour: [3, 3] of the colour camera, in our convention of pixels.
        colour_size: Width and height that matrix belongs to; None = that of the photos.
        depth: [3, 3] of the depth camera; None = the colour camera's, squashed to the depth images.
        depth_size: Its width and height; None = that of the depth images.
    """

    source: str
    colour: Float[Tensor, "3 3"]
    colour_size: tuple[int, int] | None
    depth: Float[Tensor, "3 3"] | None
    depth_size: tuple[int, int] | None


class FrameFolder:
    """The frames below one folder.

    Args:
        scene: Name of the scene.
        folder: The folder with ``color``, ``depth`` and ``pose``.
        frame_stride: Frames whose number it divides are kept.
        calibration: Of the cameras; None takes the fixed one.
        poses: ``world_from_camera`` by frame where no files hold them.

    Attributes:
        frames: Numbers of the frames with photo, depth and usable pose.
    """

    def __init__(
        self,
        scene: str,
        folder: Path,
        frame_stride: int,
        calibration: Calibration | None,
        poses: Mapping[int, np.ndarray] | None = None,
    ) -> None:
        self.scene, self.folder, self.calibration = scene, folder, calibration
        self.photos = _numbered(folder / "color", IMAGE_SUFFIXES, frame_stride)
        depth_files = _numbered(folder / "depth", (".png",), frame_stride)
        pose_files = _numbered(folder / "pose", (".txt", ".npy"), frame_stride) if poses is None else {}
        self.depths = {number: path for number, path in depth_files.items() if number in self.photos}
        self.without_depth = tuple(number for number in self.photos if number not in depth_files)
        self.poses: dict[int, Float[Tensor, "4 4"]] = {}
        bad, absent = [], []
        for number in self.photos:
            if poses is None and number in pose_files:
                matrix = read_pose(pose_files[number])
            elif poses is not None and number in poses:
                matrix = np.asarray(poses[number], np.float64)
            else:
                absent.append(number)
                continue
            camera_from_world = inverse_pose(matrix)
            if camera_from_world is None:
                bad.append(number)
            else:
                self.poses[number] = camera_from_world
        self.bad_poses, self.without_pose = tuple(bad), tuple(absent)
        self.num_photos = len(self.photos)
        self.frames = tuple(number for number in self.photos if number in self.depths and number in self.poses)

    def load(self, frame_id: int, *, with_image: bool, with_depth: bool) -> Frame:
        """Reads one frame; see :meth:`FrameSource.load`."""
        if frame_id not in self.frames:
            raise ValueError(
                f"{self.folder} has no frame {frame_id} with photo, depth and pose; it has {len(self.frames)}, such as "
                f"{', '.join(map(str, self.frames[:8])) or 'none'}."
            )
        photo, depth_file = self.photos[frame_id], self.depths[frame_id]
        colour_size = photo_size(photo)
        image = read_photo(photo, *colour_size) if with_image else None
        depth = read_depth(depth_file) if with_depth else None
        depth_size = (depth.shape[1], depth.shape[0]) if depth is not None else photo_size(depth_file)
        return made_frame(
            self.scene, frame_id, image, depth, self.poses[frame_id], self.calibration, colour_size, depth_size
        )


def made_frame(
    scene: str,
    frame_id: int,
    image: UInt8[Tensor, "height width 3"] | None,
    depth: Float[Tensor, "rows columns"] | None,
    camera_from_world: Float[Tensor, "4 4"],
    calibration: Calibration | None,
    colour_size: tuple[int, int],
    depth_size: tuple[int, int],
) -> Frame:
    """Puts a frame together; intrinsics are brought to the sizes the images have."""
    if calibration is None:
        colour, own = fixed_intrinsics(*colour_size), fixed_intrinsics(*depth_size)
    else:
        colour = scaled_intrinsics(calibration.colour, calibration.colour_size or colour_size, colour_size)
        if calibration.depth is None:
            own = scaled_intrinsics(colour, colour_size, depth_size)
        else:
            own = scaled_intrinsics(calibration.depth, calibration.depth_size or depth_size, depth_size)
        for name, matrix, size in (("colour", colour, colour_size), ("depth", own, depth_size)):
            _check_centre(calibration.source, scene, name, matrix, size)
    return Frame(
        scene,
        frame_id,
        image,
        depth,
        Camera(camera_from_world, colour, *colour_size),
        Camera(camera_from_world, own, *depth_size),
    )


def _check_centre(source: str, scene: str, name: str, matrix: Float[Tensor, "3 3"], size: tuple[int, int]) -> None:
    """Tells intrinsics of another image size by where they put the centre."""
    offset = (matrix[:2, 2] / torch.tensor(size) - 0.5).abs().max()
    if offset > 0.2 or not (matrix[0, 0] > 0 and matrix[1, 1] > 0):
        raise ValueError(
            f"{source}: the {name} intrinsics of {scene} have their centre at {matrix[0, 2]:.1f}, {matrix[1, 2]:.1f}, "
            f"but its images are {size[0]} x {size[1]}. They belong to another size; copy the scene's own "
            f"{scene}.txt (with colorWidth and depthWidth) beside the frames, or set data.init_args.intrinsics=fixed."
        )


def inverse_pose(world_from_camera: np.ndarray) -> Float[Tensor, "4 4"] | None:
    """Returns ``camera_from_world``, or None where the pose is not finite or no rigid motion."""
    if world_from_camera.shape != (4, 4) or not np.isfinite(world_from_camera).all():
        return None
    rotation = world_from_camera[:3, :3]
    is_rigid = np.abs(rotation @ rotation.T - np.eye(3)).max() < 1e-2 and np.linalg.det(rotation) > 0
    if not is_rigid or np.abs(world_from_camera[3] - [0, 0, 0, 1]).max() > 1e-4:
        return None
    return torch.from_numpy(np.linalg.inv(world_from_camera)).float()


def read_pose(path: Path) -> np.ndarray:
    """Reads a matrix of 4 x 4; one that cannot be read comes back as NaN, for it spoils one frame alone."""
    try:
        values = load_array(path) if path.suffix == ".npy" else np.array(path.read_text().split())
        return values.astype(np.float64).reshape(4, 4)
    except (ValueError, EOFError, OSError):
        return np.full((4, 4), np.nan)


def read_matrix(path: Path) -> Float[Tensor, "3 3"]:
    """Reads intrinsics of 3 x 3 or 4 x 4 and moves the centre of pixel (0, 0) to (0.5, 0.5).

    Raises:
        ValueError: If the file holds something else.
    """
    try:
        values = load_array(path) if path.suffix == ".npy" else np.array(path.read_text().split())
        values = values.astype(np.float64)
        matrix = values.reshape((3, 3) if values.size == 9 else (4, 4))[:3, :3]
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{path} cannot be read as intrinsics ({error}); allowed: 3 x 3 or 4 x 4 numbers.") from error
    return half_pixel_centres(matrix)


def half_pixel_centres(matrix: np.ndarray) -> Float[Tensor, "3 3"]:
    """Moves the centre of pixel (0, 0) from (0, 0) to (0.5, 0.5)."""
    moved = torch.from_numpy(np.array(matrix[:3, :3], np.float32))
    moved[:2, 2] += 0.5
    return moved


def read_calibration(folder: Path, metadata: Path) -> Calibration | None:
    """Finds a scene's intrinsics: ``intrinsic`` (as exported), its metadata, or one matrix for both cameras.

    Args:
        folder: The folder of the frames.
        metadata: ``sceneXXXX_YY.txt``, which states sizes too.

    Raises:
        ValueError: If a file is damaged.
    """
    stated = read_metadata(metadata) if metadata.is_file() else {}
    colour_size, depth_size = _size(stated, "color"), _size(stated, "depth")
    colour, depth = folder / "intrinsic" / "intrinsic_color.txt", folder / "intrinsic" / "intrinsic_depth.txt"
    if colour.is_file() and depth.is_file():
        return Calibration(str(colour.parent), read_matrix(colour), colour_size, read_matrix(depth), depth_size)
    if {"fx_color", "fx_depth"} <= stated.keys():
        try:
            colour_matrix, depth_matrix = _stated_matrix(stated, "color"), _stated_matrix(stated, "depth")
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"{metadata} lacks or misstates {error}; needed: fx, fy, mx, my of both cameras."
            ) from error
        return Calibration(str(metadata), colour_matrix, colour_size, depth_matrix, depth_size)
    for single in (folder / "intrinsic" / "intrinsic.npy", folder / "intrinsic.txt", folder / "intrinsics.txt"):
        if single.is_file():
            return Calibration(str(single), read_matrix(single), None, None, None)
    return None


def read_metadata(path: Path) -> dict[str, str]:
    """Reads lines of ``key = value``."""
    lines = path.read_text(errors="replace").replace("\r", "").splitlines()
    pairs = (line.split("=", 1) for line in lines if "=" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def _size(stated: Mapping[str, str], camera: str) -> tuple[int, int] | None:
    width, height = stated.get(f"{camera}Width", ""), stated.get(f"{camera}Height", "")
    return (int(width), int(height)) if width.isdigit() and height.isdigit() else None


def _stated_matrix(stated: Mapping[str, str], camera: str) -> Float[Tensor, "3 3"]:
    fx, fy, mx, my = (float(stated[f"{name}_{camera}"]) for name in ("fx", "fy", "mx", "my"))
    return half_pixel_centres(np.array([[fx, 0, mx], [0, fy, my], [0, 0, 1]]))


def _numbered(folder: Path, suffixes: tuple[str, ...], stride: int) -> dict[int, Path]:
    """Returns the files whose stem is a number that ``stride`` divides, by that number."""
    found = {}
    for path in folder.iterdir() if folder.is_dir() else ():
        number = re.fullmatch(r"(?:frame[-_])?(\d+)", path.stem)
        if number and path.suffix.lower() in suffixes and int(number[1]) % stride == 0:
            found[int(number[1])] = path
    return dict(sorted(found.items()))
