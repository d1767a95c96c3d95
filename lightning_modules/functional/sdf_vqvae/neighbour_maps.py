"""Which voxel lies where: keys, neighbours, parents and children of sparse voxels, by sorting and searching."""

import torch
from jaxtyping import Bool, Int, Int32, Int64
from torch import Tensor

NUM_OFFSETS = 27  # of a kernel of 3 x 3 x 3, (dx, dy, dz) in lexicographic order; the mirror image of k is 26 - k


def voxel_keys(coords: Int[Tensor, "voxels 4"], resolution: int) -> Int64[Tensor, " voxels"]:
    """Numbers the voxels so that keys rise with (shape, x, y, z).

    The grid has a border of one empty voxel, so that the key of a neighbour outside the grid is nobody's.

    Args:
        coords: Rows (shape, x, y, z), each of x, y, z in 0 to ``resolution - 1``.
        resolution: Voxels along an edge of the grid.
    """
    shape, x, y, z = coords.unbind(1)
    return _keys(shape, x, y, z, resolution)


def _keys(shape: Tensor, x: Tensor, y: Tensor, z: Tensor, resolution: int) -> Int64[Tensor, " voxels"]:
    side = resolution + 2
    keys = shape.long()
    for axis in (x, y, z):
        keys = torch.add(axis, keys, alpha=side)
    return keys.add_((side + 1) * side + 1)  # the border before each axis


def key_coords(keys: Int64[Tensor, " voxels"], resolution: int) -> Int32[Tensor, "voxels 4"]:
    """Returns the rows (shape, x, y, z) of which these are the keys."""
    side = resolution + 2
    columns = keys.div(side, rounding_mode="floor")
    slices = columns.div(side, rounding_mode="floor")
    shapes = slices.div(side, rounding_mode="floor")
    coords = (shapes, slices - shapes * side - 1, columns - slices * side - 1, keys - columns * side - 1)
    return torch.stack([axis.int() for axis in coords], dim=1)


@torch.no_grad()
def neighbour_map(
    keys: Int64[Tensor, " voxels"], resolution: int, *, is_sorted: bool = False
) -> Int32[Tensor, "voxels 27"]:
    """Lists the row of each of the 27 neighbours of each voxel; N, one past the last row, where there is none.

    Keys are sorted once. Neighbours in a column of three lie next to each other in sorted order, so one search finds
    the column; the map is symmetric, so 4 searches and the voxel's own column give all 9.

    Args:
        keys: Of distinct voxels, by :func:`voxel_keys`.
        resolution: Voxels along an edge of the grid.
        is_sorted: Promises that the keys rise.

    Returns:
        Column ``9 (dx + 1) + 3 (dy + 1) + (dz + 1)`` holds the row of the voxel at (x + dx, y + dy, z + dz).
    """
    num_voxels, side = len(keys), resolution + 2
    order = None
    if not is_sorted:
        keys, order = keys.sort()
    rows = torch.arange(num_voxels, dtype=torch.int32, device=keys.device)
    # One more voxel takes what is to be written for neighbours that are not there.
    neighbours = rows.new_full((NUM_OFFSETS, num_voxels + 1), num_voxels)
    neighbours[13, :num_voxels] = rows
    occupied = torch.cat([keys, keys.new_full((2,), -1)])
    for dx, dy, from_dz in ((0, 0, 1), (0, 1, -1), (1, -1, -1), (1, 0, -1), (1, 1, -1)):
        wanted = keys + ((dx * side + dy) * side + from_dz)
        position = torch.searchsorted(keys, wanted) if from_dz < 0 else rows.long() + 1
        for dz in range(from_dz, 2):
            found = occupied[position] == wanted
            offset = 9 * (dx + 1) + 3 * (dy + 1) + dz + 1
            partner = torch.where(found, position, num_voxels)
            neighbours[offset, :num_voxels] = partner
            neighbours[26 - offset].scatter_(0, partner, rows)
            position, wanted = position + found, wanted + 1
    neighbours = neighbours[:, :num_voxels].t().contiguous()
    if order is None:
        return neighbours
    numbers = torch.cat([order.int(), order.new_tensor([num_voxels], dtype=torch.int32)])
    return torch.empty_like(neighbours).index_copy_(0, order, numbers[neighbours.long()])


def octants(coords: Int[Tensor, "voxels 4"]) -> Int64[Tensor, " voxels"]:
    """Returns which child of its parent each voxel is, 0 to 7: the lowest bits of (x, y, z), z fastest."""
    low = coords[:, 1:].long() & 1
    return (low[:, 0] * 2 + low[:, 1]) * 2 + low[:, 2]


def child_coords(coords: Int32[Tensor, "parents 4"]) -> Int32[Tensor, "parents 8 4"]:
    """Returns the eight children of each voxel on the grid of twice the resolution, in the order of the octants."""
    octant = torch.arange(8, dtype=torch.int32, device=coords.device)
    low = torch.stack([torch.zeros_like(octant), octant >> 2, (octant >> 1) & 1, octant & 1], dim=1)
    doubled = torch.cat([coords[:, :1], coords[:, 1:] * 2], dim=1)
    return doubled[:, None] + low


@torch.no_grad()
def parent_rows(
    coords: Int[Tensor, "voxels 4"], resolution: int
) -> tuple[Int32[Tensor, "parents 4"], Int64[Tensor, " voxels"]]:
    """Halves the grid: the voxels of half the resolution that hold some of these, and the row of each one's parent.

    Args:
        coords: Rows (shape, x, y, z), in any order; fastest where siblings along z follow each other.
        resolution: Even.

    Returns:
        Parents sorted by key, and each voxel's row among them.
    """
    shape, x, y, z = coords.unbind(1)
    # Sorting takes most of the time, so siblings in a row are joined before.
    runs, run = _keys(shape, x >> 1, y >> 1, z >> 1, resolution // 2).unique_consecutive(return_inverse=True)
    parents, rows = runs.unique(return_inverse=True)
    return key_coords(parents, resolution // 2), rows[run]


def child_occupancy(
    rows: Int64[Tensor, " voxels"], octant: Int64[Tensor, " voxels"], num_parents: int
) -> Bool[Tensor, "parents 8"]:
    """Returns which of the eight children of each parent there are.

    Args:
        rows: Each child's parent.
        octant: Which of its children it is.
        num_parents: Of the grid of half the resolution.
    """
    occupancy = torch.zeros(num_parents * 8, dtype=torch.bool, device=rows.device)
    occupancy[rows * 8 + octant] = True
    return occupancy.view(num_parents, 8)
