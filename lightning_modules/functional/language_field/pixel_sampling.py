"""Which pixels of a view a training step looks at."""

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor


def sample_labelled_pixels(
    mask_ids: Int[Tensor, "levels height width"], num_pixels: int, seeds: tuple[int, ...]
) -> Int[Tensor, " pixels"]:
    """Draws distinct flat ids of pixels that carry a mask at one level at least, uniformly.

    The draw is a pure function of its arguments, so a run resumed in the middle of an epoch draws the same pixels.

    Args:
        mask_ids: Mask of each pixel and level, -1 = none.
        num_pixels: Pixels to draw; 0, or more than there are, gives all labelled pixels in order.
        seeds: Whatever tells one step from another: the run's seed, epoch, batch, process.
    """
    labelled = (mask_ids >= 0).any(0).flatten().nonzero().squeeze(1)
    if num_pixels == 0 or num_pixels >= labelled.shape[0]:
        return labelled
    (state,) = np.random.SeedSequence(seeds).generate_state(1, dtype=np.uint64)
    generator = torch.Generator().manual_seed(int(state >> 1))
    chosen = torch.randperm(labelled.shape[0], generator=generator)[:num_pixels]
    # In image order neighbours share Gaussians, which the blending kernels' caches like.
    return labelled[chosen.sort().values.to(labelled.device)]
