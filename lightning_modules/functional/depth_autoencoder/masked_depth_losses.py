"""Losses and errors of depth maps on valid pixels. Losses are unreduced; pixels that do not count are 0."""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor


def depth_difference(
    predicted: Float[Tensor, "maps 1 height width"],
    target: Float[Tensor, "maps 1 height width"],
    valid: Bool[Tensor, "maps 1 height width"],
    *,
    kind: Literal["l1", "huber"] = "huber",
    huber_delta: float = 0.05,
) -> Float[Tensor, "maps 1 height width"]:
    """Returns each pixel's L1 or Huber loss, 0 where the target is not valid.

    Args:
        predicted: Decoded maps.
        target: Observed maps; what invalid pixels hold does not matter.
        valid: Pixels with depth.
        kind: ``huber`` is quadratic below ``huber_delta`` and has L1's slope of 1 above (torch's Huber loss divided by
            delta, or its smooth L1), so that the weight beside other losses does not depend on delta.
        huber_delta: Unit of the maps.
    """
    target = torch.where(valid, target, predicted.detach())
    if kind == "l1":
        return F.l1_loss(predicted, target, reduction="none")
    return F.smooth_l1_loss(predicted, target, reduction="none", beta=huber_delta)


def gradient_difference(
    predicted: Float[Tensor, "maps 1 height width"],
    target: Float[Tensor, "maps 1 height width"],
    valid: Bool[Tensor, "maps 1 height width"],
) -> tuple[Float[Tensor, "maps 2 height width"], Bool[Tensor, "maps 2 height width"]]:
    """Returns how far the steps to the next column and to the next row differ, and where both pixels have depth.

    Absolute differences of forward differences: edges where the target has them, and no others. The last column and
    the last row have no next one and do not count.
    """
    error = torch.where(valid, predicted - target, torch.zeros_like(predicted))
    steps = [F.pad(error.diff(dim=3), (0, 1)), F.pad(error.diff(dim=2), (0, 0, 0, 1))]
    pairs = [
        F.pad(valid[..., 1:] & valid[..., :-1], (0, 1)),
        F.pad(valid[..., 1:, :] & valid[..., :-1, :], (0, 0, 0, 1)),
    ]
    both = torch.cat(pairs, dim=1)
    return torch.cat(steps, dim=1).abs() * both, both


def masked_mean(values: Float[Tensor, "*size"], mask: Bool[Tensor, "*size"]) -> Float[Tensor, ""]:
    """Returns the mean over the pixels of the mask; 0 for an empty mask."""
    return (values * mask).sum() / mask.sum().clamp_min(1)


def depth_ratio(predicted_m: Float[Tensor, "*size"], target_m: Float[Tensor, "*size"]) -> Float[Tensor, "*size"]:
    """Returns max(predicted / target, target / predicted) of positive depths: the delta of ``delta < 1.25``."""
    return torch.maximum(predicted_m / target_m, target_m / predicted_m)
