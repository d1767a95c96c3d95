"""From metres to what a network sees, and back."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

# Valid pixels start here, so that the nearest (or, inverse, the farthest) one is told from an invalid one, which is 0.
LEAST_VALID = 0.1


@dataclass(frozen=True)
class DepthRange:
    """How depth in metres becomes a network's input: 0 where there is none, ``LEAST_VALID`` to 1 where there is."""

    near_m: float = 0.1
    """Nearer depth counts as this, metres."""
    far_m: float = 10.0
    """Farther depth counts as this, metres."""
    scale: Literal["linear", "log", "inverse"] = "linear"
    """Whether equal steps of the input are equal steps of depth, of its logarithm, or of its inverse."""

    def __post_init__(self) -> None:
        if not 0 < self.near_m < self.far_m < math.inf:
            raise ValueError(f"near_m is {self.near_m} and far_m {self.far_m}; allowed: 0 < near_m < far_m, metres.")
        if self.scale not in ("linear", "log", "inverse"):
            raise ValueError(f"scale is {self.scale!r}; allowed: linear, log, inverse.")

    @property
    def span_m(self) -> float:
        """Metres from near to far."""
        return self.far_m - self.near_m


def scale_depth(depth_m: Float[Tensor, "*size"], depth_range: DepthRange) -> Float[Tensor, "*size"]:
    """Returns depth as a network sees it.

    Args:
        depth_m: Metres; 0 = no depth.
        depth_range: What to clamp to, and the scale.
    """
    clamped = depth_m.clamp(depth_range.near_m, depth_range.far_m)
    near, far = _warp(depth_range.near_m, depth_range), _warp(depth_range.far_m, depth_range)
    if depth_range.scale == "log":
        warped = clamped.log()
    elif depth_range.scale == "inverse":
        warped = clamped.reciprocal()
    else:
        warped = clamped
    least, most = min(near, far), max(near, far)
    scaled = LEAST_VALID + (1 - LEAST_VALID) * ((warped - least) / (most - least)).clamp(0, 1)
    return torch.where(depth_m > 0, scaled, torch.zeros_like(scaled))


def depth_of_scaled(images: Float[Tensor, "*size"], depth_range: DepthRange) -> Float[Tensor, "*size"]:
    """Returns the metres of a network's input or output; the inverse of :func:`scale_depth` on valid pixels.

    Values below ``LEAST_VALID`` or above 1 count as these: a network's output always means a depth within the range.
    """
    near, far = _warp(depth_range.near_m, depth_range), _warp(depth_range.far_m, depth_range)
    least, most = min(near, far), max(near, far)
    warped = least + (most - least) * ((images - LEAST_VALID) / (1 - LEAST_VALID)).clamp(0, 1)
    if depth_range.scale == "log":
        return warped.exp()
    return warped.reciprocal() if depth_range.scale == "inverse" else warped


def _warp(metres: float, depth_range: DepthRange) -> float:
    return {"linear": metres, "log": math.log(metres), "inverse": 1 / metres}[depth_range.scale]
