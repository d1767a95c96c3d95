"""How well a decoded shape matches its input: distances and signs over the grid, and surfaces."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lightning_modules.functional.sdf_vqvae.grid_signs import inside_grid, sign_iou
from lightning_modules.functional.sdf_vqvae.marching_cubes import marching_cubes
from lightning_modules.functional.sdf_vqvae.mesh_metrics import (
    chamfer_distance,
    compare_surfaces,
    f_score,
    normal_consistency,
)

SAMPLES = 20_000
"""Points on each of two surfaces that are compared."""

CUBE_SIDE = 2.0


def sdf_scores(
    decoded_coords: Int[Tensor, "decoded 3"],
    decoded_sdf: Float[Tensor, " decoded"],
    coords: Int[Tensor, "voxels 3"],
    sdf: Float[Tensor, " voxels"],
    resolution: int,
    band: float,
) -> dict[str, float]:
    """Returns figures of one shape; NaN where there is nothing to average. Computed on the CPU.

    ``sign_iou`` is the intersection over the union of the points inside, over the whole grid (:func:`inside_grid`).
    Errors of the distance are in voxels, mean over the input's points: ``sdf_mae``, and ``sdf_mae_inside`` and
    ``sdf_mae_outside`` over those of either sign. A point that was not decoded counts as decoded to the band's end on
    the side where it lies. ``missing_voxels`` is the share of the input's points that were not decoded,
    ``extra_voxels`` that of the decoded ones which the input does not have, and ``sdf_mae_beyond`` the error of these
    against the band's end.

    Args:
        decoded_coords: Grid points, none twice.
        decoded_sdf: Distances over the band.
        coords: Grid points of the input, none twice.
        sdf: Their distances.
        resolution: Of both.
        band: In voxels.
    """
    decoded_coords, decoded_sdf, coords, sdf = (part.cpu() for part in (decoded_coords, decoded_sdf, coords, sdf))
    inside, truth = (inside_grid(*shape, resolution) for shape in ((decoded_coords, decoded_sdf), (coords, sdf)))
    found = _rows(coords, decoded_coords, resolution)
    ends = 1 - 2 * inside[tuple(coords.long().T)].to(sdf.dtype)
    given = torch.where(found >= 0, torch.cat([decoded_sdf, sdf.new_zeros(1)])[found], ends)
    error = band * (given - sdf).abs()
    is_extra = _rows(decoded_coords, coords, resolution) < 0
    beyond = decoded_sdf[is_extra] - (1 - 2 * truth[tuple(decoded_coords[is_extra].long().T)].to(sdf.dtype))
    return {
        "sign_iou": sign_iou(inside, truth),
        "sdf_mae": float(error.mean()),
        "sdf_mae_inside": float(error[sdf < 0].mean()),
        "sdf_mae_outside": float(error[sdf >= 0].mean()),
        "sdf_mae_beyond": float(band * beyond.abs().mean()),
        "missing_voxels": float((found < 0).float().mean()),
        "extra_voxels": float(is_extra.float().mean()),
    }


def mesh_scores(
    decoded_coords: Int[Tensor, "decoded 3"],
    decoded_sdf: Float[Tensor, " decoded"],
    coords: Int[Tensor, "voxels 3"],
    sdf: Float[Tensor, " voxels"],
    resolution: int,
) -> dict[str, float]:
    """Returns figures of the surface of one decoded shape against that of its input, both by marching cubes.

    ``chamfer`` is the mean distance in the cube [-1, 1]^3 (not squared, mean of both directions), ``chamfer_voxels``
    the same in voxels; both are NaN where nothing was decoded that has a surface, which ``without_mesh`` counts.
    ``f_score_64`` and ``f_score_128`` are F-scores at a 64th and a 128th of the cube's side; ``normal_consistency`` is
    the mean absolute cosine of normals. These three are 0 without a surface.
    """
    decoded = marching_cubes(decoded_coords.cpu(), decoded_sdf.cpu(), resolution)
    found = compare_surfaces(decoded, marching_cubes(coords.cpu(), sdf.cpu(), resolution), SAMPLES)
    chamfer = float(chamfer_distance(found))
    if not math.isfinite(chamfer):
        chamfer = math.nan
    return {
        "chamfer": chamfer,
        "chamfer_voxels": chamfer * (resolution - 1) / CUBE_SIDE,
        "f_score_64": float(f_score(found, CUBE_SIDE / 64)),
        "f_score_128": float(f_score(found, CUBE_SIDE / 128)),
        "normal_consistency": float(normal_consistency(found)),
        "without_mesh": float(len(decoded.faces) == 0),
    }


def _rows(coords: Tensor, among: Tensor, resolution: int) -> Tensor:
    """Returns the row of each point among others, -1 where it is not there."""
    wanted, keys = ((c[:, 0].long() * resolution + c[:, 1]) * resolution + c[:, 2] for c in (coords, among))
    keys, order = keys.sort()
    if not len(keys):
        return torch.full_like(wanted, -1)
    place = torch.searchsorted(keys, wanted).clamp_max(len(keys) - 1)
    return torch.where(keys[place] == wanted, order[place], -1)
