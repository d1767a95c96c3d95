"""What a stream of frames has made of a scene, as files: a point cloud, its objects, pictures of the map as it grew."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from datamodules.readers.atomic_files import replacing
from lightning_modules.functional.bi_fusion.voxel_keys import voxel_centres
from lightning_modules.functional.colour_maps import class_colours
from lightning_modules.networks.bi_fusion.online_merge import OnlineMerge

PICTURE_HEIGHT = 240  # pixels of a map seen from above
FRAME_MS = 300  # of the moving picture


class SightRecord(NamedTuple):
    """What is known after n sights of a voxel; the same voxels for all n, those that frames saw often enough.

    Attributes:
        sights: n.
        voxels: How many.
        kept: Share whose class in the map the last of these frames did not change; NaN for the first sight.
        right_frame: Share whose class in the frame is the true one; NaN where no truth is known.
        right_map: Share whose class in the map, the frame included, is the true one; likewise.
    """

    sights: int
    voxels: int
    kept: float
    right_frame: float
    right_map: float


def write_map(
    path: Path,
    centres: Float[Tensor, "voxels 3"],
    class_ids: Int[Tensor, " voxels"],
    counts: Int[Tensor, " voxels"],
    object_ids: Int[Tensor, " voxels"],
    num_classes: int,
) -> None:
    """Writes the voxels as a ``.ply``: x y z in metres, the colour of the class, class, object (-1 = none), frames."""
    from plyfile import PlyData, PlyElement

    kinds = [("x", "<f4"), ("y", "<f4"), ("z", "<f4"), ("red", "u1"), ("green", "u1"), ("blue", "u1")]
    table = np.empty(len(centres), dtype=[*kinds, ("class", "<i4"), ("object", "<i4"), ("frames", "<i4")])
    colours = (class_colours(num_classes)[class_ids.cpu()] * 255).round().byte().numpy()
    columns = [*centres.cpu().numpy().T, *colours.T, class_ids.cpu(), object_ids.cpu(), counts.cpu()]
    for name, column in zip(table.dtype.names or (), columns, strict=True):
        table[name] = column
    with replacing(path) as temporary:
        PlyData([PlyElement.describe(table, "vertex")], byte_order="<").write(str(temporary))


def write_objects(path: Path, merge: OnlineMerge, class_names: Sequence[str]) -> None:
    """Writes the objects of a scene as JSON: id, class, score, frames, box in metres, voxels."""
    classes = merge.class_ids.tolist()
    objects = [
        {
            "id": int(merge.ids[i]),
            "class": class_names[classes[i]] if classes[i] >= 0 else None,
            "score": round(float(merge.scores[i]), 4),
            "frames": int(merge.counts[i]),
            "box_m": [round(x, 3) for x in merge.boxes[i].tolist()],
            "voxels": len(merge.voxels[i]),
        }
        for i in range(len(merge))
    ]
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(objects, indent=1) + "\n")


def objects_of_voxels(keys: Int[Tensor, " voxels"], merge: OnlineMerge) -> Int[Tensor, " voxels"]:
    """Returns the object that each voxel belongs to, -1 where none; of several the one seen in most frames."""
    owners = torch.full((len(keys),), -1, dtype=torch.int64)
    for i in merge.counts.argsort(stable=True).tolist():
        owners[torch.isin(keys.cpu(), merge.voxels[i])] = merge.ids[i]
    return owners


def map_picture(
    keys: Int[Tensor, " voxels"],
    colours: Float[Tensor, "voxels 3"],
    voxel_size: float,
    corner: Float[Tensor, "2 3"],
    height: int = PICTURE_HEIGHT,
) -> np.ndarray:
    """Draws voxels from above, the highest on top, on white.

    Args:
        keys: Of the voxels.
        colours: Of the voxels, 0 to 1.
        voxel_size: Metres.
        corner: Lower and upper corner of what the picture shows, metres; y goes up in it.
        height: Pixels.

    Returns:
        [height, W, 3] uint8.
    """
    lower, upper = corner.double().numpy()
    scale = height / max(upper[1] - lower[1], voxel_size)
    width = max(1, round((upper[0] - lower[0]) * scale))
    centres = voxel_centres(keys, voxel_size).double().cpu().numpy()
    order = np.argsort(centres[:, 2], kind="stable")
    painted = (colours.cpu().numpy()[order] * 255).round().astype(np.uint8)
    low = np.floor((centres[order, :2] - voxel_size / 2 - lower[:2]) * scale + 1e-3).astype(int)
    size = max(1, int(np.ceil(voxel_size * scale - 1e-3)))  # of neighbours, a pixel may belong to both
    dx, dy = (part.ravel() for part in np.meshgrid(np.arange(size), np.arange(size)))
    column, row = low[:, :1] + dx, height - 1 - (low[:, 1:] + dy)
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    highest = np.full(height * width, -1)
    rank = np.broadcast_to(np.arange(len(order))[:, None], inside.shape)
    np.maximum.at(highest, (row * width + column)[inside], rank[inside])
    picture = np.full((height * width, 3), 255, np.uint8)
    picture[highest >= 0] = painted[highest[highest >= 0]]
    return picture.reshape(height, width, 3)


def write_moving_picture(path: Path, pictures: Sequence[np.ndarray]) -> None:
    """Writes pictures of one size as a GIF that runs over and over, the last one for longer."""
    frames = [Image.fromarray(picture) for picture in pictures]
    durations = [FRAME_MS] * (len(frames) - 1) + [5 * FRAME_MS]
    with replacing(path) as temporary:
        frames[0].save(temporary, save_all=True, append_images=frames[1:], duration=durations, loop=0)


def write_sights(folder: Path, records: Sequence[SightRecord]) -> list[Path]:
    """Writes ``agreement.csv`` and, as curves over the number of sights, ``agreement.png``."""
    table, picture = folder / "agreement.csv", folder / "agreement.png"
    with replacing(table) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(SightRecord._fields)
        writer.writerows([[f"{x:.4f}" if isinstance(x, float) else x for x in record] for record in records])
    with replacing(picture) as temporary:
        temporary.write_bytes(_curves(records))
    return [table, picture]


def _curves(records: Sequence[SightRecord]) -> bytes:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    sights = [record.sights for record in records]
    for field, label in (
        ("kept", "the map keeps its class"),
        ("right_map", "the map is right"),
        ("right_frame", "the frame is right"),
    ):
        values = [getattr(record, field) for record in records]
        if not np.isnan(values).all():
            axes.plot(sights, values, marker="o", label=label)
    axes.set_xlabel("frames that have seen a voxel, n")
    axes.set_ylabel(f"share of {records[0].voxels} voxels" if records else "share of voxels")
    axes.set_ylim(0, 1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if axes.lines:
        axes.legend(loc="lower right")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
