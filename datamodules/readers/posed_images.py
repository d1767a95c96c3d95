"""What every camera format gives: photographs with calibrated poses, keyed by the stem of their file."""

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from lightning_modules.functional.cameras import Camera

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")


class PosedImage(NamedTuple):
    """One photograph and its camera.

    Attributes:
        name: File name as the camera file gives it, perhaps with folders.
        camera: The camera at the size the file states.
    """

    name: str
    camera: Camera


def image_stem(name: str) -> str:
    """Returns the file name without folders and without the suffix of an image; further dots stay."""
    file = Path(name)
    return file.stem if file.suffix.lower() in IMAGE_SUFFIXES else file.name


def by_stem(path: Path, images: Iterable[PosedImage]) -> dict[str, PosedImage]:
    """Keys photographs by stem, sorted, and refuses two of the same stem, which features could not be told apart by.

    Raises:
        ValueError: If two photographs share a stem, or there are none.
    """
    keyed: dict[str, PosedImage] = {}
    for image in sorted(images, key=lambda image: image.name):
        stem = image_stem(image.name)
        if stem in keyed:
            raise ValueError(
                f"{path}: the images {keyed[stem].name!r} and {image.name!r} share the stem {stem!r}, by which "
                "features and labels are matched. Give the photos names that differ before the suffix."
            )
        keyed[stem] = image
    if not keyed:
        raise ValueError(f"{path} holds no posed images. Run the reconstruction again, or give another camera file.")
    return dict(sorted(keyed.items()))


def name_list(names: Sequence[str], most: int = 5) -> str:
    """Returns some names for an error message, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def similar_names(name: str, names: Sequence[str]) -> str:
    """Returns up to three of ``names`` for an error message: those which ``name`` may be a slip of, else the first."""
    return ", ".join(difflib.get_close_matches(name, names, n=3) or names[:3])
