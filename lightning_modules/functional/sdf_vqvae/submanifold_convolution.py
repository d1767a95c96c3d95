"""Submanifold convolution of 3 x 3 x 3 (arXiv 1711.10275): active voxels stay as they are, others count as zero.

Output-stationary: a block of voxels gathers its 27 neighbours' features side by side and multiplies them with the
kernel in one matrix product. Nothing is scattered, so CUDA needs no atomics, and sums come out the same every time.
"""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int32
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_modules.functional.sdf_vqvae.matrix_product import product_with_rows
from lightning_modules.functional.sdf_vqvae.neighbour_maps import NUM_OFFSETS

_CPU_ROWS = 2048  # of a block: its gathered features stay in the cache
_CUDA_ELEMENTS = 1 << 26  # gathered at a time: enough to fill the device, a quarter of a GiB in float32


def submanifold_convolution(
    feats: Float[Tensor, "voxels inputs"],
    weight: Float[Tensor, "outputs 3 3 3 inputs"],
    bias: Float[Tensor, " outputs"] | None,
    neighbours: Int32[Tensor, "voxels 27"],
) -> Float[Tensor, "voxels outputs"]:
    """Convolves the features of sparse voxels, at these voxels.

    Cross-correlation, as ``F.conv3d`` with ``padding=1`` computes it on the dense grid at the active voxels. Under
    autocast the products are computed in its type and the output has it; the gradients of the parameters are summed in
    float32 all the same.

    Args:
        feats: Rows of the voxels.
        weight: Kernel (output, dx, dy, dz, input): spconv's layout, which ``permute(0, 4, 1, 2, 3)`` makes conv3d's.
        bias: Added to every row.
        neighbours: The voxels' :func:`~.neighbour_maps.neighbour_map`; build it once for all convolutions of a level.
    """
    device_type = feats.device.type
    dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else feats.dtype
    return _SubmanifoldConvolution.apply(feats, weight, bias, neighbours, dtype)


class _SubmanifoldConvolution(torch.autograd.Function):
    """The map of neighbours is symmetric, so the gradient is a convolution by the mirrored kernel.

    One gather of the output's gradient serves both gradients: row i of it holds what its neighbours pass back to
    voxel i, whose product with the kernel is the gradient of the features, and with the features that of the kernel.
    """

    @staticmethod
    def forward(
        ctx: Any, feats: Tensor, weight: Tensor, bias: Tensor | None, neighbours: Tensor, dtype: torch.dtype
    ) -> Tensor:
        ctx.feats_dtype = feats.dtype
        feats = feats.to(dtype)
        ctx.save_for_backward(feats, weight, bias, neighbours)
        kernel = weight.to(dtype).flatten(1)
        output = feats.new_empty(len(feats), len(weight))
        for rows, gathered in _gathered_blocks(feats, neighbours):
            output[rows] = product_with_rows(gathered, kernel, None)
        return output if bias is None else output.add_(bias.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, output_grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        feats, weight, bias, neighbours = ctx.saved_tensors
        wants_feats, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        output_grad = output_grad.to(feats.dtype).contiguous()
        outputs, inputs = weight.shape[0], weight.shape[-1]
        sum_dtype = torch.promote_types(feats.dtype, torch.float32)
        mirrored = weight.to(feats.dtype).flatten(1, 3).flip(1).permute(2, 1, 0).reshape(inputs, NUM_OFFSETS * outputs)
        feats_grad = torch.empty_like(feats) if wants_feats else None
        mirrored_grad = torch.zeros_like(mirrored, dtype=sum_dtype) if wants_weight else None
        if wants_feats or wants_weight:
            for rows, gathered in _gathered_blocks(output_grad, neighbours):
                if feats_grad is not None:
                    feats_grad[rows] = product_with_rows(gathered, mirrored, None)
                if mirrored_grad is not None:
                    mirrored_grad += product_with_rows(feats[rows].t(), gathered.t(), None)
        weight_grad = bias_grad = None
        if mirrored_grad is not None:
            by_offset = mirrored_grad.view(inputs, NUM_OFFSETS, outputs).flip(1).permute(2, 1, 0)
            weight_grad = by_offset.reshape(weight.shape).to(weight.dtype)
        if wants_bias:
            bias_grad = output_grad.sum(0, dtype=sum_dtype).to(bias.dtype)
        return (None if feats_grad is None else feats_grad.to(ctx.feats_dtype)), weight_grad, bias_grad, None, None


def _gathered_blocks(feats: Tensor, neighbours: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yields blocks of rows with their neighbours' features side by side; the buffer is used again."""
    num_voxels, channels = feats.shape
    padded = torch.cat([feats, feats.new_zeros(1, channels)])  # the row of the neighbours that are not there
    width = NUM_OFFSETS * channels
    block = _CPU_ROWS if feats.device.type == "cpu" else max(1, _CUDA_ELEMENTS // width)
    buffer = feats.new_empty(min(block, num_voxels) * NUM_OFFSETS, channels)
    for start in range(0, num_voxels, block):
        rows = slice(start, min(start + block, num_voxels))
        ids = neighbours[rows].flatten()
        gathered = buffer[: len(ids)]
        torch.index_select(padded, 0, ids, out=gathered)
        yield rows, gathered.view(-1, width)
