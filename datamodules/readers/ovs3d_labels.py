"""Ground truth of 3D-OVS: a folder per labelled frame, with a black and white picture for each class."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool
from PIL import Image
from torch import Tensor

from datamodules.readers.posed_images import name_list, similar_names


class MaskedFrame(NamedTuple):
    """The labels of one photograph as masks.

    Attributes:
        stem: Name of its folder: the frame's id.
        width: Width of the masks, pixels.
        height: Their height.
        categories: The classes, which are the prompts.
        masks: [P, height, width] where each class is.
    """

    stem: str
    width: int
    height: int
    categories: tuple[str, ...]
    masks: Bool[np.ndarray, "classes height width"]


def read_ovs3d_labels(folder: str | Path) -> dict[str, MaskedFrame]:
    """Reads ``<frame>/<class>.png`` of a scene's ``segmentations``, keyed by frame and sorted by it.

    A file's name is the prompt; what is not black is inside (LangSplatV2's ``eval_3d_ovs.py`` looks at the blue
    channel, which is the same in black and white pictures). ``classes.txt``, one class a line, need not exist; where it
    does, other classes are an error.

    Raises:
        FileNotFoundError: If there is no picture of a class.
        ValueError: If a class is not in ``classes.txt``, or a picture is damaged, empty, or of another size than the
            others of its frame.
    """
    folder = Path(folder)
    frames = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    files = {frame.name: sorted(frame.glob("*.png")) for frame in frames}
    files = {name: paths for name, paths in files.items() if paths}
    if not files:
        raise FileNotFoundError(
            f"{folder} holds no <frame>/<class>.png. Give the folder of this scene's labels, such as "
            "3D_OVS/<scene>/segmentations."
        )
    listing = folder / "classes.txt"
    if listing.is_file():
        classes = [line.strip() for line in listing.read_text().splitlines() if line.strip()]
        for path in (path for paths in files.values() for path in paths):
            if path.stem.lower() not in map(str.lower, classes):
                raise ValueError(
                    f"{path} is of the class {path.stem!r}, which {listing} does not list: {name_list(classes, 12)} "
                    f"(close: {similar_names(path.stem, classes)}). Rename the file, or add the class to the list."
                )
    return {name: _read_frame(name, paths) for name, paths in files.items()}


def _read_frame(name: str, paths: list[Path]) -> MaskedFrame:
    masks = [_read_mask(path) for path in paths]
    height, width = masks[0].shape
    for path, mask in zip(paths, masks, strict=True):
        if mask.shape != (height, width):
            raise ValueError(
                f"{path} is {mask.shape[1]} x {mask.shape[0]}, but {paths[0].name} beside it is {width} x {height}; "
                "allowed: one size for all classes of a frame. Copy the labels again."
            )
    return MaskedFrame(name, width, height, tuple(path.stem for path in paths), np.stack(masks))


def _read_mask(path: Path) -> Bool[np.ndarray, "height width"]:
    try:
        with Image.open(path) as image:
            mask = np.array(image.convert("RGB")).max(axis=2) > 0
    except (OSError, SyntaxError) as error:  # Pillow reports broken PNG chunks as SyntaxError
        raise ValueError(f"{path} cannot be read as a picture ({error}). Copy it again.") from error
    if not mask.any():
        raise ValueError(
            f"{path} is empty: no pixel is of the class {path.stem!r}, so there is nothing to find. Remove the file; "
            "the class is then not asked for in this frame."
        )
    return mask


def resized_masks(frame: MaskedFrame, width: int, height: int) -> Bool[Tensor, "classes height width"]:
    """Returns the masks at a size, by nearest neighbours as OpenCV's ``INTER_NEAREST`` takes them.

    Raises:
        ValueError: If a mask is so small that nothing is left of it.
    """
    masks = torch.from_numpy(frame.masks)
    if (width, height) != (frame.width, frame.height):
        masks = F.interpolate(masks[None].to(torch.uint8), (height, width), mode="nearest")[0].bool()
    for category, mask in zip(frame.categories, masks, strict=True):
        if not bool(mask.any()):
            raise ValueError(
                f"Nothing is left of the class {category!r} of frame {frame.stem} ({frame.width} x {frame.height}) at "
                f"{width} x {height}. Evaluate at a higher resolution, or remove this label."
            )
    return masks
