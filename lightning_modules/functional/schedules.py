"""What changes while Gaussians are trained, as pure functions of the step, so that a resumed run has the same."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class LearningRates:
    """Adam's learning rates of 3D Gaussian Splatting."""

    position: float = 1.6e-4
    """Of the centres at the first step; times the extent of the cameras."""
    position_last: float = 1.6e-6
    """Of the centres from ``position_steps`` on; times the extent of the cameras. Exponential between."""
    position_steps: int = 30_000
    """Steps from ``position`` to ``position_last``."""
    harmonics: float = 2.5e-3
    """Of the constant spherical harmonics; the others have a twentieth of it."""
    opacity: float = 0.05
    """Of the opacity logits: the paper's rate. 3DGS has lowered it to 0.025 since."""
    scale: float = 5e-3
    """Of the logarithms of the scales."""
    rotation: float = 1e-3
    """Of the quaternions."""
    exposure: float = 0.01
    """Of the photographs' exposures at the first step."""
    exposure_last: float = 0.001
    """Of the exposures from ``position_steps`` on."""

    def __post_init__(self) -> None:
        for name in ("position", "position_last", "position_steps", "exposure", "exposure_last"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: above 0, for it is decayed exponentially.")

    def positions_at(self, iteration: int, extent: float) -> float:
        """Returns the rate of the centres at an iteration, counted from 1 as in 3DGS."""
        return extent * exponential_decay(iteration, self.position, self.position_last, self.position_steps)

    def exposures_at(self, iteration: int) -> float:
        """Returns the rate of the exposures at an iteration, counted from 1 as in 3DGS."""
        return exponential_decay(iteration, self.exposure, self.exposure_last, self.position_steps)


def exponential_decay(iteration: int, first: float, last: float, num_iterations: int) -> float:
    """Returns first^(1 - t) last^t with t from 0 to 1 over ``num_iterations``, and ``last`` afterwards."""
    t = min(max(iteration / num_iterations, 0.0), 1.0)
    return math.exp((1 - t) * math.log(first) + t * math.log(last))


def active_sh_degree(iteration: int, every: int, highest: int) -> int:
    """Returns the degree of spherical harmonics in use: one more every so many iterations, up to ``highest``."""
    return min(iteration // every, highest) if every else highest


def reduction(step: int, full_size_steps: Sequence[int]) -> int:
    """Returns by what to divide a photograph's width and height: halved once for each boundary still ahead.

    Args:
        step: Steps done.
        full_size_steps: Rising steps at each of which the size doubles; full size from the last on.
    """
    return 2 ** sum(step < boundary for boundary in full_size_steps)


def warmed_up_cosine(step: int, total: int, warm_up: int) -> float:
    """Returns the share of the highest rate at a step: it rises evenly over ``warm_up`` steps, then falls as a cosine.

    0 from ``total`` on; the first step already has a share above 0.
    """
    if step < warm_up:
        return (step + 1) / (warm_up + 1)
    t = min((step - warm_up) / max(total - warm_up, 1), 1.0)
    return 0.5 * (1 + math.cos(math.pi * t))
