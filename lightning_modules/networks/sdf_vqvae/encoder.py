"""The encoder: signed distances near a surface to latents on a coarse grid (Direct3D-S2's sparse SDF VAE)."""

from itertools import pairwise

from torch import nn
from typing_extensions import override

from lightning_modules.networks.sdf_vqvae.attention import SparseTransformer
from lightning_modules.networks.sdf_vqvae.blocks import SparseDownBlock3d
from lightning_modules.networks.sdf_vqvae.convolution import Backend, SparseLinear
from lightning_modules.networks.sdf_vqvae.sparse_tensor import SparseTensor


class SparseSDFEncoder(SparseTransformer):
    """Down blocks to the latent grid, windowed transformer blocks, and means and log-variances of the latents.

    Where we differ from Direct3D-S2: the last layer starts from small random weights. Theirs starts from zero, with
    which every latent is the same and a codebook has nothing to tell apart.

    Args:
        latent_channels: Of a latent; the output has twice as many, the means first.
        model_channels: Of the transformer; the level before has a quarter, and each finer one half of that.
        num_blocks: Of the transformer.
        num_heads: Divides ``model_channels``; 0 gives heads of 64 channels, one at least.
        down_factor: Grid of the input over grid of the latents: 2, 4, 8 or 16.
        window_size: Voxels along an edge of an attention window.
        backend: Of the convolutions.
        include_self: Divides means of children by one more than their number; weights of Direct3D-S2 want it.
        checkpointing: Trades time for memory in training: blocks are computed again on the way back.
    """

    def __init__(
        self,
        latent_channels: int = 16,
        model_channels: int = 512,
        num_blocks: int = 4,
        num_heads: int = 0,
        *,
        down_factor: int = 8,
        window_size: int = 8,
        backend: Backend = "torch",
        include_self: bool = False,
        checkpointing: bool = False,
    ) -> None:
        widths = level_widths(model_channels, down_factor)
        super().__init__(
            model_channels,
            model_channels,
            num_blocks,
            num_heads or max(model_channels // 64, 1),
            window_size=window_size,
            checkpointing=checkpointing,
        )
        self.input_layer1 = SparseLinear(1, widths[0])
        self.downsample = nn.ModuleList(
            SparseDownBlock3d(fine, coarse, backend=backend, include_self=include_self)
            for fine, coarse in pairwise(widths)
        )
        self.out_layer = SparseLinear(model_channels, 2 * latent_channels, exact=True)

    @override
    def forward(self, sdf: SparseTensor, position_scale: float = 1.0) -> SparseTensor:
        """Returns [n, 2 latent_channels] means and log-variances at ``resolution / down_factor``.

        Args:
            sdf: [N, 1] signed distances in -1 to 1.
            position_scale: Of the latents' coordinates before they are encoded: Direct3D-S2's ``factor``.

        Raises:
            ValueError: If ``down_factor`` does not divide the resolution.
        """
        tensor = self.input_layer1(sdf)
        for block in self.downsample:
            tensor = self.run_block(block, tensor)
        return self.out_layer(self.transform(tensor, position_scale))


def level_widths(model_channels: int, down_factor: int) -> list[int]:
    """Returns the channels of each level, the finest first; for 512 and 8: 32, 64, 128, 512.

    Raises:
        ValueError: If the settings leave a level without a whole number of channels.
    """
    levels = down_factor.bit_length() - 1
    if down_factor not in (2, 4, 8, 16):
        raise ValueError(f"down_factor must be 2, 4, 8 or 16, got {down_factor}.")
    if model_channels % (1 << (levels + 1)):
        raise ValueError(
            f"model_channels must be a multiple of {1 << (levels + 1)} for down_factor {down_factor}, "
            f"got {model_channels}."
        )
    return [model_channels >> (level + 1) for level in range(levels, 0, -1)] + [model_channels]
