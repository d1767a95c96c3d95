"""Which points of the whole grid are inside, from the signs that are known near the surface."""

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

SLAB = 16
"""Layers of the grid that are worked on at a time: bounds the memory beside the grid itself."""


def inside_grid(
    coords: Int[Tensor, "voxels 3"], sdf: Float[Tensor, " voxels"], resolution: int
) -> Bool[Tensor, "resolution resolution resolution"]:
    """Returns, for every point of the grid, whether it is inside; on the CPU.

    A point with a distance is inside where that is negative. Another one asks along the six axis directions for the
    sign of the first point that has one; a ray that leaves the grid says outside; four of six decide for inside. For a
    band without gaps the six agree, since a sign cannot change where no point is known. Where a band has holes, as a
    decoded one may, the rays that pass through them are outvoted.
    """
    known = np.zeros((resolution,) * 3, np.int8)  # 0 unknown, 1 outside, 2 inside
    x, y, z = coords.cpu().long().numpy().T
    known[x, y, z] = 1 + (sdf.detach().cpu().numpy() < 0)
    votes = np.zeros_like(known)
    for axis, across in ((0, 1), (1, 0), (2, 0)):
        for start in range(0, resolution, SLAB):
            part = [slice(None)] * 3
            part[across] = slice(start, start + SLAB)
            layers = np.moveaxis(known[tuple(part)], axis, 0)
            ballots = np.moveaxis(votes[tuple(part)], axis, 0)
            ballots += _first_is_inside(layers)
            ballots += _first_is_inside(layers[::-1])[::-1]
    return torch.from_numpy(np.where(known > 0, known == 2, votes >= 4))


def _first_is_inside(known: np.ndarray) -> np.ndarray:
    """Returns whether the last point known, going along the first axis, was inside."""
    positions = np.arange(2, 2 * len(known) + 2, 2, dtype=np.int16)[:, None, None]
    key = np.where(known > 0, positions + (known == 2), 0).astype(np.int16)
    return (np.maximum.accumulate(key, axis=0) & 1).astype(np.int8)


def sign_iou(
    inside: Bool[Tensor, "resolution resolution resolution"], truth: Bool[Tensor, "resolution resolution resolution"]
) -> float:
    """Returns the intersection over the union of two insides; 1 where both are empty."""
    union = int((inside | truth).sum())
    return int((inside & truth).sum()) / union if union else 1.0
