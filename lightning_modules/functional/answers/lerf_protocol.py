"""How LERF-OVS, 3D-OVS and Mip-NeRF360-OVS are scored, as LangSplatV2's scripts do it: relevancy to masks and points.

All three smooth, stretch, cut and smooth again; they differ in thresholds, and in how the level of a prompt is chosen.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

PROTOCOL_WIDTH = 988  # pixels; LERF-OVS images, to which the pools of 29 and 7 belong


@dataclass(frozen=True)
class ProtocolSettings:
    """Settings of the evaluation; the defaults are LERF-OVS's (``eval_lerf.py``).

    3D-OVS (``eval_3d_ovs.py``) has a threshold of 0.25, the level score ``mean_in_mask``, the levels 1 and 2, and in
    the scene room a companion; Mip-NeRF360-OVS (``eval_mip_nerf360.py``) has the level score ``mean_in_mask``.

    Raises:
        ValueError: If a pool is even or below one, the threshold is not in 0..1, or a name is unknown.
    """

    relevancy_pool: int = 29
    """Side of the average over relevancy, pixels, odd."""
    mask_pool: int = 7
    """Side of the majority vote over the mask, pixels, odd."""
    mask_threshold: float = 0.4
    """Threshold on the relevancy stretched to -1..1: 0.4 is 0.7 of the way from its minimum to its maximum."""
    pool_scaling: Literal["protocol", "relative"] = "protocol"
    """``protocol`` takes the pools as they are, ``relative`` scales them by image width / 988, to odd sides from 3."""
    smoothing: Literal["code", "paper"] = "code"
    """Before the threshold, LangSplatV2's ``code`` takes half the map and half its average, its ``paper`` (appendix C)
    the average alone. Points are the peaks of the average in both."""
    level_score: Literal["peak", "mean_in_mask"] = "peak"
    """The level that answers has the highest peak of the smoothed relevancy, or the highest mean over its own mask.
    An empty mask scores 0; the scripts divide by zero there and then take that level, for NaN wins their maximum."""
    competing_levels: tuple[int, ...] | None = None
    """Levels of the field, from 0, that may answer; null for all. 3D-OVS: 1 and 2 of small, medium, large."""
    companions: dict[str, str] = field(default_factory=dict)
    """Prompts whose mask is united, in evaluation, with that of a second prompt before the majority vote. 3D-OVS's
    scene room: ``wood wall`` with ``wood table``. As in the script, the second one's relevancy is not smoothed, and the
    first one's chooses the level."""

    def __post_init__(self) -> None:
        for name, side in (("relevancy_pool", self.relevancy_pool), ("mask_pool", self.mask_pool)):
            if side < 1 or side % 2 == 0:
                raise ValueError(f"{name} must be odd and at least 1, so that it has a centre; got {side}.")
        if not 0 <= self.mask_threshold < 1:
            raise ValueError(f"mask_threshold must be from 0 to below 1, got {self.mask_threshold}.")
        for name, allowed in (
            ("pool_scaling", ("protocol", "relative")),
            ("smoothing", ("code", "paper")),
            ("level_score", ("peak", "mean_in_mask")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be {' or '.join(map(repr, allowed))}, got {getattr(self, name)!r}.")
        levels = self.competing_levels
        if levels is not None and (not levels or min(levels) < 0 or len(set(levels)) != len(levels)):
            raise ValueError(
                f"competing_levels is {list(levels)}; allowed: numbers of levels from 0, none twice, or null for all."
            )

    def check_levels(self, num_levels: int) -> None:
        """Refuses settings that a field of a number of levels cannot follow.

        Raises:
            ValueError: If ``competing_levels`` names a level that there is not.
        """
        levels = self.competing_levels
        if levels is not None and max(levels) >= num_levels:
            raise ValueError(
                f"competing_levels is {list(levels)}, but there are {num_levels} levels; allowed: 0 to "
                f"{num_levels - 1}. Set model.init_args.protocol.competing_levels, or train those levels."
            )

    def pools(self, width: int) -> tuple[int, int]:
        """Returns both pools in pixels for images of a width."""
        if self.pool_scaling == "protocol":
            return self.relevancy_pool, self.mask_pool
        scale = width / PROTOCOL_WIDTH
        return _odd(self.relevancy_pool * scale), _odd(self.mask_pool * scale)


def _odd(side: float) -> int:
    return max(3, 2 * math.floor(side / 2) + 1)  # the nearest; of two equally near ones the larger


class Segmentation(NamedTuple):
    """Masks of Q prompts.

    Attributes:
        masks: [Q, H, W] masks at the chosen level.
        levels: [Q] chosen level: the competing one with the highest score.
        scores: [L, Q] peak of the smoothed relevancy, or its mean over the mask.
        level_masks: [L, Q, H, W] masks of every level.
        relevancy: [Q, H, W] smoothed relevancy at the chosen level.
        level_relevancy: [L, Q, H, W] smoothed relevancy of every level.
    """

    masks: Bool[Tensor, "prompts height width"]
    levels: Int[Tensor, " prompts"]
    scores: Float[Tensor, "levels prompts"]
    level_masks: Bool[Tensor, "levels prompts height width"]
    relevancy: Float[Tensor, "prompts height width"]
    level_relevancy: Float[Tensor, "levels prompts height width"]


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


def box_sum(maps: Shaped[Tensor, "*batch height width"], side: int) -> Shaped[Tensor, "*batch height width"]:
    """Sums over a square of odd side around each pixel; at the border over the part inside the image.

    Sums of 1, 2, 4, ... neighbours are made from each other, so that the work grows with the logarithm of the side.
    """
    for dim, padding in ((-1, (side // 2, side // 2)), (-2, (0, 0, side // 2, side // 2))):
        length = maps.shape[dim]
        runs, total = F.pad(maps, padding), torch.zeros_like(maps)
        width, offset, left = 1, 0, side
        while left:
            if left & width:  # the side's binary digits say which runs, one after another, fill it
                total = total + runs.narrow(dim, offset, length)
                offset, left = offset + width, left - width
            rest = runs.shape[dim] - width
            runs = runs.narrow(dim, 0, rest) + runs.narrow(dim, width, rest) if left else runs
            width *= 2
        maps = total
    return maps


def box_average(maps: Float[Tensor, "*batch height width"], side: int) -> Float[Tensor, "*batch height width"]:
    """Averages over a square of odd side around each pixel; at the border over the part inside the image."""
    return box_sum(maps, side) / box_sum(maps.new_ones(maps.shape[-2:]), side)


def majority(masks: Bool[Tensor, "*batch height width"], side: int) -> Bool[Tensor, "*batch height width"]:
    """Returns where more than half of the square of odd side around a pixel is set; counts only what is inside."""
    counts = masks.to(torch.int32)
    return 2 * box_sum(counts, side) > box_sum(counts.new_ones(counts.shape[-2:]), side)


def segment(
    maps: Float[Tensor, "levels prompts height width"],
    settings: ProtocolSettings,
    *,
    companions: Mapping[int, Float[Tensor, "levels height width"]] | None = None,
) -> Segmentation:
    """Turns relevancy maps into a mask per prompt.

    Args:
        maps: Relevancy of each level and prompt.
        settings: Pools, threshold and choice of level.
        companions: Relevancy maps of the second prompt, by the number of the prompt whose mask is united with its.

    Raises:
        ValueError: If a map holds NaN, or ``competing_levels`` names a level that there is not.
    """
    relevancy_pool, mask_pool = settings.pools(maps.shape[-1])
    settings.check_levels(maps.shape[0])
    competing = settings.competing_levels or tuple(range(maps.shape[0]))
    smoothed = torch.empty_like(maps)
    level_masks = torch.empty_like(maps, dtype=torch.bool)
    for prompt in range(maps.shape[1]):  # one prompt at a time: temporaries stay in the cache
        own = maps[:, prompt]
        smooth = box_average(own, relevancy_pool)
        smooth = 0.5 * (smooth + own) if settings.smoothing == "code" else smooth
        above = _above_threshold(smooth, settings)
        if companions and prompt in companions:
            above |= _above_threshold(companions[prompt], settings)
        level_masks[:, prompt] = majority(above, mask_pool)
        smoothed[:, prompt] = smooth
    peaks = smoothed.amax(dim=(2, 3))
    _check_peaks(peaks)
    scores = peaks if settings.level_score == "peak" else _means_in_masks(smoothed, level_masks)
    levels = torch.tensor(competing, device=maps.device)[scores[list(competing)].argmax(dim=0)]
    prompts = torch.arange(maps.shape[1], device=maps.device)
    chosen = level_masks[levels, prompts], levels, scores, level_masks, smoothed[levels, prompts], smoothed
    return Segmentation(*chosen)


def _above_threshold(maps: Tensor, settings: ProtocolSettings) -> Tensor:
    """Stretches each level's map to -1..1 and cuts it."""
    above = maps - maps.amin(dim=(1, 2), keepdim=True)
    stretched = (2 * (above / (above.amax(dim=(1, 2), keepdim=True) + 1e-9)) - 1).clamp(0, 1)
    return stretched > settings.mask_threshold


def _means_in_masks(maps: Tensor, masks: Tensor) -> Tensor:
    """Returns the mean of each map over its mask, 0 where the mask is empty."""
    sums = torch.stack([(level * mask).sum(dim=(1, 2)) for level, mask in zip(maps, masks, strict=True)])
    return sums / masks.sum(dim=(2, 3)).clamp_min(1)


def localize(
    maps: Float[Tensor, "levels prompts height width"],
    boxes: Sequence[Float[Tensor, "_ 4"]],
    settings: ProtocolSettings,
) -> Localization:
    """Points at the most relevant pixel of each prompt and checks whether it lies in one of the prompt's boxes.

    Args:
        maps: Relevancy of each level and prompt.
        boxes: Per prompt, two opposite corners x y x y in pixels, borders included. Pixels count by their column and
            row number, as in the protocol. Where several are equally relevant, one in a box is enough.
        settings: The relevancy pool.

    Raises:
        ValueError: If there are more or fewer sets of boxes than prompts, or a map holds NaN.
    """
    if len(boxes) != maps.shape[1]:
        raise ValueError(f"There are {maps.shape[1]} prompts but boxes for {len(boxes)}; give one tensor per prompt.")
    pool, _ = settings.pools(maps.shape[-1])
    hits, levels, peaks = [], [], []
    for prompt, own_boxes in enumerate(boxes):
        averaged = box_average(maps[:, prompt], pool)
        heights = averaged.amax(dim=(1, 2))
        _check_peaks(heights)
        level = int(heights.argmax())
        y, x = (averaged[level] == heights[level]).nonzero().T
        corners = own_boxes.to(maps.device).unflatten(1, (2, 2))
        left, top = corners.amin(1).T[..., None]
        right, bottom = corners.amax(1).T[..., None]
        hits.append(bool(((left <= x) & (x <= right) & (top <= y) & (y <= bottom)).any()))
        levels.append(level)
        peaks.append((int(x[0]), int(y[0])))
    return Localization(
        torch.tensor(hits, dtype=torch.bool, device=maps.device),
        torch.tensor(levels, dtype=torch.int64, device=maps.device),
        torch.tensor(peaks, dtype=torch.int64, device=maps.device).reshape(-1, 2),
    )


def _check_peaks(peaks: Tensor) -> None:
    # A maximum takes NaN for the largest value, so an empty level would win and go unnoticed.
    if bool(peaks.isnan().any()):
        raise ValueError("Relevancy maps hold NaN: check the field's codes and the text embeddings for it.")


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
