"""Group normalisation of ragged batches: statistics per shape and group of channels, for all shapes at once."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable

_RUN = 256  # rows summed in float32; runs are summed in float64


class RowLayout(NamedTuple):
    """Which rows of a ragged batch belong to which shape; a shape's rows follow each other.

    Attributes:
        shape_ids: Shape of each row.
        counts: Rows of each shape.
        run_starts: First row of each run: at most 256 rows of one shape, in order, without gaps.
        run_shapes: Shape of each run.
    """

    shape_ids: Int64[Tensor, " rows"]
    counts: Int64[Tensor, " shapes"]
    run_starts: Int64[Tensor, " runs"]
    run_shapes: Int64[Tensor, " runs"]


@torch.no_grad()
def row_layout(shape_ids: Int[Tensor, " rows"], num_shapes: int) -> RowLayout:
    """Describes a batch.

    Args:
        shape_ids: Shape of each row, rising.
        num_shapes: Shapes of the batch; some may have no rows.
    """
    shape_ids = shape_ids.long()
    counts = torch.bincount(shape_ids, minlength=num_shapes)
    runs = (counts + _RUN - 1).div(_RUN, rounding_mode="floor")
    run_shapes = torch.repeat_interleave(torch.arange(num_shapes, device=counts.device), runs)
    number = torch.arange(len(run_shapes), device=counts.device) - (runs.cumsum(0) - runs)[run_shapes]
    return RowLayout(shape_ids, counts, (counts.cumsum(0) - counts)[run_shapes] + _RUN * number, run_shapes)


def shape_sums(values: Float[Tensor, "rows channels"], layout: RowLayout) -> Float[Tensor, "shapes channels"]:
    """Sums the rows of each shape, in two steps that keep float32 exact enough for millions of rows.

    Returns:
        In float64; zero for shapes without rows.
    """
    sums = values.new_zeros(len(layout.counts), values.shape[1], dtype=torch.float64)
    if len(values) == 0:
        return sums
    rows = torch.arange(len(values), device=values.device)
    by_run = F.embedding_bag(rows, values, layout.run_starts, mode="sum")
    return sums.index_add_(0, layout.run_shapes, by_run.double())


def group_normalisation(
    feats: Float[Tensor, "rows channels"],
    weight: Float[Tensor, " channels"],
    bias: Float[Tensor, " channels"],
    layout: RowLayout,
    num_groups: int,
    epsilon: float = 1e-5,
) -> Float[Tensor, "rows channels"]:
    """Normalises each shape's rows to mean 0 and variance 1 in each group of channels, then scales and shifts them.

    ``F.group_norm`` of each shape as one item [1, channels, rows], in one pass over the batch. Statistics are computed
    in float32 at least, under autocast too; the result has the type of ``feats``.

    Args:
        feats: Rows of all shapes.
        weight: Scale of each channel.
        bias: Shift of each channel.
        layout: Which rows belong to which shape.
        num_groups: Divides the channels.
        epsilon: Added to the variance.
    """
    return _GroupNormalisation.apply(feats, weight, bias, layout, num_groups, epsilon)


class _GroupNormalisation(torch.autograd.Function):
    """Keeps the input and two numbers per shape and group, where autograd's own would keep four tensors of its size."""

    @staticmethod
    def forward(
        ctx: Any,
        feats: Tensor,
        weight: Tensor,
        bias: Tensor,
        layout: RowLayout,
        num_groups: int,
        epsilon: float,
    ) -> Tensor:
        values = feats.to(_statistics_dtype(feats))
        size = _group_sizes(layout, feats.shape[1], num_groups)
        mean = _over_groups(shape_sums(values, layout), num_groups) / size
        centred = values - _rows(mean, values, layout)
        variance = _over_groups(shape_sums(centred.square(), layout), num_groups) / size
        scale = (variance + epsilon).rsqrt()
        ctx.save_for_backward(feats, weight, mean, scale)
        ctx.layout, ctx.num_groups = layout, num_groups
        normalised = centred.mul_(_rows(scale * weight.double(), values, layout))
        return normalised.add_(bias.to(values.dtype)).to(feats.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, output_grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        feats, weight, mean, scale = ctx.saved_tensors
        layout, num_groups = ctx.layout, ctx.num_groups
        grad = output_grad.to(_statistics_dtype(feats))
        normalised = feats.to(grad.dtype) - _rows(mean, grad, layout)
        normalised.mul_(_rows(scale, grad, layout))
        size = _group_sizes(layout, feats.shape[1], num_groups)
        grad_sums, product_sums = shape_sums(grad, layout), shape_sums(grad * normalised, layout)
        mean_grad = _over_groups(grad_sums * weight.double(), num_groups) / size
        mean_product = _over_groups(product_sums * weight.double(), num_groups) / size
        feats_grad = normalised.mul_(_rows(-scale * mean_product, grad, layout))
        feats_grad.addcmul_(grad, _rows(scale * weight.double(), grad, layout))
        feats_grad.sub_(_rows(scale * mean_grad, grad, layout))
        weight_grad, bias_grad = product_sums.sum(0).to(weight.dtype), grad_sums.sum(0).to(weight.dtype)
        return feats_grad.to(feats.dtype), weight_grad, bias_grad, None, None, None


def _statistics_dtype(feats: Tensor) -> torch.dtype:
    return torch.promote_types(feats.dtype, torch.float32)


def _group_sizes(layout: RowLayout, channels: int, num_groups: int) -> Tensor:
    return (layout.counts[:, None] * (channels // num_groups)).clamp_min(1).double()


def _over_groups(sums: Tensor, num_groups: int) -> Tensor:
    """Sums over the channels of each group, and gives every channel its group's sum."""
    channels = sums.shape[1]
    by_group = sums.unflatten(1, (num_groups, channels // num_groups)).sum(2)
    return by_group.repeat_interleave(channels // num_groups, dim=1)


def _rows(by_shape: Tensor, like: Tensor, layout: RowLayout) -> Tensor:
    """Gives each row its shape's values; one shape's are broadcast."""
    by_shape = by_shape.to(like.dtype)
    return by_shape if len(by_shape) == 1 else by_shape[layout.shape_ids]
