"""Per-point features of a frame as files: numbers, a picture, and a row of what it cost."""

import csv
import hashlib
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor, nn

from callbacks.fused_point_pictures import paint_points
from datamodules.readers.atomic_files import replacing
from lightning_modules.bi_fusion import FramePrediction

ARRAYS = ("pts_feat", "uv_idx", "conf_2d", "points", "gate")
MOST_PIXELS_OF_POINT = 16  # along a side; painting takes as many steps as a square has pixels
PNG_EFFORT = 1  # of zlib: 6, the usual, takes five times as long for a tenth less


class FrameCost(NamedTuple):
    """What one frame cost.

    Attributes:
        scene: Its scene.
        frame: Its number.
        points: Points with features.
        load_ms: Waiting for the data, a frame's share of its batch.
        network_ms: From there to the features, likewise.
        write_ms: Writing numbers and picture.
        peak_mib: Most memory so far in use by the process: of the GPU where there is one.
        bytes: Of its files.
    """

    scene: str
    frame: int
    points: int
    load_ms: float
    network_ms: float
    write_ms: float
    peak_mib: float
    bytes: int


def features_file(folder: Path, scene: str, frame: int) -> Path:
    """Returns where the numbers of a frame go."""
    return folder / scene / f"frame_{frame}.npz"


def picture_file(folder: Path, scene: str, frame: int) -> Path:
    """Returns where the picture of a frame goes."""
    return folder / scene / f"vis_{frame}.png"


def write_features(path: Path, prediction: FramePrediction, dtype: Literal["float16", "float32"]) -> None:
    """Writes ``pts_feat`` [N, 128], ``uv_idx`` [N, 2], ``conf_2d`` [N], ``points`` [N, 6] and ``gate`` [N].

    Not compressed: features are noise to zlib, which would take twenty times as long to save a tenth of the bytes.

    Args:
        path: The ``.npz`` file.
        prediction: Of the frame.
        dtype: Of ``pts_feat``; the others are float32.

    Raises:
        ValueError: If a feature is not finite in it.
    """
    kind = torch.float16 if dtype == "float16" else torch.float32
    arrays = {
        "pts_feat": prediction.fused.to(kind).numpy(),
        "uv_idx": prediction.uv.numpy(),
        "conf_2d": prediction.conf_2d.numpy(),
        "points": prediction.points.numpy(),
        "gate": prediction.gate.numpy(),
    }
    if prediction.clip_global is not None:
        arrays["clip_global"] = prediction.clip_global.numpy()
    # The extremes instead of every number: numpy asks float16 for infinity one by one.
    extremes = prediction.fused.aminmax() if prediction.fused.numel() else ()
    if not all(abs(float(value)) <= torch.finfo(kind).max for value in extremes):
        raise ValueError(
            f"The features of frame {prediction.frame_id} of {prediction.scene} are not finite in {dtype}. Look for "
            "NaN in the training's losses; where there is none, set the writer's dtype to float32."
        )
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def is_whole(path: Path) -> bool:
    """Tells whether a file has all arrays of a frame, by its table of contents, which is written last."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {f"{name}.npy" for name in ARRAYS} <= set(archive.namelist())
    except (zipfile.BadZipFile, OSError):
        return False


# The picture


class FeatureColours(NamedTuple):
    """How features become colours: their three main directions, each from its lowest to its highest tenth.

    Attributes:
        mean: [C].
        axes: [C, 3].
        low: [3] along the axes.
        high: [3] along the axes.
    """

    mean: Float[Tensor, " channels"]
    axes: Float[Tensor, "channels 3"]
    low: Float[Tensor, "3"]
    high: Float[Tensor, "3"]

    def __call__(self, features: Float[Tensor, "points channels"]) -> Float[Tensor, "points 3"]:
        """Returns RGB in 0..1."""
        return ((features - self.mean) @ self.axes - self.low).div(self.high - self.low).clamp(0, 1)


def feature_colours(features: Float[Tensor, "points channels"], most: int = 4096) -> FeatureColours:
    """Fits colours to features by their principal components; with many, every so many-th is looked at."""
    some = features[:: max(len(features) // most, 1)].float()
    if len(some) == 0:
        some = some.new_zeros(1, features.shape[1])
    mean = some.mean(dim=0)
    _, axes = torch.linalg.eigh((some - mean).T @ (some - mean))
    axes = axes[:, -3:].flip(-1)
    axes = axes * axes.sum(dim=0).sign().where(axes.sum(dim=0) != 0, 1.0)  # of two opposite ones always the same
    along = (some - mean) @ axes
    low, high = along.quantile(0.05, dim=0), along.quantile(0.95, dim=0)
    return FeatureColours(mean, axes, low, torch.maximum(high, low + 1e-6))


def write_picture(
    path: Path, prediction: FramePrediction, photo: UInt8[Tensor, "height width 3"], colours: FeatureColours
) -> None:
    """Writes the photo with the features of the points that the frame sees beside it, each point a small square."""
    height, width = prediction.image_size
    seen = prediction.conf_2d > 0
    size = round((height * width / max(int(seen.sum()), 1)) ** 0.5 * 1.5)
    size = min(max(size, 1), MOST_PIXELS_OF_POINT)
    painted = paint_points(prediction.uv[seen], colours(prediction.fused[seen]), (height, width), size)
    left = Image.fromarray(photo.numpy())
    if left.size != (width, height):
        left = left.resize((width, height), Image.Resampling.BILINEAR)
    pixels = np.concatenate([np.asarray(left), (painted * 255).round().to(torch.uint8).numpy()], axis=1)
    with replacing(path) as temporary:
        Image.fromarray(pixels).save(temporary, compress_level=PNG_EFFORT)


# What it cost


def append_costs(path: Path, costs: Sequence[FrameCost]) -> None:
    """Adds rows to a process's own table, which outlives the process."""
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if is_new:
            writer.writerow(FrameCost._fields)
        writer.writerows([[f"{v:.3f}" if isinstance(v, float) else v for v in cost] for cost in costs])


def read_costs(path: Path) -> list[FrameCost]:
    """Reads rows; those cut short by a kill are left out."""
    kinds = FrameCost.__annotations__.values()
    costs = []
    with path.open(newline="") as file:
        for row in list(csv.reader(file))[1:]:
            try:
                costs.append(FrameCost(*(kind(value) for kind, value in zip(kinds, row, strict=True))))
            except ValueError:
                continue
    return costs


def join_costs(folder: Path, table: str) -> list[FrameCost]:
    """Puts the tables of all processes, and of earlier runs, into one, sorted; a frame's last row counts."""
    whole, parts = folder / table, sorted(folder.glob(f".{table}.*"))
    rows = [cost for path in (whole, *parts) if path.is_file() for cost in read_costs(path)]
    costs = sorted({(cost.scene, cost.frame): cost for cost in rows}.values())
    if costs:
        with replacing(whole) as temporary:
            append_costs(temporary, costs)
    for part in parts:
        part.unlink()
    return costs


def weights_digest(module: nn.Module) -> str:
    """Returns what tells weights from others."""
    digest = hashlib.sha256()
    for name, values in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(values.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
