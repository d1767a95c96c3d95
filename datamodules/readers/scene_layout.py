"""Where the files of a scene lie when nobody says so."""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from datamodules.readers.colmap import read_colmap_cameras, read_colmap_points
from datamodules.readers.nerfstudio import read_transforms, read_transforms_points
from datamodules.readers.photos import check_photo_sizes, no_photos, photo_files
from datamodules.readers.posed_images import PosedImage, image_stem, name_list, similar_names

_GAUSSIANS = (
    "gaussians.ply",
    "point_cloud.ply",
    "point_cloud/iteration_*/point_cloud.ply",
    "chkpnt*.pth",
    "ckpts/ckpt_*.pt",
    "exports/gaussians.ply",
    "output/point_cloud/iteration_*/point_cloud.ply",
    "output/chkpnt*.pth",
    "output/{scene}/point_cloud/iteration_*/point_cloud.ply",
    "output/{scene}/chkpnt*.pth",
)
_CAMERAS = ("sparse/0", "sparse", "colmap/sparse/0", "transforms.json")


def given_path(root: Path, path: str | Path) -> Path:
    """Returns a path a user gave: as it is if it exists, else inside ``root``."""
    return Path(path) if Path(path).exists() else root / path


def find_gaussians(folder: Path) -> Path:
    """Returns the first scene of Gaussians in the usual places of a scene's or a training's folder.

    Looked up in this order, the highest iteration where there are several: ``gaussians.ply``, ``point_cloud.ply``,
    ``point_cloud/iteration_*/point_cloud.ply``, ``chkpnt*.pth``, ``ckpts/ckpt_*.pt``, ``exports/gaussians.ply`` (a run
    of this project); then those of 3DGS below ``output`` and ``output/<scene>``.

    Raises:
        FileNotFoundError: If there is none; lists what was looked up.
    """
    patterns = [pattern.format(scene=folder.name) for pattern in _GAUSSIANS]
    for pattern in patterns:
        found = sorted(folder.glob(pattern), key=_numbers)
        if found:
            return found[-1]
    raise FileNotFoundError(
        f"{folder} holds no Gaussians; looked for {', '.join(patterns)}. Train the scene with 3DGS or gsplat first, or "
        "give the file as data.init_args.gaussians."
    )


def _numbers(path: Path) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", str(path))]


def find_cameras(root: Path) -> Path:
    """Returns the first of ``sparse/0``, ``sparse``, ``colmap/sparse/0`` and ``transforms.json``.

    Raises:
        FileNotFoundError: If there is none.
    """
    for name in _CAMERAS:
        path = root / name
        if path.is_file() or any((path / f"cameras{suffix}").is_file() for suffix in (".bin", ".txt")):
            return path
    raise FileNotFoundError(
        f"{root} holds no cameras; looked for {', '.join(_CAMERAS)}. Run COLMAP on the photos, or give the model's "
        "folder or a transforms.json as data.init_args.cameras."
    )


def read_cameras(path: Path) -> dict[str, PosedImage]:
    """Reads a COLMAP model's folder or a ``transforms.json``."""
    return read_transforms(path) if path.suffix == ".json" else read_colmap_cameras(path)


def read_points(path: Path) -> tuple[Float[Tensor, "points 3"], UInt8[Tensor, "points 3"]]:
    """Reads the sparse points of a COLMAP model's folder or a ``transforms.json``, to start Gaussians from.

    Returns:
        World coordinates and RGB.

    Raises:
        ValueError: If there are none, or one is not finite.
    """
    read = read_transforms_points if path.suffix == ".json" else read_colmap_points
    positions, colors = read(path)
    if not len(positions):
        raise ValueError(
            f"{path} has no 3D points, from which Gaussians start. Run COLMAP's mapper (or point_triangulator, where "
            "poses were known) on the photos; a transforms.json names its points as ply_file_path."
        )
    if not np.isfinite(positions).all():
        raise ValueError(f"{path} has points that are not finite numbers. Run the reconstruction again.")
    return torch.from_numpy(positions.astype(np.float32)), torch.from_numpy(colors)


def match_photos(
    folder: Path, posed: Mapping[str, PosedImage], cameras: Path, *, otherwise: str = ""
) -> dict[str, Path]:
    """Finds the photograph of each posed image, by its name below ``folder`` or by its stem, and compares their sizes.

    Args:
        folder: Folder of the photographs.
        posed: Posed images by stem.
        cameras: Where those were read, for the messages.
        otherwise: What a user can do other than to bring the photographs, for the messages.

    Raises:
        FileNotFoundError: If the folder is absent or empty, or a photograph is.
        ValueError: If a photograph is damaged or not of its camera's aspect.
    """
    by_stem = {image_stem(path.name): path for path in photo_files(folder)}
    if not by_stem:
        raise FileNotFoundError(f"{no_photos(folder)}{otherwise}")
    photos: dict[str, Path] = {}
    missing = []
    for stem, image in posed.items():
        exact = folder / image.name
        if exact.is_file():
            photos[stem] = exact
        elif stem in by_stem:
            photos[stem] = by_stem[stem]
        else:
            missing.append(image.name)
    if missing:
        present = [path.name for path in by_stem.values()]
        raise FileNotFoundError(
            f"{folder} lacks {len(missing)} of the {len(posed)} photos of {cameras}: {name_list(missing)}; it holds "
            f"{len(present)}, such as {similar_names(Path(missing[0]).name, present)}. Copy them there, or give "
            f"their folder as data.init_args.images.{otherwise}"
        )
    check_photo_sizes(photos, {stem: (image.camera.width, image.camera.height) for stem, image in posed.items()})
    return photos


def feature_stems(folder: Path) -> set[str]:
    """Returns the stems which have ``<stem>_f.npy`` or ``<stem>_s.npy``."""
    return {path.name[: -len("_f.npy")] for letter in "fs" for path in folder.glob(f"[!.]*_{letter}.npy")}
