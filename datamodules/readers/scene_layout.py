"""Where the files of a scene lie when nobody says so."""

import re
from collections.abc import Iterable
from pathlib import Path

from datamodules.readers.colmap import read_colmap_cameras
from datamodules.readers.nerfstudio import read_transforms
from datamodules.readers.posed_images import IMAGE_SUFFIXES, PosedImage, image_stem

_GAUSSIANS = (
    "gaussians.ply",
    "point_cloud.ply",
    "point_cloud/iteration_*/point_cloud.ply",
    "chkpnt*.pth",
    "ckpts/ckpt_*.pt",
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
    ``point_cloud/iteration_*/point_cloud.ply``, ``chkpnt*.pth``, ``ckpts/ckpt_*.pt``; then the same of 3DGS below
    ``output`` and ``output/<scene>``.

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


def find_photos(folder: Path, images: Iterable[PosedImage]) -> tuple[dict[str, Path], list[str]]:
    """Finds the photograph of each posed image, by its name below ``folder`` or by its stem; also the names not found.

    Raises:
        FileNotFoundError: If the folder is absent or empty.
    """
    by_stem = {
        image_stem(path.name): path for path in sorted(folder.rglob("*")) if path.suffix.lower() in IMAGE_SUFFIXES
    }
    if not by_stem:
        raise FileNotFoundError(
            f"{folder} {'holds no photos' if folder.is_dir() else 'does not exist'}; allowed: "
            f"{', '.join(IMAGE_SUFFIXES)}. Give the folder as data.init_args.images, or train without photos "
            "(data.init_args.load_images=false)."
        )
    photos: dict[str, Path] = {}
    missing = []
    for image in images:
        stem = image_stem(image.name)
        exact = folder / image.name
        if exact.is_file():
            photos[stem] = exact
        elif stem in by_stem:
            photos[stem] = by_stem[stem]
        else:
            missing.append(image.name)
    return photos, missing


def feature_stems(folder: Path) -> set[str]:
    """Returns the stems which have ``<stem>_f.npy`` or ``<stem>_s.npy``."""
    return {path.name[: -len("_f.npy")] for letter in "fs" for path in folder.glob(f"[!.]*_{letter}.npy")}
