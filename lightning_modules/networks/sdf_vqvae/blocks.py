"""The convolution blocks between levels, with Direct3D-S2's names and order of layers."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from lightning_modules.networks.sdf_vqvae.convolution import (
    Backend,
    SparseActivation,
    SparseConv3d,
    SparseDownsample,
    SparseGroupNorm,
    SparseLinear,
    subdivide,
)
from lightning_modules.networks.sdf_vqvae.sparse_tensor import SparseTensor, Voxels


class SparseDownBlock3d(nn.Module):
    """Norm and activation, mean of children, two convolutions, beside the mean of the input through a linear map.

    Args:
        inputs: Channels in.
        outputs: Channels out.
        backend: Of the convolutions.
        include_self: As in :class:`SparseDownsample`.
    """

    def __init__(self, inputs: int, outputs: int, *, backend: Backend = "torch", include_self: bool = False) -> None:
        super().__init__()
        self.act_layers = nn.Sequential(SparseGroupNorm(inputs), SparseActivation(nn.SiLU()))
        self.down = SparseDownsample(include_self=include_self)
        self.out_layers = nn.Sequential(
            SparseConv3d(inputs, outputs, backend=backend),
            SparseGroupNorm(outputs),
            SparseActivation(nn.SiLU()),
            SparseConv3d(outputs, outputs, backend=backend),
        )
        self.skip_connection = SparseConv3d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    @override
    def forward(self, tensor: SparseTensor) -> SparseTensor:
        """Returns features at half the resolution."""
        residual = self.out_layers(self.down(self.act_layers(tensor)))
        shortcut = self.skip_connection(self.down(tensor))
        return residual.with_feats(residual.feats + shortcut.feats)


class Subdivided(NamedTuple):
    """What a block makes of a level.

    Attributes:
        tensor: Features at twice the resolution.
        occupancy: [N, 8] logits, one for each child of each voxel before the block, z fastest, that it is occupied;
            None where the block predicts none.
    """

    tensor: SparseTensor
    occupancy: Float[Tensor, "parents 8"] | None


class SparseSubdivideBlock3d(nn.Module):
    """A convolution, a step to the children, a convolution.

    Args:
        inputs: Channels in.
        outputs: Channels out.
        backend: Of the convolutions.
        predicts_occupancy: Whether a linear head tells from a voxel which of its children are occupied (TRELLIS.2).
    """

    def __init__(
        self, inputs: int, outputs: int, *, backend: Backend = "torch", predicts_occupancy: bool = True
    ) -> None:
        super().__init__()
        self.act_layers = nn.Sequential(SparseConv3d(inputs, outputs, backend=backend), SparseActivation(nn.SiLU()))
        self.occupancy = SparseLinear(outputs, 8) if predicts_occupancy else None
        self.out_layers = nn.Sequential(SparseConv3d(outputs, outputs, backend=backend), SparseActivation(nn.SiLU()))

    @override
    def forward(self, tensor: SparseTensor, children: Voxels | None = None) -> Subdivided:
        """Returns features at twice the resolution.

        Args:
            tensor: A level.
            children: The children to make, in the order in which they are to come out. None makes those that the block
                predicts, and of each voxel the likeliest even if it is not likely; all eight where it predicts none.
        """
        tensor = self.act_layers(tensor)
        logits = None if self.occupancy is None else self.occupancy(tensor).feats
        if children is None and logits is not None:
            children = tensor.voxels.children(occupied_children(logits))
        return Subdivided(self.out_layers(subdivide(tensor, children)), logits)


def occupied_children(logits: Float[Tensor, "parents 8"]) -> torch.Tensor:
    """Returns which children are likelier occupied than not, and always the likeliest: no voxel is without a child."""
    likeliest = torch.nn.functional.one_hot(logits.argmax(dim=1), 8).bool()
    return (logits > 0) | likeliest
