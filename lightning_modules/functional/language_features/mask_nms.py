"""Suppression of redundant masks, as LangSplat's preprocessing does it (arXiv 2312.16084, preprocess.py)."""

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

_BLOCK_ELEMENTS = 1 << 23  # mask pixels looked at together
_MAX_RUN = 256  # pixels; a whole number up to this is exact in every precision a matrix product may be computed in


@torch.no_grad()
def suppress_masks(
    masks: Bool[Tensor, "masks height width"],
    scores: Float[Tensor, " masks"],
    *,
    iou: float = 0.8,
    score: float = 0.7,
    inner: float = 0.5,
) -> Int64[Tensor, " kept"]:
    """Returns which masks to keep: good ones that neither repeat a better one nor lie inside another.

    A mask goes if its score is not above ``score``; if its IoU with a mask of higher score is above ``iou``; or if at
    least 0.85 of it lies inside a mask of which that is less than 0.5, and 1 minus the product of the two fractions is
    above 1 - ``inner``. With ``inner`` 0.5 the product is always small enough: every mask that lies inside another of
    more than twice its size goes, whatever their scores. Suppressed masks suppress others too. The decisions are those
    of LangSplat's loop over pairs, in float32: areas are whole numbers, so its fractions are computed here from the
    same numbers. Its ``tril(diagonal=1)`` reads one diagonal twice, which decides nothing.

    Where we differ: among equal scores the earlier mask counts as the better (there, unspecified). When nothing
    survives, the three best remain, which is what LangSplat means (its code raises IndexError). Empty masks go.

    Args:
        masks: M masks, any overlap.
        scores: Predicted IoU times stability.
        iou: Largest allowed IoU with a better mask.
        score: Score to exceed.
        inner: LangSplat's ``inner_thr``.

    Returns:
        Ascending indices: LangSplat writes the kept masks into its maps in the order in which they were given.
    """
    order = scores.argsort(descending=True, stable=True)
    shared = mask_intersections(masks)[order][:, order].float()
    areas = shared.diagonal()
    fractions = shared / areas[:, None]  # of row i that lies in column j; NaN for an empty mask
    overlap = (shared / (areas[:, None] + areas - shared)).triu(diagonal=1)
    inside = (fractions.T >= 0.85) & (fractions < 0.5)  # column j inside row i
    containment = torch.where(inside, 1 - fractions.T * fractions, 0)

    present = areas > 0
    keep = present & (scores[order] > score)
    keep &= ~((overlap > iou) & present).any(dim=0)
    keep &= ~(containment > 1 - inner).any(dim=0)
    if not keep.any():
        keep[present.nonzero()[:3, 0]] = True
    return order[keep].sort().values


@torch.no_grad()
def mask_intersections(masks: Bool[Tensor, "masks height width"]) -> Int64[Tensor, "masks masks"]:
    """Counts the pixels that each pair of masks shares; the diagonal holds the areas.

    Block by block of pixels: masks that are elsewhere are left out, and runs of pixels that belong to the same masks
    count as one of their length, which leaves little to multiply. The product is exact at every setting of
    ``torch.set_float32_matmul_precision``: it multiplies zeros and ones with whole numbers up to 256.
    """
    num_masks = len(masks)
    shared = torch.zeros(num_masks, num_masks, dtype=torch.int64, device=masks.device)
    if num_masks == 0:
        return shared
    block = max(1, _BLOCK_ELEMENTS // num_masks // _MAX_RUN) * _MAX_RUN
    for pixels in masks.flatten(1).split(block, dim=1):
        present = pixels.view(torch.uint8).amax(dim=1).nonzero()[:, 0]  # as bytes: amax() is faster than any()
        if len(present) == 0:
            continue
        pixels = pixels[present]
        changes = torch.zeros(pixels.shape[1], dtype=torch.bool, device=masks.device)
        changes[1:] = (pixels[:, 1:] != pixels[:, :-1]).view(torch.uint8).amax(dim=0)
        changes[::_MAX_RUN] = True
        starts = changes.nonzero()[:, 0]
        lengths = starts.diff(append=starts.new_tensor([pixels.shape[1]]))
        members = pixels[:, starts].float()
        with torch.autocast(masks.device.type, enabled=False):  # it would round the sums
            shared[present[:, None], present] += (members @ (members * lengths).T).long()
    return shared
