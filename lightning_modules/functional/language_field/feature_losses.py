"""Losses on decoded features. The cosine loss lives in ``coefficient_space``; an L1 norm has no such short cut."""

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


def absolute_difference_to_targets(
    weight_map: Float[Tensor, "pixels entries"],
    codebook: Float[Tensor, "entries channels"],
    targets: Float[Tensor, "masks channels"],
    target_ids: Int[Tensor, " pixels"],
    *,
    normalize: bool = False,
) -> Float[Tensor, " pixels"]:
    """Returns each pixel's mean absolute difference between its decoded feature and its mask's feature.

    LangSplatV2's ``l1_loss``, unreduced. It decodes the given pixels, so memory is pixels x channels: sample them.

    Args:
        weight_map: Coefficients of each pixel.
        codebook: Entries of all layers.
        targets: Features of the masks.
        target_ids: Mask of each pixel; a pixel of no mask (-1) gets 0.
        normalize: Scale the decoded feature to unit length first.
    """
    decoded = weight_map @ codebook
    if normalize:
        decoded = F.normalize(decoded, dim=1)
    difference = (decoded - targets[target_ids.clamp_min(0)]).abs().mean(dim=1)
    return difference * (target_ids >= 0)
