"""Consensus of the views on the features of their masks, before anything is lifted.

A mask's CLIP feature carries the noise of one crop: context that leaks in, a bad segment, an unlucky view. Masks of
other views that cover the same Gaussians saw the same thing, so each mask takes a robust mean over them.
"""

import warnings
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from lightning_modules.functional.language_field.lifting import MaskWeights

_BLOCK_ELEMENTS = 1 << 24  # elements of one dense block of rows of the mask-by-mask matrix


@dataclass(frozen=True)
class DenoisingSettings:
    """Settings of the consensus among overlapping masks.

    Raises:
        ValueError: If a setting is out of its range.
    """

    min_view_weight: float = 0.15
    """Labelled blending weight, in pixels, above which a Gaussian counts as visible in a view. It grows with the square
    of the image width; what it must keep out are traces behind a surface."""
    full_overlap: float = 20.0
    """Shared Gaussians from which an overlap counts fully; smaller ones are trusted in proportion."""
    temperature: float = 0.1
    """Scale of the cosine distance at which a disagreeing mask loses its vote."""
    num_iterations: int = 3
    """Reweighting steps of the robust mean."""

    def __post_init__(self) -> None:
        if self.min_view_weight < 0 or self.num_iterations < 0:
            raise ValueError(
                "min_view_weight and num_iterations must be zero or more, "
                f"got {self.min_view_weight} and {self.num_iterations}."
            )
        if self.full_overlap <= 0 or self.temperature <= 0:
            raise ValueError(
                f"full_overlap and temperature must be above zero, got {self.full_overlap} and {self.temperature}."
            )


def _sparse_product(left: Tensor, right: Tensor) -> Tensor:
    """Multiplies two sparse matrices and returns a dense one."""
    with warnings.catch_warnings():
        # torch's product goes through its compressed rows, whose notice of being in beta says nothing to a user.
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support|Sparse invariant checks")
        return torch.sparse.mm(left, right).to_dense()


class MaskCoverage(NamedTuple):
    """Which Gaussians each mask claims, and how many of them each view sees.

    Attributes:
        claimed: [M, N] sparse (COO), 1 where the mask paints more than half of the Gaussian's weight in a view that
            sees it.
        seen: [M, V] Gaussians claimed by mask m that are visible in view v.
    """

    claimed: Tensor
    seen: Float[Tensor, "masks views"]


def mask_coverage(
    mask_weights: MaskWeights, mask_view_ids: Int[Tensor, " masks"], min_view_weight: float
) -> MaskCoverage:
    """Finds the Gaussians that each mask claims: those of which it paints more than half in its view.

    Args:
        mask_weights: A of one level.
        mask_view_ids: [M] view of each mask, never decreasing.
        min_view_weight: Labelled weight above which a Gaussian is visible in a view, pixels.

    Raises:
        ValueError: If the masks are not ordered by view.
    """
    if bool((mask_view_ids.diff() < 0).any()):
        raise ValueError(
            "mask_view_ids must be in an order that never decreases; join the views in the order of their ids."
        )
    num_masks, num_gaussians = mask_weights.num_masks, mask_weights.num_gaussians
    num_views = int(mask_view_ids[-1]) + 1 if num_masks else 0
    gaussian_ids, mask_ids = mask_weights.gaussian_ids.long(), mask_weights.mask_ids.long()
    views = mask_view_ids[mask_ids].long()
    # Entries are sorted by Gaussian and mask, masks by view: the entries of one Gaussian in one view are neighbours.
    pairs, group, counts = torch.unique_consecutive(
        gaussian_ids * num_views + views, return_inverse=True, return_counts=True
    )
    view_weights = torch.segment_reduce(mask_weights.weights, "sum", lengths=counts, unsafe=True)
    visible = view_weights > min_view_weight
    claims = (mask_weights.weights > 0.5 * view_weights[group]) & visible[group]

    order = mask_ids[claims].sort(stable=True).indices
    indices = torch.stack([mask_ids[claims][order], gaussian_ids[claims][order]])
    ones = mask_weights.weights.new_ones(indices.shape[1])
    claimed = torch.sparse_coo_tensor(
        indices, ones, (num_masks, num_gaussians), is_coalesced=True, check_invariants=False
    )
    seen_pairs = pairs[visible]
    seen_indices = torch.stack([torch.div(seen_pairs, num_views, rounding_mode="floor"), seen_pairs % num_views])
    seen_by = torch.sparse_coo_tensor(
        seen_indices,
        ones.new_ones(seen_pairs.shape[0]),
        (num_gaussians, num_views),
        is_coalesced=True,
        check_invariants=False,
    )
    return MaskCoverage(claimed, _sparse_product(claimed, seen_by))


def denoise_mask_features(
    mask_weights: MaskWeights,
    features: Float[Tensor, "masks channels"],
    mask_view_ids: Int[Tensor, " masks"],
    settings: DenoisingSettings,
) -> Float[Tensor, "masks channels"]:
    """Replaces each mask's feature by a robust mean over the masks of other views that cover the same Gaussians.

    The votes are S = IoU^2 * min(intersection / full_overlap, 1), where intersection and union count Gaussians that
    both views see; then votes of masks that disagree with the mean are scaled by exp((cosine - 1) / temperature). Masks
    that claim no Gaussian, among them all masks of other levels, keep their feature.

    Args:
        mask_weights: A of one level, of all views and all Gaussians.
        features: [M, C] unit features.
        mask_view_ids: [M] view of each mask, never decreasing.
        settings: Settings of the consensus.

    Returns:
        [M, C] unit features.
    """
    coverage = mask_coverage(mask_weights, mask_view_ids, settings.min_view_weight)
    claimed, masks_of = coverage.claimed.indices(), coverage.claimed.t().coalesce()
    num_masks = mask_weights.num_masks
    block = max(1, _BLOCK_ELEMENTS // max(num_masks, 1))
    denoised = features.clone()
    for start in range(0, num_masks, block):
        stop = min(start + block, num_masks)
        first, last = torch.searchsorted(claimed[0].contiguous(), claimed.new_tensor([start, stop])).tolist()
        if first == last:
            continue
        rows = torch.sparse_coo_tensor(
            claimed[:, first:last] - claimed.new_tensor([[start], [0]]),
            coverage.claimed.values()[first:last],
            (stop - start, mask_weights.num_gaussians),
            is_coalesced=True,
            check_invariants=False,
        )
        intersection = _sparse_product(rows, masks_of)
        union = (
            coverage.seen[start:stop][:, mask_view_ids] + coverage.seen[:, mask_view_ids[start:stop]].T - intersection
        )
        votes = (intersection / union.clamp(min=1)).square() * (intersection / settings.full_overlap).clamp(max=1)
        votes = votes.to(features.dtype)
        voted = votes.diagonal(offset=start) > 0
        votes = votes[voted]
        consensus = F.normalize(votes @ features, dim=-1)
        for _ in range(settings.num_iterations):
            agreement = torch.exp((consensus @ features.T - 1) / settings.temperature)
            consensus = F.normalize((votes * agreement) @ features, dim=-1)
        denoised[start:stop][voted] = consensus
    return denoised
