"""Truncated signed distance of a mesh at the grid points near its surface, in memory in proportion to them."""

import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
import warp as wp
from jaxtyping import Bool, Float, Float32, Int32, Int64
from torch import Tensor

from lightning_modules.functional.kernels.launch import launch
from lightning_modules.functional.kernels.mesh_distance import near_children, winding_signs
from lightning_modules.functional.sdf_vqvae.meshes import (
    TriangleMesh,
    check_mesh,
    is_closed,
    is_consistently_wound,
    merge_vertices,
    without_zero_area_faces,
)

Sign = Literal["auto", "parity", "winding", "unsigned"]

_ROOTS = 8  # cells of the octree's first level along an axis
_CHUNK = 1 << 22  # grid points, or crossings, looked at together


@torch.no_grad()
def sparse_sdf(
    mesh: TriangleMesh, resolution: int, band: float = 4.0, sign: Sign = "auto"
) -> tuple[Int32[Tensor, "voxels 3"], Float32[Tensor, " voxels"]]:
    """Measures the signed distance of a mesh at all grid points within a band around its surface.

    Grid point i lies at ``2 * i / (resolution - 1) - 1``, where Direct3D-S2 samples its unsigned distances, too. An
    octree descends to the points: a cell is kept if the distance at its centre is at most the band plus half its
    diagonal, which loses no point, because a distance changes no faster than the place. Warp's bounding volume
    hierarchy finds the nearest faces; it passes over slivers thinner than about a millionth of their length.

    The sign of a closed mesh (each edge has an even number of faces, once vertices are merged) comes from counting the
    faces below each grid point, on lines that, where two faces join, meet exactly one of them. An open mesh has no
    inside; its winding number (Barill et al. 2018), above a half, is the best guess at one. The normal of the nearest
    face is never asked: it is wrong beside edges.

    Args:
        mesh: In the cube [-1, 1]^3 (:func:`~lightning_modules.functional.sdf_vqvae.meshes.normalised`), on the device
            to compute on.
        resolution: Grid points along each axis of the cube.
        band: Width on each side of the surface, in steps of the grid; marching cubes needs at least sqrt(3).
        sign: ``parity``: inside is where a line to the outside crosses an odd number of faces; closed meshes only,
            wound in any way; where two bodies of one mesh overlap is outside. ``winding``: inside is where the winding
            number is above a half; overlapping bodies join. ``auto``: parity if the mesh is closed, else winding.
            ``unsigned``: the distance is positive on both sides.

    Returns:
        Grid points in the order of their key ``(x * R + y) * R + z``, and distance over band, -1 (inside) to 1.

    Raises:
        ValueError: If the mesh is empty, has vertices that are not finite, missing or outside the cube, if it is open
            and the sign is to come from parity, or if a setting is out of range.
    """
    if resolution < 2:
        raise ValueError(f"resolution must be 2 or more, got {resolution}; shapes are usually sampled at 64 to 1024.")
    if not 0 < band < resolution:
        raise ValueError(f"band must be above 0 and below the resolution, got {band}; the default is 4.")
    if sign not in ("auto", "parity", "winding", "unsigned"):
        raise ValueError(f"sign must be auto, parity, winding or unsigned, got {sign!r}.")
    check_mesh(mesh)
    surface = merge_vertices(TriangleMesh(mesh.vertices.float(), mesh.faces))
    with_area, _ = without_zero_area_faces(surface)
    if len(with_area.faces) == 0:
        raise ValueError(f"All {len(mesh.faces)} faces are segments or points; the mesh needs faces with an area.")
    farthest = float(surface.vertices.abs().max())
    if farthest > 1:
        raise ValueError(
            f"The mesh reaches to {farthest:g}, out of the cube from -1 to 1. Move it there first, for example with "
            "lightning_modules.functional.sdf_vqvae.meshes.normalised()."
        )
    closed = is_closed(surface)
    if sign == "parity" and not closed:
        raise ValueError(
            "The mesh is open, so it has no inside that parity could tell. Close its holes, or choose the sign "
            "'winding' (a guess) or 'unsigned'."
        )
    by_lines = closed if sign in ("auto", "parity") else sign == "winding" and is_consistently_wound(surface)
    by_winding = sign in ("auto", "winding") and not by_lines

    hierarchy = build_hierarchy(with_area, by_winding)
    step = 2 / (resolution - 1)
    chunks = list(_points_within(hierarchy, resolution, band * step, mesh.vertices.device))
    keys = torch.cat([keys for keys, _ in chunks])
    distances = torch.cat([distances for _, distances in chunks])
    del chunks
    x, yz = keys // resolution**2, keys % resolution**2
    coords = torch.stack([x, yz // resolution, yz % resolution], dim=1).int()
    if by_lines:
        distances = torch.where(_inside(surface, keys, resolution, sign == "winding"), -distances, distances)
    elif by_winding:
        launch(winding_signs, len(keys), [hierarchy.id, coords, resolution, distances], mesh.vertices.device)
        if distances.device.type == "cuda":
            torch.cuda.current_stream(distances.device).synchronize()  # the hierarchy must outlive the kernel
    return coords, (distances / (band * step)).clamp_(-1, 1)


def build_hierarchy(mesh: TriangleMesh, for_winding_numbers: bool = False) -> wp.Mesh:
    """Sorts the faces into Warp's boxes, to find near ones fast; on CUDA, on torch's current stream."""
    device = mesh.vertices.device
    wp.init()
    vertices: Any = wp.from_torch(mesh.vertices.detach().float().contiguous(), dtype=wp.vec3)
    indices: Any = wp.from_torch(mesh.faces.int().flatten())
    if device.type == "cuda":
        with wp.ScopedStream(wp.stream_from_torch(torch.cuda.current_stream(device)), sync_enter=False):
            return wp.Mesh(vertices, indices, support_winding_number=for_winding_numbers)
    return wp.Mesh(vertices, indices, support_winding_number=for_winding_numbers)


def _points_within(
    hierarchy: wp.Mesh, resolution: int, reach: float, device: torch.device
) -> Iterator[tuple[Int64[Tensor, " voxels"], Float32[Tensor, " voxels"]]]:
    """Yields the sorted keys and the distances of the grid points within reach, slab by slab along x."""
    size = 1
    while size * _ROOTS < resolution:
        size *= 2
    along_axis = torch.arange(0, resolution, 2 * size, dtype=torch.int32, device=device)
    cells = torch.cartesian_prod(along_axis, along_axis, along_axis)
    distances = torch.full((len(cells),), torch.inf, device=device)
    while size > 1:
        cells, distances = _near_children(hierarchy, cells, distances, size, resolution, reach)
        size //= 2
    x, y, z = cells.long().unbind(1)
    order = ((x * resolution + y) * resolution + z).argsort()
    cells, distances = cells[order], distances[order]
    columns = cells[:, 0].contiguous()
    num_slabs = 8 * len(cells) // _CHUNK + 1
    bounds = columns[torch.arange(1, num_slabs, device=device) * len(cells) // num_slabs]
    starts = [0, *torch.searchsorted(columns, bounds).unique().tolist()]
    for start, stop in zip(starts, [*starts[1:], len(cells)], strict=True):
        points, of_points = _near_children(hierarchy, cells[start:stop], distances[start:stop], 1, resolution, reach)
        x, y, z = points.long().unbind(1)
        keys, order = ((x * resolution + y) * resolution + z).sort()
        yield keys, of_points[order]


def _near_children(
    hierarchy: wp.Mesh,
    cells: Int32[Tensor, "cells 3"],
    cell_distances: Float32[Tensor, " cells"],
    size: int,
    resolution: int,
    reach: float,
) -> tuple[Int32[Tensor, "children 3"], Float32[Tensor, " children"]]:
    """Returns the children of cells that may hold points within reach, and the distances of their centres."""
    limit = reach + math.sqrt(3) * (size - 1) / (resolution - 1)  # the centre of its points to the farthest of them
    distances = torch.full((len(cells), 8), torch.inf, device=cells.device)
    launch(
        near_children,
        len(cells),
        [hierarchy.id, cells, cell_distances, size, resolution, limit, distances],
        cells.device,
    )
    parent, child = (distances <= limit).nonzero().unbind(1)
    offset = torch.stack([child >> 2, (child >> 1) & 1, child & 1], dim=1).int() * size
    return cells[parent] + offset, distances[parent, child]


def _inside(
    mesh: TriangleMesh, keys: Int64[Tensor, " voxels"], resolution: int, by_winding: bool
) -> Bool[Tensor, " voxels"]:
    """Counts the faces below each grid point, on the lines along z on which the points lie."""
    crossings, turns = _crossings(mesh, resolution)
    num_below = torch.searchsorted(crossings, keys, right=True)  # those of earlier lines are even and add up to 0
    if not by_winding:
        return num_below % 2 == 1
    winding = torch.nn.functional.pad(turns.cumsum(0), (1, 0))
    return winding[num_below] > 0


def _crossings(mesh: TriangleMesh, resolution: int) -> tuple[Int64[Tensor, " crossings"], Int64[Tensor, " crossings"]]:
    """Finds where the grid's lines along z meet a closed mesh.

    Faces are cut at each x of the grid into segments, and those at each y into points. An edge is cut if one end lies
    at or below, the other above, and its point is computed from its ends in the order of their numbers: all faces of
    the edge have the same point, to the last bit. So a line meets an even number of faces, however it passes.

    Returns:
        Sorted keys of the first grid points at or above each crossing, and 1 where the line goes inside, -1 where it
        comes out.
    """
    vertices = (mesh.vertices.double() + 1) * ((resolution - 1) / 2)
    faces = mesh.faces.long()
    corner_x = vertices[:, 0][faces]
    first = corner_x.amin(dim=1).ceil().long()
    num_cuts = corner_x.amax(dim=1).ceil().long() - first
    areas = torch.linalg.cross(*vertices[faces].diff(dim=1).unbind(1))[:, 2].abs() / 2
    work = (num_cuts + areas.long()).cumsum(0)
    num_chunks = int(work[-1]) // _CHUNK + 1
    targets = torch.arange(1, num_chunks, device=work.device) * (work[-1] // num_chunks)
    starts = [0, *torch.searchsorted(work, targets).tolist()]
    chunks = [
        _crossings_of_faces(vertices, faces[start:stop], first[start:stop], num_cuts[start:stop], resolution)
        for start, stop in zip(starts, [*starts[1:], len(faces)], strict=True)
    ]
    keys, order = torch.cat([keys for keys, _ in chunks]).sort()
    return keys, torch.cat([turns for _, turns in chunks])[order]


def _crossings_of_faces(
    vertices: Float[Tensor, "vertices 3"],
    faces: Int64[Tensor, "faces 3"],
    first: Int64[Tensor, " faces"],
    num_cuts: Int64[Tensor, " faces"],
    resolution: int,
) -> tuple[Int64[Tensor, " crossings"], Int64[Tensor, " crossings"]]:
    face, x = _expand(first, num_cuts)
    is_below = vertices[:, 0][faces[face]] <= x[:, None]
    # The corner that is alone on its side of the plane: two edges start there.
    is_low = is_below.sum(dim=1) == 1
    alone = (is_below == is_low[:, None]).long().argmax(dim=1, keepdim=True)
    tip, after, before = (faces[face].gather(1, (alone + turn) % 3)[:, 0] for turn in range(3))
    first_y, first_z = _cut(vertices, tip, after, x)
    last_y, last_z = _cut(vertices, tip, before, x)

    lowest = torch.minimum(first_y, last_y).ceil().long()
    segment, y = _expand(lowest, torch.maximum(first_y, last_y).ceil().long() - lowest)
    from_y, from_z, to_y, to_z = (end[segment] for end in (first_y, first_z, last_y, last_z))
    z = from_z + (y - from_y) / (to_y - from_y) * (to_z - from_z)
    z = torch.minimum(torch.maximum(z, torch.minimum(from_z, to_z)), torch.maximum(from_z, to_z))
    keys = (x[segment] * resolution + y) * resolution + z.ceil().long()
    turns = torch.where((from_y <= y) == is_low[segment], -1, 1)
    return keys, turns


def _cut(
    vertices: Float[Tensor, "vertices 3"],
    one: Int64[Tensor, " edges"],
    other: Int64[Tensor, " edges"],
    x: Int64[Tensor, " edges"],
) -> tuple[Float[Tensor, " edges"], Float[Tensor, " edges"]]:
    """Where edges meet planes of constant x: their y and z, which do not depend on the direction of the edge."""
    lower, upper = vertices[torch.minimum(one, other)], vertices[torch.maximum(one, other)]
    along = (x - lower[:, 0]) / (upper[:, 0] - lower[:, 0])
    y, z = (lower[:, 1:] + along[:, None] * (upper[:, 1:] - lower[:, 1:])).unbind(1)
    return y, z


def _expand(
    first: Int64[Tensor, " rows"], counts: Int64[Tensor, " rows"]
) -> tuple[Int64[Tensor, " items"], Int64[Tensor, " items"]]:
    """Lists the numbers ``first`` to ``first + counts - 1`` of each row, and the row of each."""
    rows = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
    begins = counts.cumsum(0) - counts
    return rows, first[rows] + torch.arange(len(rows), device=counts.device) - begins[rows]
