"""Truncated signed distance near a surface as ``.npz``.

The arrays are ``sparse_sdf`` [N, 1], ``sparse_index`` [N, 3] and ``resolution``: the keys that trainers of sparse
autoencoders read. Ours also keep ``band`` and what they were made from.
"""

import json
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from datamodules.readers.atomic_files import NUMPY_HEADERS, replacing

LARGEST_RESOLUTION = 4096


class StoredSdf(NamedTuple):
    """The signed distance of one shape.

    Attributes:
        coords: [N, 3] int32 grid points, sorted by ``(x * R + y) * R + z``, none twice.
        sdf: [N] float32 in -1 to 1: distance over the band, negative inside.
        resolution: R.
        band: In voxels; None where the file does not say.
    """

    coords: Int[Tensor, "voxels 3"]
    sdf: Float[Tensor, " voxels"]
    resolution: int
    band: float | None


def write_sparse_sdf(path: str | Path, stored: StoredSdf, origin: Mapping[str, Any] | None = None) -> None:
    """Writes one shape.

    Args:
        path: The file.
        stored: What to write.
        origin: What it was made from, to know it again (:func:`read_origin`).
    """
    arrays: dict[str, Any] = {
        "sparse_sdf": stored.sdf.numpy().astype(np.float32)[:, None],
        "sparse_index": stored.coords.numpy().astype(np.int32),
        "resolution": np.int64(stored.resolution),
    }
    if stored.band is not None:
        arrays["band"] = np.float64(stored.band)
    if origin is not None:
        arrays["origin"] = np.array(json.dumps(origin))
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)


def read_origin(path: str | Path) -> Any:
    """Returns what a file was made from, or None if it is absent, damaged or does not say."""
    try:
        with NUMPY_HEADERS, zipfile.ZipFile(path), np.load(path, allow_pickle=False) as arrays:
            return json.loads(str(arrays["origin"])) if "origin" in arrays else None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error):
        return None


def read_sparse_sdf(path: str | Path) -> StoredSdf:
    """Reads one shape without executing pickles, and sorts its rows.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, holds Python objects, lacks an array, has one of another shape, no voxel, a
            coordinate out of range or twice, or a distance that is NaN or out of range.
    """
    path = Path(path)
    arrays = _read_arrays(path)
    resolution = _scalar(path, "resolution", arrays["resolution"])
    if not (resolution == int(resolution) and 2 <= resolution <= LARGEST_RESOLUTION):
        raise ValueError(
            f"{path}: resolution is {resolution}; allowed: a whole number from 2 to {LARGEST_RESOLUTION}. Write the "
            "number of grid points along an axis."
        )
    band = _scalar(path, "band", arrays["band"]) if "band" in arrays else None
    if band is not None and not (0 < band < np.inf):
        raise ValueError(f"{path}: band is {band}; allowed: above 0, in voxels.")
    index, sdf = arrays["sparse_index"], arrays["sparse_sdf"]
    if index.ndim != 2 or index.shape[1] != 3 or index.dtype.kind not in "iu":
        raise ValueError(f"{path}: sparse_index is {index.dtype} {list(index.shape)}; allowed: whole numbers [N, 3].")
    if sdf.shape not in ((len(index), 1), (len(index),)) or sdf.dtype.kind != "f":
        raise ValueError(
            f"{path}: sparse_sdf is {sdf.dtype} {list(sdf.shape)} beside {len(index)} rows of sparse_index; allowed: "
            f"floats [{len(index)}, 1]."
        )
    if not len(index):
        raise ValueError(f"{path} holds no voxel. Its mesh may be empty or lie outside the cube; make it again.")
    return _sorted(path, index, sdf.reshape(-1).astype(np.float32), int(resolution), band)


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist.")
    needed = ("sparse_sdf", "sparse_index", "resolution")
    try:
        # opened as a zip first: any other file np.load would take for an .npy or a pickle
        with NUMPY_HEADERS, zipfile.ZipFile(path), np.load(path, allow_pickle=False) as archive:
            names = archive.files
            lacking = [name for name in needed if name not in names]
            if not lacking:
                return {name: archive[name] for name in (*needed, *(["band"] if "band" in names else []))}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"{path} cannot be read as .npz ({error}). It may be truncated or hold Python objects, which are not "
            "executed; copy or write it again as plain arrays."
        ) from error
    raise ValueError(
        f"{path} lacks {', '.join(lacking)}; it has {', '.join(names) or 'none'}. Needed: {', '.join(needed)}."
    )


def _scalar(path: Path, name: str, array: np.ndarray) -> float:
    if array.size != 1 or array.dtype.kind not in "iuf":
        raise ValueError(f"{path}: {name} is {array.dtype} {list(array.shape)}; allowed: one number.")
    return float(array.reshape(()))


def _sorted(path: Path, index: np.ndarray, sdf: np.ndarray, resolution: int, band: float | None) -> StoredSdf:
    wrong = ((index < 0) | (index >= resolution)).any(1)
    if wrong.any():
        row = int(wrong.argmax())
        raise ValueError(
            f"{path}: row {row} of sparse_index is {index[row].tolist()} ({int(wrong.sum())} such rows); allowed: 0 to "
            f"{resolution - 1} at its resolution of {resolution}."
        )
    wrong = ~(np.abs(sdf) <= 1)
    if wrong.any():
        row = int(wrong.argmax())
        raise ValueError(
            f"{path}: row {row} of sparse_sdf is {sdf[row]} ({int(wrong.sum())} such rows); allowed: -1 to 1, the "
            "distance over the band. Drop or clamp what is beyond."
        )
    coords = index.astype(np.int64)
    key = (coords[:, 0] * resolution + coords[:, 1]) * resolution + coords[:, 2]
    if (np.diff(key) <= 0).any():
        order = np.argsort(key, kind="stable")
        key, coords, sdf = key[order], coords[order], sdf[order]
        twice = np.diff(key) == 0
        if twice.any():
            raise ValueError(
                f"{path}: sparse_index has {coords[int(twice.argmax())].tolist()} twice ({int(twice.sum())} such "
                "rows); allowed: every voxel once. Drop the doubles."
            )
    return StoredSdf(torch.from_numpy(coords.astype(np.int32)), torch.from_numpy(sdf), resolution, band)
