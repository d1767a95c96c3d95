"""Crops of a sparse grid along the borders of latent cells.

A crop holds every voxel of its cells: a network with submanifold convolutions sees in it what it sees in the whole,
up to its rim. Random points instead would tear the band apart.
"""

import torch
from jaxtyping import Bool, Int
from torch import Tensor


def latent_crop(
    coords: Int[Tensor, "voxels 3"], resolution: int, down_factor: int, cells: int, generator: torch.Generator
) -> Bool[Tensor, " voxels"]:
    """Draws a box of ``cells`` latent cells along each axis that holds at least one voxel; returns which lie in it.

    A voxel is drawn, then a box around its cell, within the grid.

    Args:
        coords: Grid points, at least one.
        resolution: Grid points along each axis, a multiple of ``down_factor``.
        down_factor: Grid points of a latent cell along each axis.
        cells: Latent cells of the box along each axis; as many as the grid has, or more, is the whole.
        generator: Of the CPU; all randomness.
    """
    last = resolution // down_factor - cells
    if last <= 0:
        return torch.ones(len(coords), dtype=torch.bool, device=coords.device)
    chosen = int(torch.randint(len(coords), (1,), generator=generator))
    cell = coords[chosen].cpu() // down_factor
    lowest, highest = (cell - cells + 1).clamp(min=0), cell.clamp(max=last)
    share = torch.rand(3, generator=generator)
    first = lowest + (share * (highest - lowest + 1)).int()
    first = torch.minimum(first, highest).to(coords.device)  # a share that rounds up to 1
    own = coords // down_factor
    return ((own >= first) & (own < first + cells)).all(1)


def largest_latent_crop(coords: Int[Tensor, "voxels 3"], resolution: int, down_factor: int, cells: int) -> int:
    """Returns how many voxels the fullest box of ``cells`` latent cells along each axis holds."""
    size = resolution // down_factor
    if cells >= size:
        return len(coords)
    x, y, z = (coords // down_factor).long().unbind(1)
    counts = torch.bincount((x * size + y) * size + z, minlength=size**3).view(size, size, size)
    for axis in range(3):
        total = counts.cumsum(axis)
        upper = total.narrow(axis, cells - 1, size - cells + 1)
        counts = upper.clone()
        counts.narrow(axis, 1, size - cells).sub_(total.narrow(axis, 0, size - cells))
    return int(counts.max())
