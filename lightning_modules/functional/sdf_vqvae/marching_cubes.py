"""Marching cubes on the grid points that are there: no dense grid, and no surface where the data end.

Lorensen and Cline 1987, with a table of triangles that is derived here (:func:`triangle_table`) such that neighbouring
cells agree on every face that they share.
"""

from functools import lru_cache
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, Int32, Int64, UInt8
from torch import Tensor

from lightning_modules.functional.sdf_vqvae.meshes import TriangleMesh

CORNERS = tuple(product((0, 1), repeat=3))
"""Offsets x, y, z of a cell's corners; corner c has the bits of c, x first."""

EDGES = tuple((c, axis) for c, corner in enumerate(CORNERS) for axis in range(3) if corner[axis] == 0)
"""The twelve edges of a cell: lower corner, and the axis along which the edge runs."""

_CLOSEST = 1e-4  # part of an edge that a vertex keeps from its ends, so that no triangle collapses


@torch.no_grad()
def marching_cubes(
    coords: Int[Tensor, "voxels 3"], sdf: Float[Tensor, " voxels"], resolution: int, level: float = 0.0
) -> TriangleMesh:
    """Extracts the surface on which the signed distance has a level.

    Only cells with eight known corners have a surface: a band of at least sqrt(3) voxels on both sides gives a surface
    without holes (each edge has two faces), one that is narrower, or pruned, may have some. A vertex lies on its grid
    edge where the linear interpolation has the level. Memory is in proportion to the grid points given.

    Args:
        coords: Grid points x, y, z, from 0 to ``resolution`` - 1, none twice; fastest when sorted by their key
            ``(x * R + y) * R + z``.
        sdf: Signed distance in any unit, negative inside.
        resolution: R; grid point i lies at ``2 * i / (R - 1) - 1``.
        level: Of the surface.

    Returns:
        The surface in [-1, 1]^3, wound counter-clockwise seen from outside; without vertices where nothing crosses the
        level.

    Raises:
        ValueError: If the grid has no cell, grid points are outside it or given twice, or a distance is not finite.
    """
    grid = _sorted_grid(coords, sdf, resolution)
    lowest, cases = _crossed_cells(grid, level)
    offsets = torch.tensor(CORNERS, dtype=torch.int32, device=coords.device)
    corner_rows = grid.rows_at((lowest[:, None] + offsets).view(-1, 3)).view(-1, 8).long()

    table, num_triangles = (torch.from_numpy(array).to(coords.device) for array in triangle_table())
    cases = cases.long()
    cells = torch.arange(len(cases), device=coords.device).repeat_interleave(num_triangles[cases])
    first = num_triangles[cases].cumsum(0) - num_triangles[cases]
    order = torch.arange(len(cells), device=coords.device) - first[cells]
    edges = table[cases[cells], order]  # [F, 3]
    lower, axes = torch.tensor(EDGES, device=coords.device).unbind(1)
    slots = corner_rows[cells[:, None], lower[edges]] * 3 + axes[edges]

    is_used = torch.zeros(3 * len(grid.coords), dtype=torch.bool, device=coords.device)
    is_used[slots.flatten()] = True
    ids = is_used.cumsum(0, dtype=torch.int32) - 1
    return TriangleMesh(_vertices(grid, is_used.nonzero()[:, 0], level), ids[slots].long())


class _Grid(NamedTuple):
    """Grid points, and where to find each: a coarse dense grid of blocks, and the rows of the points of each block.

    Attributes:
        coords: [N, 3] grid points in the order of their keys.
        sdf: [N] signed distances.
        resolution: R.
        blocks: [B, B, B] number of each block of 8 x 8 x 8 points, one more than needed along each axis; 0 = empty.
        rows: [blocks, 8, 8, 8] row of each point, -1 = none; all of block 0.
    """

    coords: Int32[Tensor, "voxels 3"]
    sdf: Float[Tensor, " voxels"]
    resolution: int
    blocks: Int32[Tensor, "side side side"]
    rows: Int32[Tensor, "blocks 8 8 8"]

    def rows_at(self, coords: Int32[Tensor, "points 3"]) -> Int32[Tensor, " points"]:
        """Row of each point, from 0 to R along each axis; -1 where there is none."""
        block, place = _addresses(coords, self.blocks.shape[0])
        return self.rows.view(-1)[(self.blocks.view(-1)[block] << 9) + place]


def _addresses(
    coords: Int32[Tensor, "points 3"], side: int
) -> tuple[Int32[Tensor, " points"], Int32[Tensor, " points"]]:
    """Flat block of each point, and place in it."""
    x, y, z = coords.unbind(1)
    return ((x >> 3) * side + (y >> 3)) * side + (z >> 3), (x & 7) << 6 | (y & 7) << 3 | z & 7


