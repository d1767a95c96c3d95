"""The 48 symmetries of the cube on grid points: axes exchanged, then mirrored; exact, for grids map onto themselves."""

import itertools
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


class CubeSymmetry(NamedTuple):
    """A signed permutation of the axes.

    Attributes:
        axes: New axis i is old axis ``axes[i]``.
        mirrored: Whether new axis i runs backwards.
    """

    axes: tuple[int, int, int]
    mirrored: tuple[bool, bool, bool]


CUBE_SYMMETRIES: tuple[CubeSymmetry, ...] = tuple(
    CubeSymmetry(axes, mirrored)  # type: ignore[arg-type]  # itertools does not tell lengths
    for axes in itertools.permutations(range(3))
    for mirrored in itertools.product((False, True), repeat=3)
)  # the first leaves all as it is


def turn_coords(coords: Int[Tensor, "voxels 3"], symmetry: CubeSymmetry, resolution: int) -> Int[Tensor, "voxels 3"]:
    """Moves grid points by a symmetry of the grid's cube; rows keep their order."""
    turned = coords[:, list(symmetry.axes)]
    return torch.where(torch.tensor(symmetry.mirrored, device=coords.device), resolution - 1 - turned, turned)


def turn_sparse_sdf(
    coords: Int[Tensor, "voxels 3"], sdf: Float[Tensor, " voxels"], symmetry: CubeSymmetry, resolution: int
) -> tuple[Int[Tensor, "voxels 3"], Float[Tensor, " voxels"]]:
    """Turns or mirrors one shape; rows are sorted anew by ``(x * R + y) * R + z``. Distance stays as it is."""
    turned = turn_coords(coords, symmetry, resolution)
    x, y, z = turned.long().unbind(1)
    order = ((x * resolution + y) * resolution + z).argsort()
    return turned[order], sdf[order]
