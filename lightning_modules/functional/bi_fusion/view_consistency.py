"""The same surface seen from several frames: which points correspond, and whether their features agree."""

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lightning_modules.functional.bi_fusion.ball_query import ball_query
from lightning_modules.functional.bi_fusion.fusion_losses import unit_rows
from lightning_modules.functional.projection import DEPTH_TOLERANCE_M, build_uv_index

ConsistencyKind = Literal["stop_gradient", "info_nce"]


@torch.no_grad()
def view_correspondences(
    points_a: Float[Tensor, "points_a 3"],
    points_b: Float[Tensor, "points_b 3"],
    intrinsics_b: Float[Tensor, "3 3"],
    camera_from_world_b: Float[Tensor, "4 4"],
    size: tuple[int, int],
    depth_b: Float[Tensor, "height width"],
    max_distance: float = DEPTH_TOLERANCE_M,
) -> Int[Tensor, "pairs 2"]:
    """Pairs each point of frame a that frame b sees with the nearest point of b.

    A point counts as seen if its depth agrees with b's depth map (``projection.build_uv_index``: 5 cm, or 2 % beyond
    2.5 m), so that surfaces hidden from b get no partner behind or before them. Several points of a may share one of b.

    For frames that each have points of their own. Where views share points, as in ``BiFusionModule``, the points that
    both see are the pairs.

    Args:
        points_a: World coordinates, metres.
        points_b: Likewise; any subset of what b shows.
        intrinsics_b: Of b's image at ``size``.
        camera_from_world_b: b's camera.
        size: Height and width of b's image.
        depth_b: Registered to it, of any size, metres, 0 = none.
        max_distance: Partners farther apart than this are none, metres.

    Returns:
        Rows of ``points_a`` and of ``points_b``, sorted by the first.
    """
    seen = build_uv_index(points_a, intrinsics_b, camera_from_world_b, size, depth_b).valid.nonzero()[:, 0]
    partner = ball_query(points_b, max_distance, 1, queries=points_a[seen])[:, 0].long()
    return torch.stack([seen, partner], dim=1)[partner >= 0]


def cross_view_consistency(
    features_a: Float[Tensor, "points_a channels"],
    features_b: Float[Tensor, "points_b channels"],
    pairs: Int[Tensor, "pairs 2"],
    kind: ConsistencyKind = "stop_gradient",
    temperature: float = 0.07,
    groups: Int[Tensor, " pairs"] | None = None,
) -> Float[Tensor, " pairs"]:
    """Asks corresponding points of two frames for the same feature: ``ClipConsCriterion``.

    ``stop_gradient``: 1 - cos(a_i, b_j) with b as a fixed target; swap the frames for the other direction. Features
    that are all the same make it zero, so it must never be the only loss.

    ``info_nce``: -log of the softmax of cos(a_i, b_j) / temperature among the b sides of all pairs, both sides with
    gradient (ESAM's contrast of adjacent frames has the same form and temperature). Other pairs of the same point, or
    of the same group, are no negatives. Memory is quadratic in the pairs: draw some.

    Args:
        features_a: Of any length.
        features_b: Of any length.
        pairs: Rows of a and of b.
        kind: As above.
        temperature: Of ``info_nce``.
        groups: Class, instance or superpoint of each pair; -1 = unknown, which is never the same. For ``info_nce``.
    """
    a, b = unit_rows(features_a[pairs[:, 0]]), unit_rows(features_b[pairs[:, 1]])
    if kind == "stop_gradient":
        return 1 - (a * b.detach()).sum(dim=-1)
    with torch.autocast(features_a.device.type, enabled=False):
        logits = (a @ b.T) / temperature
    logits = logits.masked_fill(_false_negatives(pairs, groups), -torch.inf)
    return logits.logsumexp(dim=1) - logits.diagonal()


def _false_negatives(
    pairs: Int[Tensor, "pairs 2"], groups: Int[Tensor, " pairs"] | None
) -> Bool[Tensor, "pairs pairs"]:
    """Marks pairs that must not be pushed apart: those that share a point or a group; none with itself."""
    same = (pairs[:, None] == pairs[None]).any(dim=-1)
    if groups is not None:
        same |= (groups[:, None] == groups[None]) & (groups[:, None] >= 0)
    return same.fill_diagonal_(False)
