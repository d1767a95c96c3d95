"""The per-mask features of LangSplat's preprocessing: ``<stem>_f.npy`` and ``<stem>_s.npy``.

``_f``: float32 [M, C], one unit CLIP feature per mask, the masks of the levels default, s, m, l one after another.
``_s``: float32 or integer [4, H, W], for each level the row of ``_f`` a pixel belongs to, -1 where to none.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from datamodules.readers.atomic_files import load_array, save_array, whole_array

NUM_GRANULARITIES = 4
_ALLOWED_LENGTH_ERROR = 5e-3  # fp16 features, as LangSplat stores them, are off by up to 1e-3


class LanguageFeatures(NamedTuple):
    """The masks of one photograph at four granularities: default, s, m, l.

    Attributes:
        features: [M, C] float32 unit features.
        mask_ids: [4, H, W] int32 rows of ``features``, -1 = no mask.
        level_offsets: Five rows; level j owns the rows ``level_offsets[j]`` up to ``level_offsets[j + 1]``.
    """

    features: Float[Tensor, "masks channels"]
    mask_ids: Int[Tensor, "4 height width"]
    level_offsets: tuple[int, ...]

    def of_levels(
        self, levels: Sequence[int]
    ) -> tuple[Float[Tensor, "some channels"], Int[Tensor, "levels height width"]]:
        """Returns the features and maps of some levels, with rows numbered anew; [sum M_l, C] and int32 [L, H, W]."""
        parts, maps, start = [], [], 0
        for level in levels:
            first, last = self.level_offsets[level], self.level_offsets[level + 1]
            ids = self.mask_ids[level]
            maps.append(torch.where(ids < 0, ids, ids - first + start))
            parts.append(self.features[first:last])
            start += last - first
        return torch.cat(parts), torch.stack(maps)


def read_language_features(folder: str | Path, stem: str) -> LanguageFeatures:
    """Reads and checks the two files of a photograph. Features off unit length by no more than fp16 are made unit.

    Raises:
        FileNotFoundError: If one of the files is absent.
        ValueError: If one is truncated, of the wrong shape or type, holds NaN, or the map points outside the features.
    """
    features_path, map_path = (Path(folder) / f"{stem}_{letter}.npy" for letter in "fs")
    features = _checked_features(features_path, load_array(features_path))
    return _checked_maps(features_path, features, map_path, load_array(map_path))


def _checked_features(path: Path, features: np.ndarray) -> np.ndarray:
    remedy = "Run the preprocessing of this photo again."
    if features.ndim != 2 or features.dtype not in (np.float16, np.float32, np.float64):
        raise ValueError(
            f"{path}: features are {features.dtype} {list(features.shape)}; allowed: float32 or float16 [masks, "
            f"channels]. {remedy}"
        )
    features = features.astype(np.float32)
    finite = np.isfinite(features).all(axis=1)
    if not finite.all():
        raise ValueError(
            f"{path}: {int((~finite).sum())} of {len(features)} features hold NaN or infinity (first: row "
            f"{int((~finite).argmax())}); allowed: finite numbers. {remedy}"
        )
    lengths = np.linalg.norm(features, axis=1)
    off = np.abs(lengths - 1) > _ALLOWED_LENGTH_ERROR
    if off.any():
        row = int(off.argmax())
        raise ValueError(
            f"{path}: {int(off.sum())} of {len(features)} features are not of unit length (row {row}: "
            f"{lengths[row]:.4f}); allowed: 1 within {_ALLOWED_LENGTH_ERROR}. Divide them by their length, or run "
            "the preprocessing of this photo again."
        )
    return features / lengths[:, None]


def _checked_maps(features_path: Path, features: np.ndarray, path: Path, maps: np.ndarray) -> LanguageFeatures:
    remedy = "Run the preprocessing of this photo again."
    if maps.ndim != 3 or maps.shape[0] != NUM_GRANULARITIES or 0 in maps.shape or maps.dtype.kind not in "iuf":
        raise ValueError(
            f"{path}: the mask map is {maps.dtype} {list(maps.shape)}; allowed: numbers [4, height, width] with the "
            f"levels default, s, m, l. {remedy}"
        )
    if maps.dtype.kind == "f" and (maps != np.round(maps)).any():  # NaN differs from itself
        raise ValueError(f"{path}: the mask map holds NaN or fractions; allowed: whole numbers from -1. {remedy}")
    low, high = maps.min(), maps.max()
    if low < -1 or high >= len(features):
        raise ValueError(
            f"{path}: the mask map holds rows {int(low)} to {int(high)}; allowed: -1 to {len(features) - 1}, as "
            f"{features_path} has {len(features)} features. The two files may be of different runs. {remedy}"
        )
    offsets = [0]
    for level, channel in enumerate(maps):
        inside = channel[channel >= 0]
        if inside.size and inside.min() < offsets[-1]:
            raise ValueError(
                f"{path}: level {level} uses row {int(inside.min())}, which belongs to an earlier level; allowed: rows "
                f"from {offsets[-1]}, as the levels' features follow one another. {remedy}"
            )
        offsets.append(int(inside.max()) + 1 if inside.size else offsets[-1])
    mask_ids = torch.from_numpy(maps.astype(np.int32))
    return LanguageFeatures(torch.from_numpy(features), mask_ids, tuple(offsets))


def write_language_features(
    folder: str | Path, stem: str, features_per_level: Sequence[np.ndarray], maps: Int[np.ndarray, "4 height width"]
) -> None:
    """Writes the two files of a photograph as LangSplat's preprocessing does (both float32).

    The map goes first and comes last: where there is one, its features are those of the same run.

    Args:
        folder: Usually ``<root>/language_features``.
        stem: Stem of the photograph.
        features_per_level: Four arrays [M_l, C] of unit features.
        maps: [4, H, W] rows within each level's own features, -1 = no mask.
    """
    counts = [len(features) for features in features_per_level]
    if len(counts) != NUM_GRANULARITIES or any(ids.max() >= count for ids, count in zip(maps, counts, strict=True)):
        raise ValueError(
            f"{stem}: {counts} features per level for maps with rows up to {[int(ids.max()) for ids in maps]}; allowed"
            ": four levels, rows below the number of features."
        )
    offsets = np.cumsum([0, *counts[:-1]], dtype=np.int64)
    global_ids = np.where(maps < 0, -1, maps + offsets[:, None, None])
    features = np.concatenate([np.asarray(features, np.float32) for features in features_per_level])
    features_path, map_path = (Path(folder) / f"{stem}_{letter}.npy" for letter in "fs")
    map_path.unlink(missing_ok=True)
    save_array(features_path, features)
    save_array(map_path, global_ids.astype(np.float32))


def is_whole(folder: str | Path, stem: str, width: int, height: int) -> bool:
    """Whether both files of a photograph are there, complete, and of its size; their numbers are not read."""
    features, maps = (whole_array(Path(folder) / f"{stem}_{letter}.npy") for letter in "fs")
    return features is not None and len(features[0]) == 2 and maps is not None and maps[0] == (4, height, width)
