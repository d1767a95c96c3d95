"""Which Gaussians deserve a feature: floaters in front of surfaces collect the features of everything behind them.

A Gaussian that fails the gate keeps its colour and its opacity; it only gets no language. Floaters cost plain lifting a
large part of its segmentation quality; the oracle that removes them is close to the ceiling of the geometry.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from scipy.spatial import cKDTree
from torch import Tensor

from lightning_modules.functional.language_field.lifting import (
    MaskWeights,
    product_chunks,
    row_offsets,
    weight_per_gaussian,
)
from lightning_modules.functional.splatting.gaussians import GaussianScene


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


def mask_consistency(
    mask_weights: Sequence[MaskWeights],
    features: Float[Tensor, "masks channels"],
    keep: Bool[Tensor, " gaussians"],
) -> tuple[float, float]:
    """Measures how well lifted features paint the masks they came from, by all Gaussians and by the kept ones.

    Each mask is painted with the features lifted from all masks, A^T unit(A f); its consistency is the cosine with its
    own feature. A floater paints what is behind it in other views, and pulls the masks in front of which it hangs away
    from themselves; a Gaussian of a surface pulls them together.

    Args:
        mask_weights: A of each level, over one mask table.
        features: [M, C] unit features of the table.
        keep: [N] Gaussians of the second measure.

    Returns:
        Mean cosine over the painted masks of all levels, without and with the choice; zero where nothing is painted.
    """
    totals, num_painted = features.new_zeros(2), 0
    for level in mask_weights:
        painted = features.new_zeros(2, *features.shape)
        offsets = row_offsets(level)
        masks = torch.arange(level.num_masks + 1, dtype=level.mask_ids.dtype, device=level.mask_ids.device)
        for gaussians, sums in product_chunks(level, features):
            lifted = F.normalize(sums, dim=-1)
            entries = slice(int(offsets[gaussians.start]), int(offsets[gaussians.stop]))
            mask_ids, order = level.mask_ids[entries].sort(stable=True)
            ids = level.gaussian_ids[entries].index_select(0, order).long() - gaussians.start
            weights = level.weights[entries].index_select(0, order).to(features.dtype)
            bags = torch.searchsorted(mask_ids, masks)
            kept = keep[gaussians].index_select(0, ids)
            for row, share in enumerate((weights, weights * kept)):
                painted[row] += F.embedding_bag(
                    ids, lifted, bags, mode="sum", per_sample_weights=share, include_last_offset=True
                )
        totals += F.cosine_similarity(painted, features[None], dim=-1).sum(dim=-1)
        num_painted += int(level.mask_ids.unique().numel())
    everyone, kept_ones = (totals / max(num_painted, 1)).tolist()
    return everyone, kept_ones


@dataclass(frozen=True)
class GateSettings:
    """Settings of the gate of unreliable Gaussians.

    A Gaussian is dropped if it fails one of three tests and paints enough to do harm; the gate acts only on a scene
    whose masks agree better with themselves without the dropped Gaussians.

    Raises:
        ValueError: If a setting is out of its range.
    """

    num_neighbours: int = 16
    """Nearest neighbours in the overlap: about two rings on a surface."""
    min_overlap: float = 0.7
    """Least overlap with the neighbours; isolated floaters have next to none."""
    min_opacity: float = 0.3
    """Least opacity."""
    max_deviations: float = 1.0
    """Most median absolute deviations of the agreement below its median; finds floaters in clumps, which have
    neighbours."""
    min_disagreement: float = 0.01
    """Agreement this close to the median is never too low: masks without noise have no deviations to measure by."""
    min_relative_weight: float = 2.0
    """A Gaussian that paints less than this many times the median one is kept whatever the tests say: it can do little
    harm, and thin parts of objects are made of such Gaussians."""
    min_consistency_gain: float = 0.002
    """The guard: the gate keeps all Gaussians unless the masks' mean consistency rises by this much, a cosine."""

    def __post_init__(self) -> None:
        if self.num_neighbours < 1:
            raise ValueError(f"num_neighbours must be at least 1, got {self.num_neighbours}.")


class Reliability(NamedTuple):
    """The verdict of the gate on every Gaussian, and what it rests on.

    Attributes:
        keep: [N] whether the Gaussian gets a feature.
        overlap: [N] opacity of the neighbours by how far they overlap.
        opacity: [N] 0 to 1.
        agreement: [N] agreement of the views, 0 to 1; zero where the Gaussian paints no mask.
        dropped_weight: Share of the masks' blending weight of the Gaussians that the tests would drop.
        consistency: Mean consistency of the masks with all Gaussians.
        gated_consistency: The same with the Gaussians that the tests would keep.
        skipped: Why the gate kept all Gaussians, or None where it acted.
    """

    keep: Bool[Tensor, " gaussians"]
    overlap: Float[Tensor, " gaussians"]
    opacity: Float[Tensor, " gaussians"]
    agreement: Float[Tensor, " gaussians"]
    dropped_weight: float
    consistency: float
    gated_consistency: float
    skipped: str | None


def gate_gaussians(
    scene: GaussianScene,
    mask_weights: Sequence[MaskWeights],
    features: Float[Tensor, "masks channels"],
    settings: GateSettings,
) -> Reliability:
    """Drops the Gaussians that paint much and are isolated, faint, or painted with different features by the views.

    Medians and deviations are over the Gaussians that paint some mask. One that paints none has no feature anyhow.

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
        return Reliability(~seen, overlap, opacity, agreement, 0.0, 0.0, 0.0, "no Gaussian paints any mask")
    median = agreement[seen].median()
    deviation = (agreement[seen] - median).abs().median()
    tolerance = (settings.max_deviations * deviation).clamp(min=settings.min_disagreement)
    fails = (overlap <= settings.min_overlap) | (opacity <= settings.min_opacity) | (agreement < median - tolerance)
    keep = ~(fails & (weights > settings.min_relative_weight * weights[seen].median()))
    dropped_weight = 1 - float(weights[keep].sum(dtype=torch.float64) / weights.sum(dtype=torch.float64))
    everyone, kept = mask_consistency(mask_weights, features, keep)
    reason = None
    if kept - everyone < settings.min_consistency_gain:
        reason = (
            f"it would move the masks' consistency from {everyone:.4f} to {kept:.4f}, "
            f"a gain below {settings.min_consistency_gain:g}"
        )
        keep = torch.ones_like(keep)
    return Reliability(keep, overlap, opacity, agreement, dropped_weight, everyone, kept, reason)