def _sorted_grid(coords: Int[Tensor, "voxels 3"], sdf: Float[Tensor, " voxels"], resolution: int) -> _Grid:
    if resolution < 2:
        raise ValueError(f"resolution must be 2 or more, got {resolution}; a cell has two grid points along each axis.")
    if len(coords) and (int(coords.min()) < 0 or int(coords.max()) >= resolution):
        raise ValueError(
            f"Grid points have coordinates from {int(coords.min())} to {int(coords.max())}, but a grid of resolution "
            f"{resolution} has 0 to {resolution - 1}. Give the resolution at which the coordinates were made."
        )
    if not bool(sdf.isfinite().all()):
        raise ValueError(f"{int((~sdf.isfinite()).sum())} of {len(sdf)} signed distances are NaN or infinite.")
    x, y, z = coords.long().unbind(1)
    keys = (x * resolution + y) * resolution + z
    if not bool((keys[1:] > keys[:-1]).all()):
        keys, order = keys.sort()
        repeated = keys[1:] == keys[:-1]
        if bool(repeated.any()):
            raise ValueError(
                f"{int(repeated.sum())} of {len(keys)} grid points are given twice, the first of them "
                f"{coords[order[1:][repeated][0]].tolist()}; give each once."
            )
        coords, sdf = coords[order], sdf[order]

    coords = coords.int()
    side = resolution // 8 + 2
    block, place = _addresses(coords, side)
    blocks = torch.zeros(side**3, dtype=torch.int32, device=coords.device)
    blocks[block] = 1
    num_blocks = int(blocks.sum())
    blocks *= blocks.cumsum(0, dtype=torch.int32)
    rows = torch.full(((1 + num_blocks) * 512,), -1, dtype=torch.int32, device=coords.device)
    rows[(blocks[block] << 9) + place] = torch.arange(len(coords), dtype=torch.int32, device=coords.device)
    return _Grid(coords, sdf, resolution, blocks.view(side, side, side), rows.view(-1, 8, 8, 8))


def _crossed_cells(grid: _Grid, level: float) -> tuple[Int32[Tensor, "cells 3"], UInt8[Tensor, " cells"]]:
    """Finds the cells with eight known corners on both sides of the level.

    Returns:
        Lowest corner of each, and its case: bit c is set where corner c is inside.
    """
    known, inside = 1, 2
    of_rows = torch.nn.functional.pad(((grid.sdf < level).to(torch.uint8) * inside) | known, (0, 1))  # row -1: neither
    points = of_rows[grid.rows]
    x, y, z = (grid.blocks > 0).nonzero().unbind(1)
    # Each block with the first points of its neighbours behind it.
    framed = points.new_empty(len(x), 9, 9, 9)
    parts = (slice(0, 8), slice(8, 9)), (slice(None), slice(0, 1))
    for a, b, c in CORNERS:
        (to_a, to_b, to_c), (from_a, from_b, from_c) = ([part[step] for step in (a, b, c)] for part in parts)
        framed[:, to_a, to_b, to_c] = points[grid.blocks[x + a, y + b, z + c], from_a, from_b, from_c]
    all_known, cases = torch.full_like(points[1:], known), torch.zeros_like(points[1:])
    for corner, (a, b, c) in enumerate(CORNERS):
        at_corner = framed[:, a : a + 8, b : b + 8, c : c + 8]
        all_known &= at_corner
        cases |= (at_corner >> 1) << corner
    block, *place = ((all_known > 0) & (cases > 0) & (cases < 255)).nonzero().unbind(1)
    lowest = torch.stack([x[block], y[block], z[block]], dim=1) * 8 + torch.stack(place, dim=1)
    return lowest.int(), cases[block, *place]


def _vertices(grid: _Grid, slots: Int64[Tensor, " vertices"], level: float) -> Float[Tensor, "vertices 3"]:
    """Where the edges from row ``slot // 3`` along axis ``slot % 3`` cross the level."""
    rows, axes = slots // 3, slots % 3
    steps = torch.eye(3, dtype=torch.int32, device=slots.device)[axes]
    positions = grid.coords[rows]
    here, there = grid.sdf[rows].double(), grid.sdf[grid.rows_at(positions + steps)].double()
    along = ((level - here) / (there - here)).clamp(_CLOSEST, 1 - _CLOSEST)
    return ((positions + steps * along[:, None]) * (2 / (grid.resolution - 1)) - 1).float()


