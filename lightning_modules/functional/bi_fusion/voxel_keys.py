"""Voxels as numbers: one integer for the cube that a point falls in."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

BITS = 21  # per axis; three of them fit a positive int64
REACH = 1 << (BITS - 1)  # voxels on either side of the origin


def voxel_keys(points: Float[Tensor, "points 3"], voxel_size: float) -> Int[Tensor, " points"]:
    """Returns the key of each point's voxel; keys sort by x, then y, then z.

    Args:
        points: World coordinates, metres.
        voxel_size: Width of a voxel, metres.

    Raises:
        ValueError: If a point is not finite or lies beyond 2^20 voxels from the origin.
    """
    cells = torch.floor(points.double() / voxel_size)
    if not bool((cells.abs() < REACH).all()):  # NaN is not less, either
        worst = points[(~(cells.abs() < REACH)).any(dim=1)][0].tolist()
        raise ValueError(
            f"The point {worst} is not finite or more than {REACH * voxel_size:g} m from the origin, the reach of "
            f"voxels of {voxel_size:g} m. Leave such points out, or use larger voxels."
        )
    x, y, z = (cells.long() + REACH).unbind(-1)
    return (x << 2 * BITS) | (y << BITS) | z


def voxel_centres(keys: Int[Tensor, " voxels"], voxel_size: float) -> Float[Tensor, "voxels 3"]:
    """Returns the middle of each voxel, metres, float32; the way back from :func:`voxel_keys`."""
    mask = (1 << BITS) - 1
    cells = torch.stack([(keys >> 2 * BITS) & mask, (keys >> BITS) & mask, keys & mask], dim=-1) - REACH
    return ((cells.double() + 0.5) * voxel_size).float()


def find_keys(keys: Int[Tensor, " voxels"], wanted: Int[Tensor, " wanted"]) -> Int[Tensor, " wanted"]:
    """Returns where each wanted key stands among sorted ones, or -1."""
    if len(keys) == 0:
        return torch.full_like(wanted, -1)
    places = torch.searchsorted(keys, wanted.contiguous()).clamp_(max=len(keys) - 1)
    return torch.where(keys[places] == wanted, places, -1)
