"""Masks of a photograph without weights: graph-based segmentation at three scales."""

import logging
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import UInt8
from skimage.segmentation import felzenszwalb
from torch import Tensor
from typing_extensions import override

from lightning_modules.functional.language_features.mask_sources import MaskSet, MaskSource

_log = logging.getLogger(__name__)


class GraphMasks(MaskSource):
    """Felzenszwalb and Huttenlocher's segmentation (IJCV 2004). Every pixel gets a mask at each of s, m and l.

    For laptops and tests: it follows colour, not things, and says so in the log at its first photograph.

    Args:
        scales: Preference for large segments, one for each of s, m and l.
        min_fractions: Smallest segment as a fraction of the photograph, one for each.
        sigma: Blur before segmenting, pixels.

    Raises:
        ValueError: If there are not three of each.
    """

    def __init__(
        self,
        scales: Sequence[float] = (100.0, 300.0, 900.0),
        min_fractions: Sequence[float] = (0.002, 0.006, 0.02),
        sigma: float = 0.8,
    ) -> None:
        if len(scales) != 3 or len(min_fractions) != 3:
            raise ValueError(f"scales {scales} and min_fractions {min_fractions} need three numbers: s, m and l.")
        self.scales = tuple(scales)
        self.min_fractions = tuple(min_fractions)
        self.sigma = sigma
        self._has_said_what_it_is = False

    @override
    def __call__(self, photo: UInt8[Tensor, "height width 3"]) -> tuple[MaskSet, MaskSet, MaskSet, MaskSet]:
        """Returns the masks of default (those of s, m and l together), s, m and l; all scores are 1."""
        if not self._has_said_what_it_is:
            _log.warning(
                "The masks come from graph-based segmentation, which is not Segment Anything (SAM): they follow "
                "colour, not things. For results use SegmentAnythingMasks with a checkpoint."
            )
            self._has_said_what_it_is = True
        pixels = photo.cpu().numpy()
        num_pixels = pixels.shape[0] * pixels.shape[1]
        levels = []
        for scale, fraction in zip(self.scales, self.min_fractions, strict=True):
            ids = felzenszwalb(pixels, scale=scale, sigma=self.sigma, min_size=round(fraction * num_pixels))
            labels = torch.from_numpy(ids.astype(np.int32)).to(photo.device)
            masks = labels == torch.arange(int(ids.max()) + 1, device=photo.device)[:, None, None]
            levels.append(MaskSet(masks, torch.ones(len(masks), device=photo.device)))
        s, m, l = levels  # noqa: E741
        together = MaskSet(torch.cat([s.masks, m.masks, l.masks]), torch.cat([s.scores, m.scores, l.scores]))
        return together, s, m, l
