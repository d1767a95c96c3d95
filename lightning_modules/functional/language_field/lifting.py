"""Lifting of mask features onto Gaussians without training, by blending weight.

The sufficient statistic of one level is the sparse matrix A [N, M]: how much of mask m is painted by Gaussian n, the
blending weights ``e[p, n] = alpha_n T_n`` summed over the pixels p of the mask. Every quantity of the lifting
(features, agreement of views, histograms of codebook entries) is a product with it, so views may be gathered in any
split.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from scipy.sparse import csr_array
from torch import Tensor

from lightning_modules.functional.splatting.rasterization import BlendingWeights

_CHUNK_ELEMENTS = 1 << 24  # elements of the dense blocks in which products with A are formed


class MaskWeights(NamedTuple):
    """The Gaussian-by-mask matrix A of one level, sparse, sorted by Gaussian and then by mask, each pair once.

    Attributes:
        gaussian_ids: [nnz] int32.
        mask_ids: [nnz] int32 rows of the mask table. The table may hold masks of other levels, which have no entries
            here.
        weights: [nnz] blending weight of the Gaussian summed over the pixels of the mask, above zero, in pixels.
        num_gaussians: N.
        num_masks: M, rows of the mask table.
    """

    gaussian_ids: Int[Tensor, " entries"]
    mask_ids: Int[Tensor, " entries"]
    weights: Float[Tensor, " entries"]
    num_gaussians: int
    num_masks: int


def mask_weights_of_view(
    blending: BlendingWeights, mask_ids: Int[Tensor, " pixels"], num_masks: int, *, minimum: float = 0.0
) -> MaskWeights:
    """Sums the blending weights of one view over the pixels of each mask of one level.

    Deterministic: pixels are added in their order, on every device. Memory is in proportion to the view's blending
    weights.

    Args:
        blending: Weights of P pixels.
        mask_ids: [P] mask of the same pixels, row of the view's mask table; -1 = none.
        num_masks: Rows of the view's mask table.
        minimum: Sums up to this many pixels are left out. Zero leaves out nothing that paints.

    Raises:
        ValueError: If the pixels differ in number, or a mask id is not a row of the table.
    """
    if mask_ids.shape[0] != blending.pixel_ids.shape[0]:
        raise ValueError(
            f"mask_ids has {mask_ids.shape[0]} pixels but the blending weights have {blending.pixel_ids.shape[0]}; "
            "pass the mask ids of blending.pixel_ids."
        )
    if mask_ids.numel() and not -1 <= int(mask_ids.min()) <= int(mask_ids.max()) < num_masks:
        raise ValueError(
            f"mask_ids must be -1 (none) or between 0 and {num_masks - 1}, "
            f"got {int(mask_ids.min())} to {int(mask_ids.max())}."
        )
    sums = _sums_on_cpu if mask_ids.device.type == "cpu" else _sums_by_sorting
    gaussian_ids, masks, weights = sums(blending, mask_ids, num_masks)
    if minimum > 0:
        kept = weights > minimum
        gaussian_ids, masks, weights = gaussian_ids[kept], masks[kept], weights[kept]
    return MaskWeights(gaussian_ids.int(), masks.int(), weights, blending.num_gaussians, num_masks)


def _sums_on_cpu(blending: BlendingWeights, mask_ids: Tensor, num_masks: int) -> tuple[Tensor, Tensor, Tensor]:
    """Multiplies the masks' indicator matrix with the blending weights: on a CPU nine times faster than a sort."""
    num_pixels, num_gaussians = mask_ids.shape[0], blending.num_gaussians
    blended = csr_array(
        (blending.weights.numpy(), blending.gaussian_ids.numpy(), blending.offsets.numpy()),
        shape=(num_pixels, num_gaussians),
    )
    labelled = (mask_ids >= 0).nonzero().squeeze(1).numpy()
    ones = np.ones(len(labelled), blended.dtype)
    indicators = csr_array((ones, (mask_ids.numpy()[labelled], labelled)), shape=(num_masks, num_pixels))
    by_gaussian = (indicators @ blended).tocsc()
    counts = torch.from_numpy(by_gaussian.indptr).diff()
    gaussian_ids = torch.arange(num_gaussians).repeat_interleave(counts)
    return gaussian_ids, torch.from_numpy(by_gaussian.indices), torch.from_numpy(by_gaussian.data)


