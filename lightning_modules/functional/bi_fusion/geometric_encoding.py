"""Places and differences of places as numbers that a small network can use."""

import math

import torch
from jaxtyping import Float
from torch import Tensor


def build_geo_pe(
    xyz: Float[Tensor, "*rows axes"], num_frequencies: int, longest_wave: float
) -> Float[Tensor, "*rows channels"]:
    """Returns coordinates with sines and cosines of them, whose waves halve in length from one to the next.

    The encoding of NeRF (arXiv 2003.08934, eq. 4) with a unit: what is shorter than the shortest wave is blurred, what
    is longer than the longest is told apart by the coordinates alone.

    Args:
        xyz: Coordinates or offsets, in the unit of ``longest_wave``; computed in their own dtype.
        num_frequencies: Waves; 0 gives the coordinates alone.
        longest_wave: Length of the first wave.

    Returns:
        The coordinates over ``longest_wave``, then all sines, then all cosines: ``axes * (1 + 2 * num_frequencies)``
        channels.
    """
    scaled = xyz / longest_wave
    frequencies = 2 * math.pi * 2.0 ** torch.arange(num_frequencies, dtype=xyz.dtype, device=xyz.device)
    phases = (scaled[..., None] * frequencies).flatten(-2)
    return torch.cat([scaled, phases.sin(), phases.cos()], dim=-1)


def geo_pe_channels(axes: int, num_frequencies: int) -> int:
    """Returns the number of channels of :func:`build_geo_pe`."""
    return axes * (1 + 2 * num_frequencies)
