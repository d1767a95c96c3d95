"""Masks of a photograph at three granularities: what the language features are computed for."""

import abc
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int, UInt8
from skimage.segmentation import felzenszwalb
from typing_extensions import override


class MaskSource(abc.ABC):
    """Divides a photograph into masks."""

    @abc.abstractmethod
    def segment(self, photo: UInt8[np.ndarray, "height width 3"]) -> Int[np.ndarray, "3 height width"]:
        """Returns the masks of the levels s, m and l: in each, ids from 0 without gaps; -1 where there is no mask."""


class GraphSegmentation(MaskSource):
    """Felzenszwalb and Huttenlocher's segmentation (IJCV 2004), which needs no weights. Every pixel gets a mask.

    Args:
        scales: Preference for large segments, one for each of s, m and l.
        min_fractions: Smallest segment as a fraction of the photograph, one for each.
        sigma: Blur before segmenting, pixels.
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

    @override
    def segment(self, photo: UInt8[np.ndarray, "height width 3"]) -> Int[np.ndarray, "3 height width"]:
        """Returns the masks of the levels s, m and l."""
        num_pixels = photo.shape[0] * photo.shape[1]
        return np.stack(
            [
                felzenszwalb(photo, scale=scale, sigma=self.sigma, min_size=round(fraction * num_pixels))
                for scale, fraction in zip(self.scales, self.min_fractions, strict=True)
            ]
        )
