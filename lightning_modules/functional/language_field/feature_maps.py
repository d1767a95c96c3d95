"""Decodes weight maps to feature maps: the dense path, for the L1 loss, for export and as reference.

Image layout ``[C, H, W]``, after LangSplatV2 (``compute_final_feature_map`` and its siblings). Queries and the cosine
loss need no feature map: see ``coefficient_space``. Arithmetic is in single precision or better whatever the input, a
block of pixels at a time, forward and backward; beside its result a call needs ``max_bytes`` of memory.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

NORM_EPS = 1e-10  # LangSplatV2's evaluation
MAX_BYTES = 64 * 2**20


# The arguments carry no shape annotation: they are checked here in every run, not in tests alone.
def compute_final_feature_map(
    weight_map: Tensor, codebook: Tensor, normalize: bool = False, *, max_bytes: int = MAX_BYTES
) -> Float[Tensor, "channels height width"]:
    """Decodes the sum of all layers.

    Args:
        weight_map: [layers * size, H, W] coefficients, layer by layer.
        codebook: [layers, size, C] entries, of the same dtype and device.
        normalize: Scale each pixel's feature to unit length; a feature of zero stays zero, without gradient.
        max_bytes: Memory for temporaries.

    Raises:
        ValueError: If ranks, sizes, dtypes or devices do not fit together.
    """
    _check_inputs(weight_map, codebook, ["layers * size", "H", "W"])
    _check_channels(weight_map, codebook)
    decoded = _Decode.apply(weight_map.flatten(1)[None], codebook.flatten(0, 1)[None], normalize, max_bytes)
    return decoded[0].unflatten(1, weight_map.shape[1:])


def compute_layer_feature_map(
    weight_map: Tensor, codebook: Tensor, layer_idx: int, normalize: bool = False, *, max_bytes: int = MAX_BYTES
) -> Float[Tensor, "channels height width"]:
    """Decodes the sum of the layers up to and including one; those below it are detached.

    Progressive training fits layer ``layer_idx`` to what the finished layers leave over.

    Args:
        weight_map: [layers * size, H, W] coefficients, layer by layer.
        codebook: [layers, size, C] entries, of the same dtype and device.
        layer_idx: From 0.
        normalize: Scale each pixel's feature to unit length; a feature of zero stays zero, without gradient.
        max_bytes: Memory for temporaries.

    Raises:
        ValueError: If ranks, sizes, dtypes or devices do not fit together, or there is no such layer.
    """
    _check_inputs(weight_map, codebook, ["layers * size", "H", "W"])
    _check_channels(weight_map, codebook)
    num_layers, size, _ = codebook.shape
    if not 0 <= layer_idx < num_layers:
        raise ValueError(f"layer_idx must be between 0 and {num_layers - 1} (layers - 1), got {layer_idx}.")
    first, end = layer_idx * size, (layer_idx + 1) * size
    # Only the small tensors are joined; adding two decoded maps would need a second map.
    weights = torch.cat([weight_map[:first].detach(), weight_map[first:end]])
    atoms = torch.cat([codebook[:layer_idx].detach(), codebook[layer_idx : layer_idx + 1]])
    return compute_final_feature_map(weights, atoms, normalize, max_bytes=max_bytes)


def compute_feature_map_quick(
    weight_map: Tensor, codebook: Tensor, normalize: bool = False, *, max_bytes: int = MAX_BYTES
) -> Float[Tensor, "channels height width"] | Float[Tensor, "layers channels height width"]:
    """Decodes each layer by itself, without a sum, in one batched product.

    In LangSplatV2's quick evaluation the first axis holds the levels, each with its codebook, which it then
    L2-normalises one by one (``normalize``).

    Args:
        weight_map: [layers, size, H, W] coefficients.
        codebook: [layers, size, C] entries, of the same dtype and device.
        normalize: Scale each feature to unit length; a feature of zero stays zero, without gradient.
        max_bytes: Memory for temporaries.

    Returns:
        [C, H, W] for one layer, [layers, C, H, W] for more.

    Raises:
        ValueError: If ranks, sizes, dtypes or devices do not fit together.
    """
    _check_inputs(weight_map, codebook, ["layers", "size", "H", "W"])
    if weight_map.shape[:2] != codebook.shape[:2]:
        raise ValueError(
            f"weight_map has [layers, size] = {list(weight_map.shape[:2])} but the codebook has "
            f"{list(codebook.shape[:2])}; they must be equal."
        )
    decoded = _Decode.apply(weight_map.flatten(2), codebook, normalize, max_bytes)
    decoded = decoded.unflatten(2, weight_map.shape[2:])
    return decoded[0] if codebook.shape[0] == 1 else decoded


def _check_inputs(weight_map: Tensor, codebook: Tensor, weight_axes: list[str]) -> None:
    for name, tensor, axes in (
        ("weight_map", weight_map, weight_axes),
        ("codebook", codebook, ["layers", "size", "C"]),
    ):
        if tensor.ndim != len(axes):
            raise ValueError(f"{name} must have the axes [{', '.join(axes)}], got the shape {list(tensor.shape)}.")
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be of a floating-point dtype, got {tensor.dtype}.")
    if weight_map.dtype != codebook.dtype:
        raise ValueError(
            f"weight_map is {weight_map.dtype} but the codebook is {codebook.dtype}; convert one with .to(...)."
        )
    if weight_map.device != codebook.device:
        raise ValueError(
            f"weight_map is on {weight_map.device} but the codebook is on {codebook.device}; move one with .to(...)."
        )


def _check_channels(weight_map: Tensor, codebook: Tensor) -> None:
    num_layers, size, _ = codebook.shape
    if weight_map.shape[0] != num_layers * size:
        raise ValueError(
            f"weight_map has {weight_map.shape[0]} channels but the codebook has {num_layers} layers x {size} entries "
            f"= {num_layers * size}; they must be equal."
        )


class _Decode(torch.autograd.Function):
    """[groups, size, pixels] x [groups, size, C] -> [groups, C, pixels], normalised or not, in blocks of pixels."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, atoms: Tensor, normalize: bool, max_bytes: int) -> Tensor:
        num_groups, size, num_pixels = weights.shape
        num_channels = atoms.shape[2]
        dtype = torch.promote_types(weights.dtype, torch.float32)
        transposed = atoms.to(dtype).transpose(1, 2)
        decoded = weights.new_empty(num_groups, num_channels, num_pixels)
        lengths = weights.new_empty(num_groups, 1, num_pixels, dtype=dtype) if normalize else None
        # Two blocks of features and one of weights are alive at once.
        pixel_bytes = num_groups * (2 * num_channels + size) * dtype.itemsize
        ctx.block = max(1, max_bytes // pixel_bytes)
        for start in range(0, num_pixels, ctx.block):
            columns = slice(start, start + ctx.block)
            features = transposed @ weights[..., columns].to(dtype)
            if lengths is not None:
                lengths[..., columns] = torch.linalg.vector_norm(features, dim=1, keepdim=True)
                features *= _reciprocal(lengths[..., columns])
            decoded[..., columns] = features
        ctx.save_for_backward(weights, atoms, *([decoded, lengths] if lengths is not None else []))
        return decoded

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        weights, atoms, *normalized = ctx.saved_tensors
        needs_weights, needs_atoms = ctx.needs_input_grad[:2]
        dtype = torch.promote_types(weights.dtype, torch.float32)
        entries = atoms.to(dtype)
        grad_weights = torch.empty_like(weights) if needs_weights else None
        grad_atoms = torch.zeros_like(entries) if needs_atoms else None
        for start in range(0, weights.shape[2], ctx.block):
            columns = slice(start, start + ctx.block)
            along = grad[..., columns].to(dtype)
            if normalized:
                units, lengths = (tensor[..., columns].to(dtype) for tensor in normalized)
                along = (along - units * (units * along).sum(1, keepdim=True)) * _reciprocal(lengths)
            if grad_weights is not None:
                grad_weights[..., columns] = entries @ along
            if grad_atoms is not None:
                grad_atoms.baddbmm_(weights[..., columns].to(dtype), along.transpose(1, 2))
        return grad_weights, None if grad_atoms is None else grad_atoms.to(atoms.dtype), None, None


def _reciprocal(lengths: Tensor) -> Tensor:
    return torch.where(lengths > NORM_EPS, lengths, torch.inf).reciprocal()
