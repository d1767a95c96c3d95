"""Cameras of nerfstudio's ``transforms.json`` (also instant-ngp's and Blender's)."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8

from datamodules.readers.posed_images import PosedImage, by_stem
from lightning_modules.functional.cameras import Camera

_POSITION, _COLOR = ("x", "y", "z"), ("red", "green", "blue")
_DISTORTION = ("k1", "k2", "k3", "k4", "p1", "p2")
_PINHOLE_MODELS = ("OPENCV", "PINHOLE", "SIMPLE_PINHOLE", "PERSPECTIVE", "SIMPLE_RADIAL", "RADIAL")


def read_transforms(path: str | Path) -> dict[str, PosedImage]:
    """Reads the frames of a ``transforms.json``, keyed by stem and sorted by it.

    The file holds ``world_from_camera`` with OpenGL camera axes (x right, y up, z back); ours are OpenCV's.
    Intrinsics may be given once or per frame, which wins. ``applied_transform`` is not undone: poses stay in the
    coordinates of the file, and so must the Gaussians (nerfstudio's trainer moves and scales the scene once more;
    export its Gaussians in the original coordinates).

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not such a file, a frame lacks intrinsics or a pose, or a camera is distorted.
    """
    path = Path(path)
    content = _read_json(path)
    frames = content["frames"]
    shared = {key: value for key, value in content.items() if key != "frames"}
    return by_stem(path, [_posed_image(path, {**shared, **frame}) for frame in frames])


def read_transforms_points(path: str | Path) -> tuple[Float[np.ndarray, "points 3"], UInt8[np.ndarray, "points 3"]]:
    """Reads the sparse points that belong to a ``transforms.json``: positions and RGB colours.

    They lie in the ``.ply`` file that it names as ``ply_file_path``; without that, none are returned.

    Raises:
        FileNotFoundError: If the named file is absent.
        ValueError: If it is damaged or has no colours.
    """
    from plyfile import PlyData, PlyParseError

    path = Path(path)
    name = _read_json(path).get("ply_file_path")
    if name is None:
        return np.zeros((0, 3)), np.zeros((0, 3), np.uint8)
    ply = path.parent / name
    if not ply.is_file():
        raise FileNotFoundError(f"{ply}, which {path} names as ply_file_path, does not exist. Copy it there.")
    try:
        vertices = PlyData.read(ply)["vertex"]
        positions, colors = (np.stack([vertices[key] for key in keys], axis=1) for keys in (_POSITION, _COLOR))
    except (PlyParseError, KeyError, ValueError) as error:
        raise ValueError(
            f"{ply} cannot be read as points ({error}); allowed: vertices with {', '.join(_POSITION + _COLOR)}. Run "
            "ns-process-data again."
        ) from error
    return positions.astype(np.float64), colors.astype(np.uint8)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file. Give a transforms.json, or a COLMAP model's folder.")
    try:
        content = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}). It may be truncated; write it again.") from error
    if not isinstance(content, dict) or not isinstance(content.get("frames"), list):
        raise ValueError(f"{path} has no list 'frames', so it is no transforms.json. Run ns-process-data again.")
    return content


def _posed_image(path: Path, frame: dict[str, Any]) -> PosedImage:
    name = frame.get("file_path")
    if not isinstance(name, str):
        raise ValueError(f"{path}: a frame has no 'file_path'. Run ns-process-data again.")
    where = f"{path}: frame {name!r}"
    model = str(frame.get("camera_model", "OPENCV"))
    distortion = {key: frame[key] for key in _DISTORTION if frame.get(key)}
    if model not in _PINHOLE_MODELS or distortion:
        raise ValueError(
            f"{where} has the camera model {model} with distortion {distortion}; allowed: a pinhole without "
            "distortion. Undistort the photos (`colmap image_undistorter`) and give the undistorted model."
        )
    try:
        width, height = int(frame["w"]), int(frame["h"])
        focal_x = float(frame["fl_x"]) if "fl_x" in frame else 0.5 * width / math.tan(0.5 * frame["camera_angle_x"])
        focal_y = float(frame.get("fl_y", focal_x))
        center_x, center_y = float(frame.get("cx", width / 2)), float(frame.get("cy", height / 2))
    except KeyError as error:
        raise ValueError(
            f"{where} lacks {error}; needed, in the frame or once for all: w, h, and fl_x or camera_angle_x. Add them."
        ) from error
    world_from_camera = torch.tensor(frame.get("transform_matrix", []), dtype=torch.float64)
    if world_from_camera.shape != (4, 4) or not torch.isfinite(world_from_camera).all():
        raise ValueError(f"{where}: transform_matrix must be 4 x 4 finite numbers. Run ns-process-data again.")
    rotation = world_from_camera[:3, :3] * world_from_camera.new_tensor([1.0, -1.0, -1.0])
    if (rotation.T @ rotation - torch.eye(3)).abs().max() > 1e-3:
        raise ValueError(
            f"{where}: the rotation of transform_matrix is not orthonormal; allowed: a rigid pose. Remove the scale."
        )
    camera_from_world = torch.eye(4, dtype=torch.float64)
    camera_from_world[:3, :3] = rotation.T
    camera_from_world[:3, 3] = -rotation.T @ world_from_camera[:3, 3]
    intrinsics = torch.tensor([[focal_x, 0, center_x], [0, focal_y, center_y], [0, 0, 1]])
    return PosedImage(name, Camera(camera_from_world.float(), intrinsics.float(), width, height))
