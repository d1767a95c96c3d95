"""What divides a photograph into masks: one interface for networks and for what needs no weights."""

import abc
from typing import NamedTuple

from jaxtyping import Bool, Float, UInt8
from torch import Tensor


class MaskSet(NamedTuple):
    """The masks of a photograph at one granularity; they may overlap, and there may be none.

    Attributes:
        masks: [M, H, W] bool, each with at least one pixel.
        scores: [M] float32, 0 to 1; of Segment Anything, the predicted IoU times the stability.
    """

    masks: Bool[Tensor, "masks height width"]
    scores: Float[Tensor, " masks"]


class MaskSource(abc.ABC):
    """Divides photographs into masks. A network is one as well: ``class Network(nn.Module, MaskSource)``."""

    @abc.abstractmethod
    def __call__(self, photo: UInt8[Tensor, "height width 3"]) -> tuple[MaskSet, MaskSet, MaskSet, MaskSet]:
        """Returns the masks of the granularities default, s, m and l on the photo's device, before mask suppression."""
