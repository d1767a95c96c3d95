"""Cameras and points of COLMAP models, binary or text, through pycolmap.

COLMAP's conventions are ours: OpenCV axes, camera from world, pixel (0, 0) centred at (0.5, 0.5).
"""

import tempfile
import zlib  # noqa: F401  pycolmap 4.2 imported before zlib or numpy makes Pillow's next PNG abort the process
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from datamodules.readers.colmap_checks import check_binary_model
from datamodules.readers.posed_images import PosedImage, by_stem
from lightning_modules.functional.cameras import Camera

_PERSPECTIVE_MODELS = ("SIMPLE_PINHOLE", "PINHOLE", "SIMPLE_RADIAL", "RADIAL", "OPENCV", "FULL_OPENCV")


def read_colmap_cameras(model_dir: str | Path) -> dict[str, PosedImage]:
    """Reads the registered photographs of a model, keyed by stem (dots before the suffix stay) and sorted by it.

    Pinhole models are taken with their principal point. A model with distortion is taken if its distortion is zero.

    Raises:
        FileNotFoundError: If the folder holds no model.
        ValueError: If the model is damaged, a camera is distorted, or stems are not unique.
    """
    model_dir = Path(model_dir)
    model = _read_model(model_dir)
    cameras = {key: _pinhole(model_dir, camera) for key, camera in model.cameras.items()}
    images = []
    for image in model.images.values():
        if not image.has_pose:
            continue
        intrinsics, width, height = cameras[image.camera_id]
        camera_from_world = np.eye(4)
        camera_from_world[:3] = image.cam_from_world().matrix()
        pose = torch.from_numpy(camera_from_world.astype(np.float32))
        if not torch.isfinite(pose).all():
            raise ValueError(f"{model_dir}: the pose of {image.name!r} holds NaN. Run the reconstruction again.")
        images.append(PosedImage(image.name, Camera(pose, intrinsics, width, height)))
    return by_stem(model_dir, images)


def read_colmap_points(model_dir: str | Path) -> tuple[Float[np.ndarray, "points 3"], UInt8[np.ndarray, "points 3"]]:
    """Reads the sparse points of a model: positions in world coordinates and RGB colours."""
    points = _read_model(Path(model_dir)).points3D.values()
    positions = np.array([point.xyz for point in points], dtype=np.float64).reshape(-1, 3)
    return positions, np.array([point.color for point in points], dtype=np.uint8).reshape(-1, 3)


def write_colmap_model(
    model_dir: str | Path,
    cameras: dict[str, Camera],
    points: Float[Tensor, "points 3"] | Float[np.ndarray, "points 3"],
    colors: UInt8[Tensor, "points 3"] | UInt8[np.ndarray, "points 3"],
) -> None:
    """Writes a binary COLMAP model of pinhole cameras and points without tracks.

    Args:
        model_dir: Folder to write, usually ``<root>/sparse/0``; made where it does not exist.
        cameras: Camera by image file name. Equal intrinsics share one COLMAP camera.
        points: [N, 3] positions in world coordinates.
        colors: [N, 3] RGB.
    """
    import pycolmap

    model = pycolmap.Reconstruction()
    camera_ids: dict[tuple[float, ...], int] = {}
    for image_id, (name, camera) in enumerate(sorted(cameras.items()), start=1):
        matrix = camera.intrinsics.double()
        params = [float(matrix[0, 0]), float(matrix[1, 1]), float(matrix[0, 2]), float(matrix[1, 2])]
        key = (*params, camera.width, camera.height)
        if key not in camera_ids:
            camera_ids[key] = len(camera_ids) + 1
            size = {"width": camera.width, "height": camera.height}
            model.add_camera_with_trivial_rig(
                pycolmap.Camera(model="PINHOLE", params=params, camera_id=camera_ids[key], **size)
            )
        pose = camera.camera_from_world.double().cpu().numpy()
        image = pycolmap.Image(name=name, camera_id=camera_ids[key], image_id=image_id)
        model.add_image_with_trivial_frame(image, pycolmap.Rigid3d(pycolmap.Rotation3d(pose[:3, :3]), pose[:3, 3]))
    for position, color in zip(np.asarray(points, np.float64), np.asarray(colors, np.uint8), strict=True):
        model.add_point3D(position, pycolmap.Track(), color)
    model_dir = Path(model_dir)
    model_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=model_dir, prefix=".writing") as temporary:
        model.write_binary(temporary)
        for file in Path(temporary).iterdir():
            file.replace(model_dir / file.name)


def _read_model(model_dir: Path) -> Any:
    import pycolmap

    names = ("cameras", "images", "points3D")
    formats = [
        suffix for suffix in (".bin", ".txt") if all((model_dir / f"{name}{suffix}").is_file() for name in names)
    ]
    if not formats:
        present = sorted(file.name for file in model_dir.iterdir()) if model_dir.is_dir() else None
        found = "the folder does not exist" if present is None else f"it holds {', '.join(present[:8]) or 'nothing'}"
        raise FileNotFoundError(
            f"{model_dir} is no COLMAP model: it needs cameras, images and points3D, all .bin or all .txt, but {found}"
            ". Give the folder of the reconstruction, usually <scene>/sparse/0."
        )
    model = pycolmap.Reconstruction()
    try:
        if formats[0] == ".bin":
            members = [member for member in pycolmap.CameraModelId.__members__.values() if int(member) >= 0]
            one_of = pycolmap.Camera.create_from_model_id
            check_binary_model(model_dir, {int(member): len(one_of(1, member, 1.0, 1, 1).params) for member in members})
            model.read_binary(str(model_dir))
        else:
            model.read_text(str(model_dir))
    except (ValueError, RuntimeError, IndexError, OSError) as error:
        if str(model_dir) in str(error):
            raise
        raise ValueError(
            f"{model_dir} cannot be read as a COLMAP model ({str(error).splitlines()[0][:160]}). A file may be "
            "truncated; copy the folder or run the reconstruction again."
        ) from error
    return model


def _pinhole(model_dir: Path, camera: Any) -> tuple[Float[Tensor, "3 3"], int, int]:
    """Returns the intrinsic matrix and size of a pycolmap camera without distortion."""
    distortion = [camera.params[index] for index in camera.extra_params_idxs()]
    model = camera.model.name
    if model not in _PERSPECTIVE_MODELS or any(value != 0 for value in distortion):
        raise ValueError(
            f"{model_dir}: camera {camera.camera_id} has the distorted model {model} with {distortion}; allowed: "
            "SIMPLE_PINHOLE, PINHOLE, or zero distortion. Undistort photos and model with "
            "`colmap image_undistorter --image_path <images> --input_path <model> --output_path <folder>`, then "
            "compute the language features on the new photos."
        )
    matrix = camera.calibration_matrix()
    if not np.isfinite(matrix).all() or matrix[0, 0] <= 0 or matrix[1, 1] <= 0:
        raise ValueError(
            f"{model_dir}: camera {camera.camera_id} has the parameters {list(camera.params)}; allowed: finite, focal "
            "lengths above zero. Run the reconstruction again."
        )
    return torch.from_numpy(matrix.astype(np.float32)), int(camera.width), int(camera.height)
