"""Attention of every row to its own few neighbours, for points and grid cells alike."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


def neighbourhood_weights(
    queries: Float[Tensor, "rows heads depth"],
    keys: Float[Tensor, "rows heads depth"],
    neighbour_ids: Int[Tensor, "rows neighbours"],
    bias: Float[Tensor, "rows neighbours heads"] | None = None,
) -> Float[Tensor, "rows neighbours heads"]:
    """Returns the attention of each row to its neighbours: softmax(q . k / sqrt(depth) + bias), in float32.

    Args:
        queries: Of the rows.
        keys: Of the rows as neighbours.
        neighbour_ids: Rows; -1 = none, with weight 0. A row without any neighbour has weights of 0.
        bias: Added to the scores; -inf leaves a neighbour out.
    """
    present = neighbour_ids >= 0
    depth = queries.shape[-1]
    near = F.embedding(neighbour_ids.clamp_min(0).long(), keys.flatten(1)).unflatten(-1, keys.shape[1:])
    scores = torch.einsum("rhd,rnhd->rnh", queries, near).float() / math.sqrt(depth)
    if bias is not None:
        scores = scores + bias.float()
    scores = scores.masked_fill(~present[..., None], -torch.inf)
    nothing = (scores == -torch.inf).all(dim=1, keepdim=True)  # softmax of nothing is nan, and so is its gradient
    return scores.masked_fill(nothing, 0.0).softmax(dim=1).masked_fill(nothing, 0.0)


def attend(
    weights: Float[Tensor, "rows neighbours heads"],
    values: Float[Tensor, "rows heads depth"],
    neighbour_ids: Int[Tensor, "rows neighbours"],
) -> Float[Tensor, "rows heads depth"]:
    """Sums the neighbours' values, head by head; what is not there must have weight 0."""
    near = F.embedding(neighbour_ids.clamp_min(0).long(), values.flatten(1)).unflatten(-1, values.shape[1:])
    return torch.einsum("rnh,rnhd->rhd", weights.to(values.dtype), near)


def weighted_neighbours(
    weights: Float[Tensor, "rows neighbours"],
    values: Float[Tensor, "rows channels"],
    neighbour_ids: Int[Tensor, "rows neighbours"],
) -> Float[Tensor, "rows channels"]:
    """Sums the neighbours' values with one weight each, in float32, without storing a copy of each row's neighbours.

    For wide values: 512 channels of 20,000 points with 32 neighbours would be 1.3 GB.
    """
    return F.embedding_bag(
        neighbour_ids.clamp_min(0).long(), values.float(), per_sample_weights=weights.float(), mode="sum"
    )
