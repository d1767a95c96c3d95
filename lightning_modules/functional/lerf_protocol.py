"""How LERF-OVS is scored, as LangSplatV2's ``eval_lerf.py`` does it: from relevancy maps to masks and points.

Its paper's appendix smooths with the average alone; its code, followed here, with half the average and half the map.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

PROTOCOL_WIDTH = 988  # pixels; LERF-OVS images, to which the pools of 29 and 7 belong


@dataclass(frozen=True)
class ProtocolSettings:
    """Settings of the evaluation; the defaults are LERF-OVS's.

    Raises:
        ValueError: If a pool is even or below one, or a name is unknown.
    """

    relevancy_pool: int = 29
    """Side of the average over relevancy, pixels, odd."""
    mask_pool: int = 7
    """Side of the majority vote over the mask, pixels, odd."""
    mask_threshold: float = 0.4
    """Threshold on the relevancy stretched to -1..1: 0.4 is 0.7 of the way from its minimum to its maximum."""
    pool_scaling: Literal["protocol", "relative"] = "protocol"
    """``protocol`` takes the pools as they are, ``relative`` scales them by image width / 988, to odd sides from 3."""

    def __post_init__(self) -> None:
        for name, side in (("relevancy_pool", self.relevancy_pool), ("mask_pool", self.mask_pool)):
            if side < 1 or side % 2 == 0:
                raise ValueError(f"{name} must be odd and at least 1, so that it has a centre; got {side}.")
        if self.pool_scaling not in ("protocol", "relative"):
            raise ValueError(f"pool_scaling must be 'protocol' or 'relative', got {self.pool_scaling!r}.")

    def pools(self, width: int) -> tuple[int, int]:
        """Returns both pools in pixels for images of a width."""
        if self.pool_scaling == "protocol":
            return self.relevancy_pool, self.mask_pool
        scale = width / PROTOCOL_WIDTH
        return _odd(self.relevancy_pool * scale), _odd(self.mask_pool * scale)


def _odd(side: float) -> int:
    return max(3, 2 * round((side - 1) / 2) + 1)


class Segmentation(NamedTuple):
    """Masks of Q prompts.

    Attributes:
        masks: [Q, H, W] masks at the chosen level.
        levels: [Q] chosen level: the one whose smoothed relevancy peaks highest.
        scores: [L, Q] those peaks.
        level_masks: [L, Q, H, W] masks of every level.
        relevancy: [Q, H, W] smoothed relevancy at the chosen level.
    """

    masks: Bool[Tensor, "prompts height width"]
    levels: Int[Tensor, " prompts"]
    scores: Float[Tensor, "levels prompts"]
    level_masks: Bool[Tensor, "levels prompts height width"]
    relevancy: Float[Tensor, "prompts height width"]


class Localization(NamedTuple):
    """Points of Q prompts.

    Attributes:
        hits: [Q] whether the most relevant pixel lies in a box of the prompt.
        levels: [Q] chosen level: the one whose averaged relevancy peaks highest.
        peaks: [Q, 2] x and y of the first most relevant pixel.
    """

    hits: Bool[Tensor, " prompts"]
    levels: Int[Tensor, " prompts"]
    peaks: Int[Tensor, "prompts 2"]


def box_average(maps: Float[Tensor, "*batch height width"], side: int) -> Float[Tensor, "*batch height width"]:
    """Averages over a square of odd side around each pixel; at the border over the part inside the image."""
    flat = maps.reshape(-1, 1, *maps.shape[-2:])
    rows = F.avg_pool2d(flat, (1, side), 1, (0, side // 2), count_include_pad=False)
    return F.avg_pool2d(rows, (side, 1), 1, (side // 2, 0), count_include_pad=False).reshape(maps.shape)


def segment(maps: Float[Tensor, "levels prompts height width"], settings: ProtocolSettings) -> Segmentation:
    """Turns relevancy maps into a mask per prompt.

    Args:
        maps: Relevancy of each level and prompt.
        settings: Pools and threshold.
    """
    relevancy_pool, mask_pool = settings.pools(maps.shape[-1])
    smoothed = torch.empty_like(maps)
    level_masks = torch.empty_like(maps, dtype=torch.bool)
    for prompt in range(maps.shape[1]):  # one prompt at a time: temporaries stay in the cache
        own = maps[:, prompt]
        smooth = 0.5 * (box_average(own, relevancy_pool) + own)
        above = smooth - smooth.amin(dim=(1, 2), keepdim=True)
        stretched = (2 * above / (above.amax(dim=(1, 2), keepdim=True) + 1e-9) - 1).clamp(0, 1)
        level_masks[:, prompt] = box_average((stretched > settings.mask_threshold).to(maps.dtype), mask_pool) > 0.5
        smoothed[:, prompt] = smooth
    scores = smoothed.amax(dim=(2, 3))
    levels = scores.argmax(dim=0)
    prompts = torch.arange(maps.shape[1], device=maps.device)
    return Segmentation(level_masks[levels, prompts], levels, scores, level_masks, smoothed[levels, prompts])


def localize(
    maps: Float[Tensor, "levels prompts height width"],
    boxes: Sequence[Float[Tensor, "_ 4"]],
    settings: ProtocolSettings,
) -> Localization:
    """Points at the most relevant pixel of each prompt and checks whether it lies in one of the prompt's boxes.

    Args:
        maps: Relevancy of each level and prompt.
        boxes: Per prompt x1 y1 x2 y2 in pixels, borders included. Where several pixels are equally relevant, one in a
            box is enough.
        settings: The relevancy pool.
    """
    pool, _ = settings.pools(maps.shape[-1])
    hits, levels, peaks = [], [], []
    for prompt, own_boxes in enumerate(boxes):
        averaged = box_average(maps[:, prompt], pool)
        level = int(averaged.amax(dim=(1, 2)).argmax())
        y, x = (averaged[level] == averaged[level].max()).nonzero().T
        left, top, right, bottom = own_boxes.to(maps.device).T[:, :, None]
        hits.append(bool(((left <= x) & (x <= right) & (top <= y) & (y <= bottom)).any()))
        levels.append(level)
        peaks.append((int(x[0]), int(y[0])))
    return Localization(
        torch.tensor(hits, dtype=torch.bool, device=maps.device),
        torch.tensor(levels, dtype=torch.int64, device=maps.device),
        torch.tensor(peaks, dtype=torch.int64, device=maps.device).reshape(-1, 2),
    )


def intersection_over_union(
    masks: Bool[Tensor, "*batch height width"], targets: Bool[Tensor, "*batch height width"]
) -> Float[Tensor, "*batch"]:
    """Returns the share of the united pixels that both masks have; 0 where both are empty."""
    intersection = (masks & targets).sum(dim=(-2, -1))
    union = (masks | targets).sum(dim=(-2, -1))
    return intersection / union.clamp_min(1)


def best_level_masks(
    level_masks: Bool[Tensor, "levels prompts height width"], targets: Bool[Tensor, "prompts height width"]
) -> Bool[Tensor, "prompts height width"]:
    """Returns each prompt's mask at the level that fits its label best: what a perfect choice of level would give."""
    best = intersection_over_union(level_masks, targets.expand_as(level_masks)).argmax(dim=0)
    return level_masks[best, torch.arange(targets.shape[0], device=best.device)]
