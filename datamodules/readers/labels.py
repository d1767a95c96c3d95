"""Ground truth of a scene in any of the formats, matched to its views."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from jaxtyping import Bool, Float
from torch import Tensor

from datamodules.readers.lerf_labels import LabelledFrame, rasterize_labels, read_lerf_labels
from datamodules.readers.ovs3d_labels import MaskedFrame, read_ovs3d_labels, resized_masks
from datamodules.readers.photos import same_aspect
from datamodules.readers.posed_images import PosedImage, name_list
from datamodules.readers.scene_layout import given_path

LabelFrame = LabelledFrame | MaskedFrame


def read_labels(folder: Path) -> dict[str, LabelFrame]:
    """Reads LERF-OVS's ``*.json`` (Mip-NeRF360-OVS's too) or 3D-OVS's ``<frame>/<class>.png``, whichever is there.

    Raises:
        FileNotFoundError: If neither is.
        ValueError: If a file is not a label.
    """
    if any(folder.glob("*.json")):
        return dict(read_lerf_labels(folder))
    if any(folder.glob("*/*.png")):
        return dict(read_ovs3d_labels(folder))
    raise FileNotFoundError(
        f"{folder} holds no labels: neither <image>.json (LERF-OVS, Mip-NeRF360-OVS) nor <frame>/<class>.png (3D-OVS). "
        "Give the folder of this scene, such as lerf_ovs/label/<scene> or 3D_OVS/<scene>/segmentations."
    )


def find_labels(root: Path, labels: str | Path | None) -> Path | None:
    """Returns the folder of a scene's labels: the given one, else one of the usual places, else none."""
    if labels is not None:
        return given_path(root, labels)
    usual = (root / "label", root / "segmentations", root.parent / "label" / root.name)
    return next((path for path in usual if path.is_dir()), None)


def match_labels(
    folder: Path,
    frames: Mapping[str, LabelFrame],
    posed: Mapping[str, PosedImage],
    cameras: Path,
    rule: Literal["name", "number"],
) -> dict[str, LabelFrame]:
    """Returns the labels by the stem of the view they are of.

    Args:
        folder: Where the labels were read, for messages.
        frames: By their own name.
        posed: The views by stem.
        cameras: Where they were read, for messages.
        rule: ``name`` matches equal stems. ``number`` is LangSplatV2's rule: the number in the label's name counts the
            views in the order of their names, from 1 for ``.json`` labels and from 0 for 3D-OVS's; views that the
            reconstruction lost shift it.

    Raises:
        ValueError: If a label has no view, or one of another shape.
    """
    if rule == "name":
        unknown = sorted(set(frames) - set(posed))
        if unknown:
            raise ValueError(
                f"{folder} labels images which {cameras} does not have: {name_list(unknown)} (it has "
                f"{name_list(sorted(posed), 3)}). Give the labels of this scene, move these files away, or, where the "
                "labels are numbered in the order of the images, set data.init_args.label_views=number."
            )
        matched = dict(frames)
    else:
        matched = _by_number(folder, frames, sorted(posed))
    for stem, frame in matched.items():
        camera = posed[stem].camera
        if not same_aspect(camera.width, camera.height, frame.width, frame.height):
            suffix = "" if isinstance(frame, MaskedFrame) else ".json"
            raise ValueError(
                f"{folder / frame.stem}{suffix} was labelled on an image of {frame.width} x {frame.height}, but the "
                f"camera of {posed[stem].name} is {camera.width} x {camera.height}; allowed: the same aspect. Give the "
                "labels of these photos."
            )
    return matched


def _by_number(folder: Path, frames: Mapping[str, LabelFrame], stems: Sequence[str]) -> dict[str, LabelFrame]:
    matched: dict[str, LabelFrame] = {}
    for name, frame in frames.items():
        digits = re.search(r"\d+$", name)
        first = 0 if isinstance(frame, MaskedFrame) else 1
        number = int(digits.group()) - first if digits else -1
        if not 0 <= number < len(stems) or stems[number] in matched:
            raise ValueError(
                f"{folder / name} has no view of its own: with label_views=number its name must end in a number from "
                f"{first} to {len(stems) - 1 + first}, each once. Give the labels of this scene, or set "
                "data.init_args.label_views=name."
            )
        matched[stems[number]] = frame
    return matched


def drawn_labels(
    frame: LabelFrame, width: int, height: int
) -> tuple[tuple[str, ...], Bool[Tensor, "prompts height width"], tuple[Float[Tensor, "_ 4"], ...]]:
    """Returns the distinct categories of a frame with their masks at a size, and their boxes; masks alone have none."""
    if isinstance(frame, MaskedFrame):
        return frame.categories, resized_masks(frame, width, height), ()
    return rasterize_labels(frame, width, height)
