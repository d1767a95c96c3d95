"""Which decoded voxel is which true voxel: by structure, and by search as the reference."""

import torch
from jaxtyping import Int, Int64
from torch import Tensor

from lightning_modules.functional.sdf_vqvae.neighbour_maps import voxel_keys


@torch.no_grad()
def decoded_rows(
    ancestor_rows: Int64[Tensor, " voxels"], coords: Int[Tensor, "voxels 4"], levels: int
) -> Int64[Tensor, " voxels"]:
    """Returns the row of each voxel among all descendants of the latents, which a decoder that prunes nothing emits.

    Each subdivision puts the children of row p at 8 p + octant, so after k of them the row is that of the ancestor
    times 8^k plus the interleaved low bits of the coordinates, the coarse octant first. Nothing is searched.

    Args:
        ancestor_rows: Row of the latent that holds each voxel, as the encoder's downsampling found it.
        coords: Rows (shape, x, y, z).
        levels: Subdivisions between latents and voxels, k; at most 4.
    """
    # Of each axis the k low bits pick an entry that has them at every third place.
    size = 1 << levels
    spread = torch.zeros(size, dtype=torch.int64, device=coords.device)
    numbers = torch.arange(size, device=coords.device)
    for bit in range(levels):
        spread |= ((numbers >> bit) & 1) << (3 * bit)
    table = (spread[:, None, None] * 4 + spread[:, None] * 2 + spread).flatten()
    low = coords[:, 1:] & (size - 1)
    picked = ((low[:, 0] << levels) | low[:, 1]) << levels | low[:, 2]
    return torch.add(table[picked.long()], ancestor_rows, alpha=1 << (3 * levels))


@torch.no_grad()
def searched_rows(
    coords: Int[Tensor, "voxels 4"], among: Int[Tensor, "others 4"], resolution: int
) -> Int64[Tensor, " voxels"]:
    """Returns the row of each voxel among others in any order, -1 where it is not there: the reference, by search.

    Args:
        coords: Rows (shape, x, y, z).
        among: Distinct rows (shape, x, y, z).
        resolution: Of the grid of both.
    """
    if len(among) == 0:
        return torch.full((len(coords),), -1, device=coords.device)
    keys, order = voxel_keys(among, resolution).sort()
    wanted = voxel_keys(coords, resolution)
    position = torch.searchsorted(keys, wanted).clamp_max(len(keys) - 1)
    return torch.where(keys[position] == wanted, order[position], -1)
