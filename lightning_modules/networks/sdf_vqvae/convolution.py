"""Layers on sparse tensors: convolution, normalisation, and the steps between levels."""

import math
from typing import Literal

import torch
from torch import nn
from typing_extensions import override

from lightning_modules.functional.sdf_vqvae import spconv_backend
from lightning_modules.functional.sdf_vqvae.group_normalisation import group_normalisation
from lightning_modules.functional.sdf_vqvae.submanifold_convolution import submanifold_convolution
from lightning_modules.networks.sdf_vqvae.sparse_tensor import SparseTensor, Voxels

Backend = Literal["torch", "spconv"]
"""Who convolves: our own code, everywhere, or spconv, where it is installed. Both give the same numbers."""


class _Kernel(nn.Module):
    """Weight (output, dx, dy, dz, input), spconv's layout, and bias."""

    def __init__(self, inputs: int, outputs: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, size, size, size, inputs))
        self.bias = nn.Parameter(torch.zeros(outputs))
        # He's rule: decoder blocks have neither norm nor skip, and a smaller gain would fade within a few of them.
        bound = math.sqrt(6 / (size**3 * inputs))
        nn.init.uniform_(self.weight, -bound, bound)


class SparseConv3d(nn.Module):
    """A submanifold convolution, or for size 1 a linear map of every voxel.

    Args:
        inputs: Channels in.
        outputs: Channels out.
        size: Of the kernel: 3 or 1.
        backend: Who computes it.
    """

    def __init__(self, inputs: int, outputs: int, size: int = 3, *, backend: Backend = "torch") -> None:
        super().__init__()
        if size not in (1, 3):
            raise ValueError(f"a sparse convolution has kernels of size 1 or 3, got {size}.")
        if backend == "spconv":
            spconv_backend.check_spconv()
        self.backend = backend
        self.conv = _Kernel(inputs, outputs, size)

    @override
    def forward(self, tensor: SparseTensor) -> SparseTensor:
        """Returns new features on the same voxels."""
        weight, bias = self.conv.weight, self.conv.bias
        if weight.shape[1] == 1:
            return tensor.with_feats(nn.functional.linear(tensor.feats, weight.flatten(1), bias))
        if self.backend == "spconv" and len(tensor.voxels):
            feats = spconv_backend.submanifold_convolution(tensor.feats, weight, bias, tensor.voxels.pairs)
        else:
            feats = submanifold_convolution(tensor.feats, weight, bias, tensor.voxels.neighbours)
        return tensor.with_feats(feats)


class SparseLinear(nn.Linear):
    """A linear map of every voxel's features.

    Args:
        inputs: Channels in.
        outputs: Channels out.
        exact: Computes in the type of the weights under autocast too, for results that bfloat16 would round.
    """

    def __init__(self, inputs: int, outputs: int, *, exact: bool = False) -> None:
        super().__init__(inputs, outputs)
        self.exact = exact

    @override
    def forward(self, tensor: SparseTensor) -> SparseTensor:
        """Returns new features on the same voxels."""
        if not self.exact:
            return tensor.with_feats(super().forward(tensor.feats))
        with torch.autocast(tensor.feats.device.type, enabled=False):
            return tensor.with_feats(super().forward(tensor.feats.to(self.weight.dtype)))


class SparseGroupNorm(nn.GroupNorm):
    """Group normalisation of each shape over its voxels, 32 groups or, of fewer channels, the most that divide them.

    Args:
        channels: To normalise.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(math.gcd(32, channels), channels)

    @override
    def forward(self, tensor: SparseTensor) -> SparseTensor:
        """Returns the normalised features."""
        layout = tensor.voxels.layout
        feats = group_normalisation(tensor.feats, self.weight, self.bias, layout, self.num_groups, self.eps)
        return tensor.with_feats(feats)


class SparseActivation(nn.Module):
    """A function of every number, such as ``nn.SiLU()``.

    Args:
        function: To apply to the features.
    """

    def __init__(self, function: nn.Module) -> None:
        super().__init__()
        self.function = function

    @override
    def forward(self, tensor: SparseTensor) -> SparseTensor:
        """Returns the function of the features."""
        return tensor.with_feats(self.function(tensor.feats))


class SparseDownsample(nn.Module):
    """Halves the resolution: each parent voxel takes the mean of its children.

    Args:
        include_self: Divides by one more than the number of children, as Direct3D-S2 and TRELLIS v1 do
            (``scatter_reduce`` counts the zero it starts from); their weights want it.
    """

    def __init__(self, *, include_self: bool = False) -> None:
        super().__init__()
        self.include_self = include_self

    @override
    def forward(self, tensor: SparseTensor) -> SparseTensor:
        """Returns the parents' features.

        Raises:
            ValueError: If the resolution is odd.
        """
        parents, rows = tensor.voxels.parents
        sums = tensor.feats.new_zeros(len(parents), tensor.feats.shape[1]).index_add(0, rows, tensor.feats)
        counts = tensor.voxels.occupancy.sum(1, keepdim=True) + int(self.include_self)
        return SparseTensor(sums / counts.to(sums.dtype), parents)


def subdivide(tensor: SparseTensor, children: Voxels | None = None) -> SparseTensor:
    """Doubles the resolution: children copy their parents' features.

    Args:
        tensor: The parents.
        children: Voxels of which these are the parents, in any order; None makes all eight of each.
    """
    if children is None:
        copied = tensor.feats[:, None].expand(-1, 8, -1).flatten(0, 1)
        return SparseTensor(copied, tensor.voxels.children())
    return SparseTensor(tensor.feats.index_select(0, children.parents.rows), children)
