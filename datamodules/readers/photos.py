"""Photographs: the files of a folder, their sizes, their pixels.

Pixels are taken as they are stored. A rotation noted in EXIF is not applied: COLMAP and 3DGS do not apply it either, so
cameras belong to the stored pixels. (OpenCV applies it, and with it LangSplat's own preprocessing.) Transparency is
dropped, CMYK and greyscale become RGB, and of 16 bits the upper 8 are kept.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from datamodules.readers.posed_images import IMAGE_SUFFIXES, image_stem, name_list


def photo_files(folder: Path) -> Iterator[Path]:
    """Yields the photographs in a folder and its subfolders, sorted; hidden ones are left out."""
    for path in sorted(folder.rglob("*")):
        is_hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.suffix.lower() in IMAGE_SUFFIXES and not is_hidden and path.is_file():
            yield path


def photos_by_stem(folder: Path) -> dict[str, Path]:
    """Keys the photographs of a folder by stem, sorted.

    Raises:
        FileNotFoundError: If the folder is absent or holds none.
        ValueError: If two share a stem.
    """
    photos: dict[str, Path] = {}
    for path in photo_files(folder):
        stem = image_stem(path.name)
        if stem in photos:
            raise ValueError(
                f"{photos[stem]} and {path} share the stem {stem!r}, by which features are named. Give the photos "
                "names that differ before the suffix, or give a folder with one of them as data.init_args.images."
            )
        photos[stem] = path
    if not photos:
        raise no_photos(folder)
    return dict(sorted(photos.items()))


def no_photos(folder: Path) -> FileNotFoundError:
    """Returns the error for a folder without photographs."""
    return FileNotFoundError(
        f"{folder} {'holds no photos' if folder.is_dir() else 'does not exist'}; allowed: "
        f"{', '.join(IMAGE_SUFFIXES)}. Give the folder as data.init_args.images."
    )


def read_photo(path: Path, width: int, height: int) -> UInt8[Tensor, "height width 3"]:
    """Decodes a photograph as RGB at a size; reduced by averaging over areas where it is larger.

    Raises:
        ValueError: If the file is damaged.
    """
    try:
        with Image.open(path) as image:
            photo = _as_rgb(image)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # broken PNG chunks are a SyntaxError
        raise _unreadable(path, error) from error
    if photo.size != (width, height):
        photo = photo.resize(
            (width, height), Image.Resampling.BOX if photo.width > width else Image.Resampling.BILINEAR
        )
    return torch.from_numpy(np.array(photo))


def photo_size(path: Path) -> tuple[int, int]:
    """Returns width and height from a photograph's header.

    Raises:
        ValueError: If the file is damaged.
    """
    try:
        with Image.open(path) as image:
            return image.size
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise _unreadable(path, error) from error


def target_size(width: int, height: int, resolution: int) -> tuple[int, int]:
    """Returns the size to work at by LangSplat's rule, the one rule for photographs, cameras and mask maps.

    -1 limits the height to 1080; 1, 2, 4, 8 divide; anything else is the width.
    """
    if resolution == -1:
        scale = max(height / 1080, 1.0)
    elif resolution in (1, 2, 4, 8):
        return round(width / resolution), round(height / resolution)
    else:
        scale = width / resolution
    return int(width / scale), int(height / scale)


def check_resolution(resolution: int) -> None:
    """Refuses what :func:`target_size` has no rule for.

    Raises:
        ValueError: If it is neither -1 nor above 0.
    """
    if resolution != -1 and resolution < 1:
        raise ValueError(f"resolution is {resolution}; allowed: -1, a divisor 1, 2, 4, 8, or a width in pixels.")


def same_aspect(width: int, height: int, other_width: int, other_height: int) -> bool:
    """Whether two sizes are of the same picture, up to the rounding of the smaller one to whole pixels."""
    if other_width > width:
        width, height, other_width, other_height = other_width, other_height, width, height
    return abs(height * other_width - other_height * width) <= max(width, height)


def check_photo_sizes(photos: dict[str, Path], camera_sizes: dict[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """Returns the size of each photograph, by stem, after comparing it with its camera's.

    Photographs may differ among one another, and be larger or smaller than their cameras, in the same aspect.

    Raises:
        ValueError: If a file is damaged, or sizes do not belong together.
    """
    sizes = {stem: photo_size(path) for stem, path in photos.items()}
    wrong = [stem for stem, size in sizes.items() if not same_aspect(*camera_sizes[stem], *size)]
    if wrong:
        (width, height), camera = sizes[wrong[0]], camera_sizes[wrong[0]]
        more = f" So it is with {len(wrong)} of {len(photos)}: {name_list(wrong)}." if len(wrong) > 1 else ""
        raise ValueError(
            f"{photos[wrong[0]]} is {width} x {height}, but its camera is {camera[0]} x {camera[1]}; allowed: the "
            f"same aspect.{more} Give the photos the cameras were computed from."
        )
    return sizes


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits of greyscale, which Pillow would clip to 255
        return Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise OSError("it holds fractions, not the brightness 0 to 255 of a photo")
    return image.convert("RGB")


def _unreadable(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path} cannot be read as a photo ({error}). Copy it again.")
