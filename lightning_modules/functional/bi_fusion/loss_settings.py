"""How the losses of fused features are weighted, and when they set in."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class LossSettings:
    """Weights of the losses and how they set in; shares are of all steps."""

    distillation: float = 0.5
    """Of the cosine to the dense teacher."""
    text: float = 1.0
    """Of the cross-entropy over class texts; counts where there are labels."""
    consistency: float = 0.1
    """Of the agreement of the same points seen from other views."""
    consistency_kind: Literal["stop_gradient", "info_nce"] = "stop_gradient"
    """Pull alike alone, or push others away, too."""
    consistency_from: float = 0.25
    """Share of the steps after which consistency sets in, over as many again."""
    temperature: float = 0.07
    """Of ``info_nce``."""
    logit_scale: float = 25.0
    """Cosines are multiplied by it before the softmax of the cross-entropy."""
    point_branch: float = 0.5
    """Weight of all losses on the 3D branch alone, which points that no camera sees fall back to."""

    def __post_init__(self) -> None:
        for name in ("distillation", "text", "consistency", "point_branch"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: 0 or more.")
        if self.distillation == self.text == 0:
            raise ValueError(
                "distillation and text are both 0: consistency alone is best where all features are the same. Set one "
                "of them above 0."
            )

    def weight(self, name: str, share: float) -> float:
        """Returns the weight of a loss when a share of the steps is done.

        Args:
            name: ``distillation``, ``text`` or ``consistency``; with ``_3d`` behind it, of the 3D branch alone.
            share: 0 to 1.
        """
        if name.endswith("_3d"):
            return self.point_branch * self.weight(name.removesuffix("_3d"), share)
        if name == "consistency" and self.consistency_from > 0:
            return self.consistency * min(max(share / self.consistency_from - 1, 0.0), 1.0)
        return float(getattr(self, name))
