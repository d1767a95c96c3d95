"""Which Gaussians deserve a feature: floaters in front of surfaces collect the features of everything behind them.

A Gaussian that fails the gate keeps its colour and its opacity; it only gets no language. Floaters cost plain lifting a
large part of its segmentation quality; the oracle that removes them is close to the ceiling of the geometry.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.spatial import cKDTree
from torch import Tensor

from lightning_modules.functional.gaussians import GaussianScene
from lightning_modules.functional.lifting import MaskWeights, product_chunks, weight_per_gaussian


def neighbour_overlap(scene: GaussianScene, num_neighbours: int) -> Float[Tensor, " gaussians"]:
    """Sums the opacity of the nearest neighbours by how far they overlap: how much surface there is around a Gaussian.

    o[n] = sum over the nearest j of opacity[j] exp(-d_nj^2 / (2 (s_n^2 + s_j^2))), s the largest standard deviation.
    Free of scale: a scene in other units has the same overlaps. Computed on the CPU (k-d tree) at the cost of one
    search.

    Args:
        scene: The Gaussians.
        num_neighbours: Neighbours, the Gaussian itself not counted; fewer where the scene has fewer.
    """
    num_gaussians = scene.num_gaussians
    num_neighbours = min(num_neighbours, num_gaussians - 1)
    if num_neighbours < 1:
        return scene.opacities.new_zeros(num_gaussians)
    means = scene.means.double().cpu().numpy()
    _, ids = cKDTree(means).query(means, k=num_neighbours + 1, workers=-1)
    # Where Gaussians coincide, the first neighbour need not be the Gaussian itself; where it is missing, drop the last.
    is_self = ids == np.arange(num_gaussians)[:, None]
    is_self[~is_self.any(axis=1), -1] = True
    neighbours = torch.from_numpy(ids[~is_self].reshape(num_gaussians, num_neighbours)).to(scene.means.device)

    variances = scene.scales.amax(dim=-1).square()
    overlap = scene.opacities.new_zeros(num_gaussians)
    for column in neighbours.T:
        squared_distances = (scene.means[column] - scene.means).square().sum(dim=-1)
        spread = (variances + variances[column]).clamp(min=torch.finfo(variances.dtype).tiny)
        overlap += scene.opacities[column] * torch.exp(-0.5 * squared_distances / spread)
    return overlap


def view_agreement(
    mask_weights: Sequence[MaskWeights], features: Float[Tensor, "masks channels"]
) -> Float[Tensor, " gaussians"]:
    """Measures how far the masks of each Gaussian agree: |sum A f| / sum A, averaged over the levels it is seen in.

    One where all its masks have one feature; lower on floaters, which paint another object in every view.

    Args:
        mask_weights: A of each level, over one mask table.
        features: [M, C] unit features of the table.

    Returns:
        [N] 0 to 1; zero for Gaussians that paint no mask.
    """
    total = features.new_zeros(mask_weights[0].num_gaussians)
    num_seen = torch.zeros_like(total)
    for level in mask_weights:
        weights = weight_per_gaussian(level).to(features.dtype)
        for gaussians, sums in product_chunks(level, features):
            seen = weights[gaussians] > 0
            total[gaussians] += torch.where(seen, sums.norm(dim=-1) / weights[gaussians], 0)
            num_seen[gaussians] += seen
    return total / num_seen.clamp(min=1)


@dataclass(frozen=True)
class GateSettings:
    """Settings of the gate of unreliable Gaussians.

    Raises:
        ValueError: If a setting is out of its range.
    """

    num_neighbours: int = 16
    """Nearest neighbours in the overlap: about two rings on a surface."""
    min_overlap: float = 0.7
    """A Gaussian is kept if its overlap is above this; isolated floaters have next to none."""
    min_opacity: float = 0.3
    """A Gaussian is kept if its opacity is above this."""
    max_deviations: float = 2.0
    """A Gaussian is kept if its agreement is within this many median absolute deviations below the median; it finds
    floaters in clumps, which have neighbours."""
    min_disagreement: float = 0.01
    """Agreement this close to the median is never too low: masks without noise have no deviations to measure by."""
    min_kept_weight: float = 0.7
    """The guard: where the kept Gaussians paint less than this share of the masks, the gate keeps all instead."""

    def __post_init__(self) -> None:
        if self.num_neighbours < 1:
            raise ValueError(f"num_neighbours must be at least 1, got {self.num_neighbours}.")
        if not 0 <= self.min_kept_weight <= 1:
            raise ValueError(f"min_kept_weight is a share between 0 and 1, got {self.min_kept_weight}.")


class Reliability(NamedTuple):
    """The verdict of the gate on every Gaussian, and what it rests on.

    Attributes:
        keep: [N] whether the Gaussian gets a feature.
        overlap: [N] opacity of the neighbours by how far they overlap.
        opacity: [N] 0 to 1.
        agreement: [N] agreement of the views, 0 to 1; zero where the Gaussian paints no mask.
        kept_weight: Share of the masks' blending weight that passes the three tests.
        skipped: Why the gate kept all Gaussians, or None where it acted.
    """

    keep: Bool[Tensor, " gaussians"]
    overlap: Float[Tensor, " gaussians"]
    opacity: Float[Tensor, " gaussians"]
    agreement: Float[Tensor, " gaussians"]
    kept_weight: float
    skipped: str | None


def gate_gaussians(
    scene: GaussianScene,
    mask_weights: Sequence[MaskWeights],
    features: Float[Tensor, "masks channels"],
    settings: GateSettings,
) -> Reliability:
    """Keeps the Gaussians that are overlapped by neighbours, opaque, and painted with one feature by all views.

    The median and the median absolute deviation of the agreement are over the Gaussians that paint some mask; the
    others are not kept, nothing is known of them.

    Args:
        scene: N Gaussians.
        mask_weights: A of each level, of all views.
        features: [M, C] unit features as the masks have them, before denoising.
        settings: Thresholds and guard.
    """
    overlap = neighbour_overlap(scene, settings.num_neighbours)
    opacity = scene.opacities
    agreement = view_agreement(mask_weights, features)
    weights = torch.stack([weight_per_gaussian(level) for level in mask_weights]).sum(dim=0)
    seen = weights > 0
    if not bool(seen.any()):
        return Reliability(torch.ones_like(seen), overlap, opacity, agreement, 1.0, "no Gaussian paints any mask")
    median = agreement[seen].median()
    deviation = (agreement[seen] - median).abs().median()
    tolerance = (settings.max_deviations * deviation).clamp(min=settings.min_disagreement)
    keep = (
        seen & (overlap > settings.min_overlap) & (opacity > settings.min_opacity) & (agreement >= median - tolerance)
    )
    kept_weight = float(weights[keep].sum(dtype=torch.float64) / weights.sum(dtype=torch.float64))
    if kept_weight < settings.min_kept_weight:
        reason = f"it would keep {kept_weight:.0%} of the masks' weight, less than {settings.min_kept_weight:.0%}"
        return Reliability(torch.ones_like(keep), overlap, opacity, agreement, kept_weight, reason)
    return Reliability(keep, overlap, opacity, agreement, kept_weight, None)
