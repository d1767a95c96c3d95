"""Sparse voxels of a batch and tensors on them; what is derived from the coordinates is computed once and shared."""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Int32, Int64
from torch import Tensor

from lightning_modules.functional.sdf_vqvae.group_normalisation import RowLayout, row_layout
from lightning_modules.functional.sdf_vqvae.neighbour_maps import (
    child_coords,
    child_occupancy,
    neighbour_map,
    octants,
    parent_rows,
    voxel_keys,
)
from lightning_modules.functional.sdf_vqvae.spconv_backend import PairMap, pair_map
from lightning_modules.functional.sdf_vqvae.window_partition import WindowPartition, window_partition


class Voxels:
    """The occupied voxels of a batch of shapes at one resolution, with their maps.

    Maps are built when first asked for and kept, so all layers of a level share them, and an encoder and a decoder
    that meet at the same voxels. The constructor trusts its arguments; :func:`checked_voxels` does not.

    Args:
        coords: [N, 4] int32 rows (shape, x, y, z), distinct; a shape's rows follow each other.
        resolution: Voxels along an edge of the grid.
        num_shapes: Shapes of the batch, those without voxels included.
        is_sorted: Whether rows rise by (shape, x, y, z).
    """

    def __init__(self, coords: Int32[Tensor, "voxels 4"], resolution: int, num_shapes: int, *, is_sorted: bool) -> None:
        self.coords = coords
        self.resolution = resolution
        self.num_shapes = num_shapes
        self.is_sorted = is_sorted
        self._windows: dict[tuple[int, int], WindowPartition] = {}

    def __len__(self) -> int:
        return len(self.coords)

    @cached_property
    def keys(self) -> Int64[Tensor, " voxels"]:
        """Each voxel's :func:`voxel_keys`."""
        return voxel_keys(self.coords, self.resolution)

    @cached_property
    def neighbours(self) -> Int32[Tensor, "voxels 27"]:
        """Rows of each voxel's neighbours, N where there is none."""
        return neighbour_map(self.keys, self.resolution, is_sorted=self.is_sorted)

    @cached_property
    def pairs(self) -> PairMap:
        """The same for the backend spconv."""
        return pair_map(self.coords, self.resolution, self.num_shapes)

    @cached_property
    def layout(self) -> RowLayout:
        """Which rows belong to which shape."""
        return row_layout(self.coords[:, 0], self.num_shapes)

    @cached_property
    def parents(self) -> "Parents":
        """The voxels of half the resolution that hold these.

        Raises:
            ValueError: If the resolution is odd.
        """
        if self.resolution % 2:
            raise ValueError(
                f"voxels of resolution {self.resolution} cannot be halved; give a resolution that the network's down "
                "factor divides."
            )
        coords, rows = parent_rows(self.coords, self.resolution)
        return Parents(Voxels(coords, self.resolution // 2, self.num_shapes, is_sorted=True), rows)

    @cached_property
    def occupancy(self) -> Bool[Tensor, "parents 8"]:
        """Which of the eight children of each parent are among these, z fastest: what a decoder should keep."""
        parents, rows = self.parents
        return child_occupancy(rows, octants(self.coords), len(parents))

    def children(self, kept: Bool[Tensor, "parents 8"] | None = None) -> "Voxels":
        """Returns the children that are kept, in the order of their parents and, among siblings, of z, y, x.

        They know these voxels as their parents, so the way back needs no search.

        Args:
            kept: Which of the eight children of each voxel; None keeps all, and puts child o of row p at row 8 p + o.
        """
        coords = child_coords(self.coords)
        if kept is None:
            rows = torch.arange(len(self), device=coords.device).repeat_interleave(8)
            chosen = coords.flatten(0, 1)
        else:
            rows, chosen = kept.nonzero()[:, 0], coords[kept]
        children = Voxels(chosen, self.resolution * 2, self.num_shapes, is_sorted=False)
        children.__dict__["parents"] = Parents(self, rows)  # what the cached property would search for
        return children

    def windows(self, size: int, shift: int) -> WindowPartition:
        """Returns the partition into windows of ``size`` voxels along an edge, shifted by ``shift``."""
        if (size, shift) not in self._windows:
            self._windows[size, shift] = window_partition(self.coords, self.resolution, size, shift)
        return self._windows[size, shift]

    def ancestor_rows(self, levels: int) -> Int64[Tensor, " voxels"]:
        """Returns the row of the voxel that holds each of these, ``levels`` halvings up."""
        if levels == 0:
            return torch.arange(len(self), device=self.coords.device)
        parents, rows = self.parents
        return rows if levels == 1 else parents.ancestor_rows(levels - 1)[rows]


class Parents(NamedTuple):
    """Voxels of half the resolution.

    Attributes:
        voxels: The parents.
        rows: Each child's row among them.
    """

    voxels: Voxels
    rows: Int64[Tensor, " children"]


def checked_voxels(coords: Int[Tensor, "voxels 4"], resolution: int, num_shapes: int) -> Voxels:
    """Makes voxels of coordinates that come from outside.

    Raises:
        ValueError: If coordinates are out of range or doubled, or a shape's rows do not follow each other.
    """
    if len(coords) == 0:
        return Voxels(coords.int(), resolution, num_shapes, is_sorted=True)
    limits = torch.tensor([num_shapes, resolution, resolution, resolution], device=coords.device)
    outside = ((coords < 0) | (coords >= limits)).any(dim=1)
    if outside.any():
        row = int(outside.nonzero()[0, 0])
        raise ValueError(
            f"coordinates row {row} is {coords[row].tolist()} (shape, x, y, z); allowed: shape 0 to {num_shapes - 1}, "
            f"x, y and z 0 to {resolution - 1}. Give the resolution that the coordinates were made for."
        )
    if (coords[1:, 0] < coords[:-1, 0]).any():
        raise ValueError("a shape's coordinates must follow each other, shape 0 first; sort the rows by shape.")
    keys = voxel_keys(coords, resolution)
    is_sorted = bool((keys[1:] > keys[:-1]).all())
    if not is_sorted:
        ordered, order = keys.sort()
        doubled = (ordered[1:] == ordered[:-1]).nonzero()[:, 0]
        if len(doubled):
            row = int(order[doubled[0]])
            raise ValueError(
                f"{len(doubled)} coordinates are doubled, for one {coords[row].tolist()} (shape, x, y, z); a voxel may "
                "occur once. Remove the copies with torch.unique(coords, dim=0)."
            )
    return Voxels(coords.int(), resolution, num_shapes, is_sorted=is_sorted)


@dataclass(frozen=True)
class SparseTensor:
    """Features on voxels.

    Attributes:
        feats: [N, C] a row for each voxel.
        voxels: Where they are; tensors of one level share them.
    """

    feats: Float[Tensor, "voxels channels"]
    voxels: Voxels

    @property
    def coords(self) -> Int32[Tensor, "voxels 4"]:
        """Rows (shape, x, y, z)."""
        return self.voxels.coords

    @property
    def resolution(self) -> int:
        """Voxels along an edge of the grid."""
        return self.voxels.resolution

    @property
    def num_shapes(self) -> int:
        """Shapes of the batch."""
        return self.voxels.num_shapes

    def with_feats(self, feats: Float[Tensor, "voxels others"]) -> "SparseTensor":
        """Returns other features on the same voxels."""
        return SparseTensor(feats, self.voxels)


def sparse_tensor(
    feats: Float[Tensor, "voxels channels"], coords: Int[Tensor, "voxels 4"], resolution: int, num_shapes: int
) -> SparseTensor:
    """Makes a sparse tensor of a batch, as ``datamodules.batches.SparseSdf`` holds it.

    Raises:
        ValueError: As :func:`checked_voxels`.
    """
    return SparseTensor(feats, checked_voxels(coords, resolution, num_shapes))
