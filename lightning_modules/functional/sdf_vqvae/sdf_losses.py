"""Losses between a decoded sparse signed distance and the true one: a value for each voxel, reduced by the module."""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor


def sdf_difference(
    decoded: Float[Tensor, "voxels 1"], target: Float[Tensor, "voxels 1"], *, kind: Literal["l1", "mse", "l1+mse"]
) -> Float[Tensor, " voxels"]:
    """Returns how far decoded distances are from the true ones, row by row.

    Args:
        decoded: Signed distance over the band; rows aligned with the target's.
        target: In -1 to 1.
        kind: Absolute difference, its square, or the sum of both.
    """
    difference = (decoded - target)[:, 0]
    if kind == "l1":
        return difference.abs()
    if kind == "mse":
        return difference.square()
    return difference.abs() + difference.square()


def outside_difference(
    decoded: Float[Tensor, "voxels 1"], *, kind: Literal["l1", "mse", "l1+mse"]
) -> Float[Tensor, " voxels"]:
    """Returns how far decoded distances are from the band's ends, for voxels that the truth does not have.

    Beyond the band the distance is 1 or -1. On which side a voxel lies a batch does not say, so either will do: what
    must not be is a sign that changes far from the surface.
    """
    return sdf_difference(decoded.abs(), torch.ones_like(decoded), kind=kind)


def occupancy_difference(
    logits: Float[Tensor, "parents children"], occupied: Bool[Tensor, "parents children"]
) -> Float[Tensor, " parents"]:
    """Returns the cross-entropy of which children of a voxel, or cells of a token, exist; mean over these."""
    return F.binary_cross_entropy_with_logits(logits, occupied.to(logits.dtype), reduction="none").mean(1)


def kl_divergence(
    mean: Float[Tensor, "latents channels"], log_variance: Float[Tensor, "latents channels"]
) -> Float[Tensor, " latents"]:
    """Returns the divergence of diagonal Gaussians from the standard one, mean over channels."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean(1)


def near_sharp_edges(
    sdf: Float[Tensor, "voxels 1"], neighbours: Int[Tensor, "voxels 27"], *, band: float, slope_change: float = 0.4
) -> Bool[Tensor, " voxels"]:
    """Finds voxels beside sharp edges of the surface: where the slope of the distance changes from one to the next.

    Along an axis the second difference of a distance is 0 beside a plane, the curvature beside a smooth surface, and up
    to 2 across a crease. Creases away from the surface (the medial axis) do not count.

    Args:
        sdf: In -1 to 1.
        neighbours: Row of the neighbour at each offset (dx, dy, dz) from -1 to 1, z fastest; the number of rows where
            there is none.
        band: Of the truncation, in voxels.
        slope_change: Second difference, in voxels a voxel, from which an edge is sharp; 0.4 is a sphere of 2.5 voxels.
    """
    distance_voxels = band * torch.cat([sdf[:, 0], sdf.new_full((1,), torch.nan)])
    own = distance_voxels[:-1]
    sharp = torch.zeros_like(own, dtype=torch.bool)
    for before, after in ((4, 22), (10, 16), (12, 14)):
        low, high = distance_voxels[neighbours[:, before]], distance_voxels[neighbours[:, after]]
        truncated = (low.abs() >= band) | (high.abs() >= band)
        sharp |= ((low + high - 2 * own).abs() > slope_change) & ~truncated  # NaN, a missing neighbour, is not sharp
    return sharp & (own.abs() <= 2)