@lru_cache(maxsize=1)
def triangle_table() -> tuple[np.ndarray, np.ndarray]:
    """Derives the triangles of each of the 256 ways in which a cell's corners can lie inside.

    On each face of the cell, each run of neighbouring inside corners is cut off by one segment. Two inside corners that
    face each other across a diagonal are thus separated, whatever the rest of the cell looks like: the cell on the
    other side of the face sees the same segments. Every crossed edge lies on two faces, so that the segments close to
    loops. A loop is cut into triangles by diagonals, none of which joins two edges of one face: there it could meet a
    diagonal of the neighbouring cell, and an edge of the surface would have four faces. Of what is left the least
    area is chosen, with all vertices in the middle of their edges.

    Returns:
        Triangles [256, T, 3] as numbers of :data:`EDGES`, filled up with zeros, and how many there are [256]. Bit c of
        the row is set where corner c is inside.
    """
    triangles = [
        [triangle for loop in _loops(case) for triangle in _triangulate(loop)] for case in range(1 << len(CORNERS))
    ]
    num_triangles = np.array([len(of_case) for of_case in triangles])
    table = np.zeros((len(triangles), num_triangles.max(), 3), np.int64)
    for row, of_case in zip(table, triangles, strict=True):
        row[: len(of_case)] = np.array(of_case).reshape(-1, 3)
    return table, num_triangles


def _faces() -> list[list[int]]:
    """Corners of the six faces, counter-clockwise seen from outside."""
    faces = []
    for axis, side in product(range(3), (0, 1)):
        b, c = (axis + 1) % 3, (axis + 2) % 3
        around = [(0, 0), (1, 0), (1, 1), (0, 1)] if side else [(0, 0), (0, 1), (1, 1), (1, 0)]
        offsets = [{axis: side, b: at_b, c: at_c} for at_b, at_c in around]
        faces.append([CORNERS.index((offset[0], offset[1], offset[2])) for offset in offsets])
    return faces


def _edge_between(c: int, d: int) -> int:
    return EDGES.index((min(c, d), 3 - (c ^ d).bit_length()))


def _loops(case: int) -> list[list[int]]:
    """The closed chains of edges on which the surface cuts a cell, counter-clockwise seen from outside the solid."""
    following = {}
    for face in _faces():
        ring = [(c, d, _edge_between(c, d)) for c, d in zip(face, face[1:] + face[:1], strict=True)]
        for start, (c, d, entry) in enumerate(ring):
            if not case >> c & 1 and case >> d & 1:  # a run of inside corners begins
                onward = ring[start + 1 :] + ring[:start]
                leave = next(edge for c, d, edge in onward if case >> c & 1 and not case >> d & 1)
                following[entry] = leave
    loops = []
    while following:
        loop = [next(iter(following))]
        while (edge := following.pop(loop[-1])) != loop[0]:
            loop.append(edge)
        loops.append(loop)
    return loops


def _triangulate(loop: list[int]) -> list[tuple[int, int, int]]:
    """The triangles of least area that use no diagonal within a face of the cell."""
    allowed = [
        triangles
        for triangles in _triangulations(loop)
        if not any(_share_face(*diagonal) for diagonal in _diagonals(loop, triangles))
    ]
    return min(allowed, key=lambda triangles: sum(map(_area, triangles)))


def _triangulations(loop: list[int]) -> list[list[tuple[int, int, int]]]:
    if len(loop) < 3:
        return [[]]
    return [
        [(loop[0], loop[k], loop[-1]), *left, *right]
        for k in range(1, len(loop) - 1)
        for left in _triangulations(loop[: k + 1])
        for right in _triangulations(loop[k:])
    ]


def _diagonals(loop: list[int], triangles: list[tuple[int, int, int]]) -> set[frozenset[int]]:
    sides = {frozenset(side) for side in zip(loop, loop[1:] + loop[:1], strict=True)}
    return {frozenset((t[i], t[i - 1])) for t in triangles for i in range(3)} - sides


def _share_face(first: int, second: int) -> bool:
    """Whether both ends of both edges lie on one face of the cell."""
    ends = [CORNERS[EDGES[e][0] | bit] for e in (first, second) for bit in (0, 4 >> EDGES[e][1])]
    return any(len(set(along_axis)) == 1 for along_axis in zip(*ends, strict=True))


def _area(triangle: tuple[int, int, int]) -> float:
    a, b, c = (np.array(CORNERS[corner]) + 0.5 * np.eye(3)[axis] for corner, axis in (EDGES[e] for e in triangle))
    return float(np.linalg.norm(np.cross(b - a, c - a))) / 2
