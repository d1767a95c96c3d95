"""How close a rendered image is to a photograph."""

from jaxtyping import Float
from torch import Tensor


def peak_signal_to_noise(
    rendered: Float[Tensor, "*size channels"], photograph: Float[Tensor, "*size channels"]
) -> Float[Tensor, ""]:
    """Returns the peak signal-to-noise ratio in dB of images in 0..1; infinite where they are equal."""
    return -10 * (rendered.clamp(0, 1) - photograph).square().mean().log10()
