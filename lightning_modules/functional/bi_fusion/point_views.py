"""How training varies what it has: scenes turned and recoloured, their views dealt to two sides."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True)
class VariationSettings:
    """How the points that the 3D branch learns from differ from the real ones."""

    colour_noise: float = 0.05
    """Standard deviation of a scene's shift of each colour and of its change in contrast."""
    stretch: float = 0.1
    """Largest share by which a scene grows or shrinks."""


def split_views(
    has_frame: Bool[Tensor, "scenes views"], draw: np.random.Generator
) -> tuple[Bool[Tensor, "scenes views"], Bool[Tensor, "scenes views"]]:
    """Deals the views of each scene to two sides that share none; a scene's only view is on both.

    Args:
        has_frame: False for views that only fill up; they are on neither side.
        draw: Where chance comes from.
    """
    order = torch.from_numpy(draw.random(tuple(has_frame.shape))).to(has_frame.device)
    rank = order.masked_fill(~has_frame, 2.0).argsort(dim=1).argsort(dim=1)
    number = has_frame.sum(dim=1, keepdim=True)
    first = has_frame & (rank < (number + 1) // 2)
    return first, torch.where(number > 1, has_frame & ~first, first)


def turned_points(
    clouds: Sequence[Float[Tensor, "_ 6"]], draw: np.random.Generator, variation: VariationSettings
) -> list[Float[Tensor, "_ 6"]]:
    """Turns each cloud about the vertical, mirrors half of them, stretches and recolours them.

    Args:
        clouds: x y z, z up, and r g b in 0 to 1.
        draw: Where chance comes from.
        variation: How much.
    """
    turned = []
    for cloud in clouds:
        angle, mirror = draw.uniform(0, 2 * math.pi), draw.random() < 0.5
        scale = 1 + variation.stretch * draw.uniform(-1, 1)
        cos, sin = math.cos(angle), math.sin(angle)
        turn = scale * np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])
        turn[0] *= -1 if mirror else 1
        noise = variation.colour_noise * draw.normal(size=4)
        xyz = cloud[:, :3] @ cloud.new_tensor(turn.T)
        rgb = (cloud[:, 3:] - 0.5) * (1 + noise[0]) + 0.5 + cloud.new_tensor(noise[1:])
        turned.append(torch.cat([xyz, rgb.clamp(0, 1)], dim=1))
    return turned
