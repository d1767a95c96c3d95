"""Structural similarity of images (Wang et al. 2004), as 3D Gaussian Splatting has it in its loss."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable


def structural_similarity(
    a: Float[Tensor, "*batch height width channels"], b: Float[Tensor, "*batch height width channels"]
) -> Float[Tensor, ""]:
    """Returns the mean SSIM of images in 0..1, with gradients, in float32.

    The window is a Gaussian of 11x11 pixels and sigma 1.5, the constants are 0.01^2 and 0.03^2, and beyond the borders
    are zeros; the mean is over pixels and channels. One gradient costs three filtered maps more: the derivative of the
    similarity with respect to the filtered moments, in closed form, filtered again (the window is symmetric).
    """
    return _Similarity.apply(a, b)


class _Similarity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        of_a, of_b = _rows(a), _rows(b)
        similarity, slopes = _compare(of_a, of_b, *a.shape[-3::2])
        ctx.save_for_backward(of_a, of_b, slopes)
        ctx.shape, ctx.dtype = a.shape, a.dtype
        return similarity.mean().to(a.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        a, b, slopes = ctx.saved_tensors
        height, _, channels = ctx.shape[-3:]
        scale = grads[0].float() / a.numel()
        gradients: list[Tensor | None] = [None, None]
        if ctx.needs_input_grad[0]:
            gradients[0] = _gradient(a, b, slopes, height, channels)
        if ctx.needs_input_grad[1]:
            gradients[1] = _gradient(b, a, _compare(b, a, height, channels)[1], height, channels)
        return tuple(None if x is None else (x * scale).to(ctx.dtype).reshape(ctx.shape) for x in gradients)


def _rows(images: Tensor) -> Tensor:
    """Returns [rows of all images, width times channels]."""
    return images.detach().float().contiguous().reshape(-1, images.shape[-2] * images.shape[-1])


def _compare(a: Tensor, b: Tensor, height: int, channels: int) -> tuple[Tensor, Tensor]:
    """Returns the similarity of each element [rows, length], and its slopes [3, rows, length] by the moments of a."""
    from lightning_modules.functional.kernels import similarity

    rows_filtered, slopes, out = a.new_empty(4, *a.shape), a.new_empty(3, *a.shape), torch.empty_like(a)
    _launch(similarity.filter_products, a, [channels, a, b, rows_filtered])
    _launch(similarity.compare, a, [height, rows_filtered, out, slopes])
    return out, slopes


def _gradient(a: Tensor, b: Tensor, slopes: Tensor, height: int, channels: int) -> Tensor:
    from lightning_modules.functional.kernels import similarity

    columns_filtered, out = torch.empty_like(slopes), torch.empty_like(a)
    _launch(similarity.filter_columns, a, [height, slopes, columns_filtered])
    _launch(similarity.gradient, a, [channels, a, b, columns_filtered, out])
    return out


def _launch(kernel: Any, rows: Tensor, arguments: list[Any]) -> None:
    from lightning_modules.functional.kernels import launch

    num_rows, length = rows.shape
    block = _elements_per_thread(rows)
    blocks_of_row = -(-length // block)
    launch.launch(kernel, num_rows * blocks_of_row, [block, *arguments], rows.device, min_block_rows=_MIN_BLOCK_ROWS)


def _elements_per_thread(rows: Tensor) -> int:
    return 1 if rows.is_cuda else rows.shape[1]


_MIN_BLOCK_ROWS = 32