def _sums_by_sorting(blending: BlendingWeights, mask_ids: Tensor, num_masks: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sorts the labelled entries by Gaussian and mask, pixels in their order, and adds up equal pairs."""
    key_type = torch.int32 if blending.num_gaussians * num_masks < 2**31 else torch.int64  # the shorter sorts faster
    masks = mask_ids.to(key_type).repeat_interleave(blending.offsets.diff())
    labelled = (masks >= 0).nonzero().squeeze(1)
    keys = blending.gaussian_ids.index_select(0, labelled).to(key_type) * num_masks + masks.index_select(0, labelled)
    keys, order = keys.sort(stable=True)
    pairs, counts = torch.unique_consecutive(keys, return_counts=True)
    weights = blending.weights.index_select(0, labelled.index_select(0, order))
    gaussian_ids = torch.div(pairs, max(num_masks, 1), rounding_mode="floor")
    sums = torch.segment_reduce(weights, "sum", lengths=counts, unsafe=True)
    return gaussian_ids, pairs - gaussian_ids * num_masks, sums


def join_views(parts: Sequence[MaskWeights]) -> MaskWeights:
    """Joins the matrices of several views side by side: the masks of later views get the higher ids.

    Raises:
        ValueError: If there are no views or they are not of one scene.
    """
    sizes = sorted({part.num_gaussians for part in parts})
    if len(sizes) != 1:
        raise ValueError(f"join_views needs views of one scene, got {len(parts)} views with {sizes} Gaussians.")
    gaussian_ids = torch.cat([part.gaussian_ids for part in parts])
    offsets = [0, *torch.tensor([part.num_masks for part in parts]).cumsum(0).tolist()]
    mask_ids = torch.cat([part.mask_ids + offset for part, offset in zip(parts, offsets[:-1], strict=True)])
    gaussian_ids, order = gaussian_ids.sort(stable=True)
    weights = torch.cat([part.weights for part in parts])[order]
    return MaskWeights(gaussian_ids, mask_ids[order], weights, sizes[0], offsets[-1])


def select_gaussians(mask_weights: MaskWeights, keep: Bool[Tensor, " gaussians"]) -> MaskWeights:
    """Removes the entries of the Gaussians that are not kept; the numbering of the Gaussians stays."""
    kept = keep[mask_weights.gaussian_ids]
    return mask_weights._replace(
        gaussian_ids=mask_weights.gaussian_ids[kept],
        mask_ids=mask_weights.mask_ids[kept],
        weights=mask_weights.weights[kept],
    )


def weight_per_gaussian(mask_weights: MaskWeights) -> Float[Tensor, " gaussians"]:
    """Returns the row sums of A: the labelled pixels, in blending weight, that each Gaussian paints."""
    return torch.segment_reduce(mask_weights.weights, "sum", offsets=row_offsets(mask_weights), unsafe=True)


def row_offsets(mask_weights: MaskWeights) -> Int[Tensor, " gaussians_plus_one"]:
    """Returns where the entries of each Gaussian begin, int64, as in compressed sparse rows."""
    rows = torch.arange(mask_weights.num_gaussians + 1, dtype=torch.int32, device=mask_weights.gaussian_ids.device)
    return torch.searchsorted(mask_weights.gaussian_ids, rows)


def product_chunks(
    mask_weights: MaskWeights, values: Float[Tensor, "masks channels"]
) -> Iterator[tuple[slice, Float[Tensor, "chunk channels"]]]:
    """Yields A @ values block by block of Gaussians, so that no [N, channels] matrix need exist.

    Yields:
        The slice of Gaussians and their rows of the product.

    Raises:
        ValueError: If ``values`` has not one row per mask of the table.
    """
    num_masks, channels = values.shape
    if num_masks != mask_weights.num_masks:
        raise ValueError(
            f"The mask table has {mask_weights.num_masks} masks but {num_masks} rows of values were given."
        )
    offsets = row_offsets(mask_weights)
    chunk = max(1, _CHUNK_ELEMENTS // max(channels, 1))
    weights = mask_weights.weights.to(values.dtype)
    for start in range(0, mask_weights.num_gaussians, chunk):
        stop = min(start + chunk, mask_weights.num_gaussians)
        first, last = int(offsets[start]), int(offsets[stop])
        # A weighted sum of rows is what embedding_bag computes: several times faster than a sparse matrix product.
        yield (
            slice(start, stop),
            F.embedding_bag(
                mask_weights.mask_ids[first:last].long(),
                values,
                offsets[start : stop + 1] - first,
                mode="sum",
                per_sample_weights=weights[first:last],
                include_last_offset=True,
            ),
        )


def lift_features(
    mask_weights: MaskWeights, features: Float[Tensor, "masks channels"]
) -> Float[Tensor, "gaussians channels"]:
    """Gives each Gaussian the direction of the weighted mean of the features of the masks it paints.

    The mean over all views and pixels by blending weight (LUDVIG, arXiv 2410.14462; the uncoded field of 512 channels).

    Returns:
        Unit rows; zero rows for Gaussians that paint no mask.
    """
    lifted = features.new_empty(mask_weights.num_gaussians, features.shape[1])
    for gaussians, sums in product_chunks(mask_weights, features):
        lifted[gaussians] = F.normalize(sums, dim=-1)
    return lifted
