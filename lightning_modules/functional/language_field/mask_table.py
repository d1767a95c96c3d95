"""All masks of the training views in one table, gathered from the processes that blended the views."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lightning_modules.functional.collectives import gather_rows
from lightning_modules.functional.language_field.lifting import MaskWeights


class MaskTable(NamedTuple):
    """The masks of all training views, ordered by view, and what the Gaussians contribute to them.

    Attributes:
        features: [M, C] unit features.
        view_ids: [M] view of each mask, never decreasing.
        weights: Per level, the sparse Gaussian-by-mask matrix of summed blending weights over this table.
    """

    features: Float[Tensor, "masks channels"]
    view_ids: Int[Tensor, " masks"]
    weights: list[MaskWeights]


def gather_mask_table(
    features: Sequence[Float[Tensor, "_ channels"]], view_ids: Sequence[int], weights: Sequence[Sequence[MaskWeights]]
) -> MaskTable:
    """Joins the views of all processes into one table; every process gets the same table, whatever its share was.

    Args:
        features: Of each view of this process, the features of its masks.
        view_ids: Of each view of this process, its number; no two processes have the same view.
        weights: Per level and view of this process, the weights over that view's own masks.
    """
    num_masks = torch.tensor([len(part) for part in features])
    own_views = torch.tensor(view_ids).repeat_interleave(num_masks).to(features[0].device)
    views_by_rank = gather_rows(own_views)
    views = torch.cat(views_by_rank)
    order = views.argsort(stable=True)
    position = torch.empty_like(order)  # row in the table, by position in rank order
    position[order] = torch.arange(len(order), device=order.device)
    rows_by_rank = position.split([len(part) for part in views_by_rank])
    starts = [0, *num_masks.cumsum(0).tolist()]
    return MaskTable(
        torch.cat(gather_rows(torch.cat(list(features))))[order],
        views[order],
        [_gather_level(parts, starts, rows_by_rank) for parts in weights],
    )


def _gather_level(parts: Sequence[MaskWeights], starts: list[int], rows_by_rank: Sequence[Tensor]) -> MaskWeights:
    gaussians = gather_rows(torch.cat([part.gaussian_ids for part in parts]))
    masks = gather_rows(torch.cat([part.mask_ids + start for part, start in zip(parts, starts, strict=False)]))
    values = torch.cat(gather_rows(torch.cat([part.weights for part in parts])))
    rows = torch.cat([rows[part.long()] for rows, part in zip(rows_by_rank, masks, strict=True)])
    num_masks = sum(len(rows) for rows in rows_by_rank)
    # One order for every number of processes, so that sums over it round alike.
    by_gaussian = (torch.cat(gaussians).long() * num_masks + rows).argsort()
    return MaskWeights(
        torch.cat(gaussians)[by_gaussian],
        rows[by_gaussian].to(gaussians[0].dtype),
        values[by_gaussian],
        parts[0].num_gaussians,
        num_masks,
    )
