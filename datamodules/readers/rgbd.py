"""Posed RGB-D frames in the layout of Open3D's and Redwood's examples.

``color/<stem>.jpg``; ``depth/<stem>.png`` (uint16 millimetres of camera-space z, 0 = none, registered to the colour
image); ``trajectory.log`` (per frame a line of ids, of which the first is the number in the stem, then four lines of a
``world_from_camera`` matrix, metres, OpenCV axes); ``camera_primesense.json`` (width, height, 3 x 3 matrix by columns).
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from datamodules.readers.posed_images import IMAGE_SUFFIXES
from lightning_modules.functional.cameras import Camera


class RgbdFrame(NamedTuple):
    """One colour photograph with its depth.

    Attributes:
        stem: Name of both files without the suffix.
        photo: The colour image's file.
        depth: The depth image's file, of the same size.
        camera: Their camera.
    """

    stem: str
    photo: Path
    depth: Path
    camera: Camera


def read_rgbd_frames(folder: str | Path) -> list[RgbdFrame]:
    """Finds the frames of a folder, sorted by name; poses are matched by the number in the name.

    Raises:
        FileNotFoundError: If a part is absent.
        ValueError: If a part is damaged, or a photo lacks its depth or pose.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} is no folder. Give a folder with color, depth, trajectory.log and camera_primesense.json."
        )
    photos = {path.stem: path for path in sorted((folder / "color").glob("*")) if path.suffix.lower() in IMAGE_SUFFIXES}
    depths = {path.stem: path for path in sorted((folder / "depth").glob("*.png"))}
    if not photos or photos.keys() != depths.keys():
        single = sorted(photos.keys() ^ depths.keys())
        raise ValueError(
            f"{folder}: {len(photos)} photos in color and {len(depths)} in depth do not pair by name (single: "
            f"{', '.join(single[:5]) or 'none'}). Each color/<stem>.jpg needs its depth/<stem>.png."
        )
    intrinsics, width, height = _read_intrinsics(folder / "camera_primesense.json")
    poses = _read_trajectory(folder / "trajectory.log")
    frames = []
    for stem, photo in photos.items():
        if not stem.isdigit() or int(stem) not in poses:
            raise ValueError(
                f"{folder / 'trajectory.log'} has no pose for {photo.name}; it has the numbers {sorted(poses)[:8]}. "
                "Name photos by the number of their pose."
            )
        camera = Camera(poses[int(stem)], intrinsics, width, height)
        frames.append(RgbdFrame(stem, photo, depths[stem], camera))
    return frames


def read_depth(path: Path) -> Float[Tensor, "height width"]:
    """Reads a depth image as metres, 0 = none.

    Raises:
        ValueError: If the file is damaged, or not one channel of 16 bits.
    """
    try:
        with Image.open(path) as image:
            depth = np.array(image)
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{path} cannot be read as a depth image ({error}). Copy it again.") from error
    if depth.ndim != 2 or depth.dtype not in (np.uint16, np.int32):
        raise ValueError(f"{path} is {depth.dtype} {list(depth.shape)}; allowed: one channel of 16 bits, millimetres.")
    return torch.from_numpy(depth.astype(np.float32) / 1000)


def _read_intrinsics(path: Path) -> tuple[Float[Tensor, "3 3"], int, int]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; it holds width, height and intrinsic_matrix. Copy it there.")
    try:
        content = json.loads(path.read_text())
        matrix = torch.tensor(content["intrinsic_matrix"], dtype=torch.float32).reshape(3, 3).T.contiguous()
        width, height = int(content["width"]), int(content["height"])
    except (json.JSONDecodeError, KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path} cannot be read ({error!r}); needed: width, height, nine intrinsic_matrix.") from error
    matrix[:2, 2] += 0.5  # the file puts the centre of pixel (0, 0) at (0, 0)
    return matrix, width, height


def _read_trajectory(path: Path) -> dict[int, Float[Tensor, "4 4"]]:
    """Returns ``camera_from_world`` by frame number."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; it holds the poses. Copy it there.")
    lines = [line.split() for line in path.read_text().splitlines() if line.strip()]
    poses = {}
    try:
        for start in range(0, len(lines), 5):
            world_from_camera = torch.tensor(
                [[float(value) for value in line] for line in lines[start + 1 : start + 5]], dtype=torch.float64
            ).reshape(4, 4)
            poses[int(lines[start][0])] = torch.linalg.inv(world_from_camera).float()
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"{path} cannot be read ({str(error).splitlines()[0]}); needed: per frame a line of ids and a 4 x 4 "
            "matrix. It may be truncated; copy it again."
        ) from error
    return poses
