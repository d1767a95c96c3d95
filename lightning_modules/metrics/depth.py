"""Errors of decoded depth. States are sums over pixels, so processes add up."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override

from lightning_modules.functional.depth_autoencoder.depth_range import DepthRange
from lightning_modules.functional.depth_autoencoder.masked_depth_losses import depth_ratio


class DepthErrors(Metric):
    """Errors over all valid pixels of all maps: each pixel counts the same, wherever it lies.

    Args:
        depth_range: Its span in metres is what ``mae_fraction`` is a fraction of.
    """

    full_state_update = False
    absolute: Tensor
    squared: Tensor
    within: Tensor
    count: Tensor

    def __init__(self, depth_range: DepthRange) -> None:
        super().__init__()
        self.depth_range = depth_range
        for name in ("absolute", "squared", "within", "count"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    @override
    def update(
        self,
        predicted_m: Float[Tensor, "*size"],
        target_m: Float[Tensor, "*size"],
        valid: Bool[Tensor, "*size"],
    ) -> None:
        """Adds maps.

        Args:
            predicted_m: Decoded depth, metres, positive.
            target_m: Observed depth, metres; what invalid pixels hold does not matter.
            valid: Pixels with depth.
        """
        predicted_m, target_m = predicted_m[valid].double(), target_m[valid].double()
        difference = predicted_m - target_m
        self.absolute += difference.abs().sum()
        self.squared += difference.square().sum()
        self.within += (depth_ratio(predicted_m, target_m) < 1.25).sum()
        self.count += valid.sum()

    @override
    def compute(self) -> dict[str, Float[Tensor, ""]]:
        """Returns ``mae_fraction`` of the range, ``mae_m``, ``rmse_m``, ``delta_1_25``; NaN without a valid pixel."""
        mae = self.absolute / self.count
        figures = {
            "mae_fraction": mae / self.depth_range.span_m,
            "mae_m": mae,
            "rmse_m": (self.squared / self.count).sqrt(),
            "delta_1_25": self.within / self.count,
        }
        return {name: value.float() for name, value in figures.items()}
