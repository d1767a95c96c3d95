"""Ground truth of LERF-OVS: one JSON per labelled frame, with a polygon and a box for each object."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from datamodules.readers.atomic_files import replacing
from datamodules.readers.posed_images import image_stem


class LabelledObject(NamedTuple):
    """One labelled object of a frame.

    Attributes:
        category: The prompt that should find it.
        polygon: [K, 2] outline, x y in pixels.
        box: [4] x1 y1 x2 y2 in pixels.
    """

    category: str
    polygon: Float[np.ndarray, "corners 2"]
    box: Float[np.ndarray, "4"]


class LabelledFrame(NamedTuple):
    """The labels of one photograph.

    Attributes:
        stem: Stem of the photograph.
        width: Width of the image the coordinates belong to, pixels.
        height: Its height, pixels.
        objects: At least one object; a category may occur more than once.
    """

    stem: str
    width: int
    height: int
    objects: list[LabelledObject]

    @property
    def categories(self) -> tuple[str, ...]:
        """The distinct categories, in the order of their first objects."""
        return tuple(dict.fromkeys(thing.category for thing in self.objects))


def read_lerf_labels(folder: str | Path) -> dict[str, LabelledFrame]:
    """Reads every ``*.json`` of a folder (``lerf_ovs/label/<scene>``), keyed by stem and sorted by it.

    Raises:
        FileNotFoundError: If the folder is absent or holds no ``.json``.
        ValueError: If a file is not a label file.
    """
    folder = Path(folder)
    files = sorted(folder.glob("*.json"))
    if not files:
        raise FileNotFoundError(
            f"{folder} holds no .json label files. Give the folder of this scene, such as lerf_ovs/label/<scene>."
        )
    frames = [_read_frame(path) for path in files]
    return {frame.stem: frame for frame in frames}


def _read_frame(path: Path) -> LabelledFrame:
    try:
        content = json.loads(path.read_text())
        info = content["info"]
        width, height = int(info["width"]), int(info["height"])
        objects = [_object(path, entry) for entry in content["objects"]]
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}). It may be truncated; copy it again.") from error
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is no LERF-OVS label file ({error!r}); needed: info with width and height, and objects with "
            "category, segmentation and bbox. Move other .json files out of the label folder."
        ) from error
    if not objects or width <= 0 or height <= 0:
        raise ValueError(f"{path} labels no object in an image of {width} x {height}. Label one, or remove the file.")
    return LabelledFrame(image_stem(path.stem), width, height, objects)


def _object(path: Path, entry: dict) -> LabelledObject:
    category = str(entry["category"])
    polygon, box = (np.asarray(entry[key], dtype=np.float64) for key in ("segmentation", "bbox"))
    if polygon.ndim != 2 or polygon.shape[1] != 2 or len(polygon) < 3 or not np.isfinite(polygon).all():
        raise ValueError(
            f"{path}: the segmentation of {category!r} has shape {list(polygon.shape)}; allowed: one polygon of at "
            "least three finite x y corners. Label the object again."
        )
    if box.shape != (4,) or not np.isfinite(box).all() or (box[2:] < box[:2]).any():
        raise ValueError(
            f"{path}: the bbox of {category!r} is {box.tolist()}; allowed: x1 y1 x2 y2, x1 <= x2, y1 <= y2."
        )
    return LabelledObject(category, polygon, box)


def write_lerf_label(path: str | Path, frame: LabelledFrame, image_name: str | None = None) -> None:
    """Writes a label file; ``image_name`` is the file name it gives, by default the stem with ``.jpg``."""
    content = {
        "info": {
            "name": image_name or f"{frame.stem}.jpg",
            "width": frame.width,
            "height": frame.height,
            "depth": 3,
            "note": "",
        },
        "objects": [
            {
                "category": thing.category,
                "group": index,
                "segmentation": np.asarray(thing.polygon, float).tolist(),
                "bbox": np.asarray(thing.box, float).tolist(),
            }
            for index, thing in enumerate(frame.objects, start=1)
        ],
    }
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content))


def polygon_mask(polygon: Float[np.ndarray, "corners 2"], width: int, height: int) -> Bool[np.ndarray, "height width"]:
    """Fills a polygon of x y corners as LERF-OVS is evaluated: OpenCV's ``fillPoly`` on corners truncated to integers.

    Rows are filled between pairs of crossings (even-odd; 16 bits of fraction, rounded), then the outline is drawn.
    Equal to OpenCV 4 pixel by pixel for a polygon inside the image.
    """
    start = np.trunc(polygon).astype(np.int64)
    end = np.roll(start, -1, axis=0)
    mask = np.zeros((height, width), dtype=bool)

    crossing_rows, crossings = [], []
    for (x0, y0), (x1, y1) in zip(start.tolist(), end.tolist(), strict=True):
        if y0 == y1:
            continue
        top, bottom, x_top = (y0, y1, x0) if y0 < y1 else (y1, y0, x1)
        slope = int(((x1 - x0) << 16) / (y1 - y0))  # towards zero, as C divides
        rows = np.arange(top, bottom)
        crossing_rows.append(rows)
        crossings.append((x_top << 16) + slope * (rows - top))
    if crossings:
        rows, columns = np.concatenate(crossing_rows), np.concatenate(crossings)
        order = np.lexsort((columns, rows))
        rows, columns = rows[order], (columns[order] + (1 << 15)) >> 16
        for row, left, right in zip(rows[::2], columns[::2], columns[1::2], strict=True):
            if 0 <= row < height:
                mask[row, max(left, 0) : max(right + 1, 0)] = True

    for (x0, y0), (x1, y1) in zip(start.tolist(), end.tolist(), strict=True):
        columns, rows = _line_pixels(*((x0, y0, x1, y1) if x0 <= x1 else (x1, y1, x0, y0)))
        inside = (columns >= 0) & (columns < width) & (rows >= 0) & (rows < height)
        mask[rows[inside], columns[inside]] = True
    return mask


def _line_pixels(x0: int, y0: int, x1: int, y1: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns columns and rows of Bresenham's line, halves rounded towards its start."""
    num_x, num_y = abs(x1 - x0), abs(y1 - y0)
    steps = np.arange(max(num_x, num_y) + 1)
    longer, shorter = max(num_x, num_y, 1), min(num_x, num_y)
    minor = (2 * shorter * steps + longer - 1) // (2 * longer)
    along_x, along_y = (steps, minor) if num_x >= num_y else (minor, steps)
    return x0 + np.sign(x1 - x0) * along_x, y0 + np.sign(y1 - y0) * along_y


def rasterize_labels(
    frame: LabelledFrame, width: int, height: int
) -> tuple[tuple[str, ...], Bool[Tensor, "prompts height width"], tuple[Float[Tensor, "_ 4"], ...]]:
    """Returns the distinct categories of a frame, in order, with their united masks and all their boxes.

    Coordinates are scaled where the frame was labelled at another size than ``width`` x ``height``.
    """
    scale = np.array([width / frame.width, height / frame.height])
    masks: dict[str, np.ndarray] = {}
    boxes: dict[str, list[np.ndarray]] = {}
    for thing in frame.objects:
        mask = polygon_mask(thing.polygon * scale, width, height)
        masks[thing.category] = masks.get(thing.category, False) | mask
        boxes.setdefault(thing.category, []).append(thing.box * np.tile(scale, 2))
    return (
        tuple(masks),
        torch.from_numpy(np.stack(list(masks.values()))),
        tuple(torch.from_numpy(np.stack(group).astype(np.float32)) for group in boxes.values()),
    )
