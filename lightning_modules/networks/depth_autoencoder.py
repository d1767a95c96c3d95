"""The depth autoencoder: the semantic encoder and its mirror image."""

from collections.abc import Sequence
from typing import NamedTuple

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import override

from lightning_modules.functional.depth_autoencoder.depth_range import DepthRange
from lightning_modules.networks.residual_blocks import ResidualBlock, initialise_residual_blocks
from lightning_modules.networks.semantic_encoder import LATENT_GRID, TOTAL_STRIDE, SemanticEncoder


class Reconstruction(NamedTuple):
    """What an autoencoder makes of a batch.

    Attributes:
        latent: [B, latent_dim] embeddings.
        images: [B, 1, H, W] decoded maps on the scale of the input; invalid pixels are filled in.
    """

    latent: Float[Tensor, "maps latent"]
    images: Float[Tensor, "maps 1 height width"]


class DepthDecoder(nn.Module):
    """Mirrors the encoder: latent to a grid of the deepest layer's size, then each layer the other way round.

    One channel of depth comes out, whatever goes into the encoder. Sizes other than 128 x 128 start from the grid
    interpolated to a 32nd of the size and are cropped, so any size of at least one pixel comes out as it went in.

    Args:
        latent_dim: Channels of an embedding.
        widths: Channels of the encoder's layers.
        blocks: Residual blocks of the encoder's layers.
    """

    def __init__(self, latent_dim: int, widths: Sequence[int], blocks: Sequence[int]) -> None:
        super().__init__()
        self.grid_channels = widths[3]
        self.project = nn.Linear(latent_dim, widths[3] * LATENT_GRID**2)
        self.unlayer4 = _mirrored_layer(widths[3], widths[2], blocks[3], upscale=2)
        self.unlayer3 = _mirrored_layer(widths[2], widths[1], blocks[2], upscale=2)
        self.unlayer2 = _mirrored_layer(widths[1], widths[0], blocks[1], upscale=2)
        self.unlayer1 = _mirrored_layer(widths[0], widths[0], blocks[0], upscale=1)
        # Each pixel's four successors are channels of one convolution (ESPCN, arXiv 1609.05158): at full size, where
        # nothing but depth is left, convolutions over many channels would cost as much as all the rest.
        half = max(widths[0] // 2, 1)
        self.unstem = nn.Sequential(
            nn.Conv2d(widths[0], 4 * half, 3, padding=1, bias=False),
            nn.BatchNorm2d(4 * half),
            nn.ReLU(),
            nn.PixelShuffle(2),
            nn.Conv2d(half, 4, 3, padding=1),
            nn.PixelShuffle(2),
        )
        initialise_residual_blocks(self)
        nn.init.constant_(
            self.unstem.get_parameter("4.bias"), 0.5
        )  # the middle of the scale: training need not find it first

    @override
    def forward(
        self, latent: Float[Tensor, "maps latent"], height: int, width: int
    ) -> Float[Tensor, "maps 1 new_height new_width"]:
        """Returns maps of the given size."""
        maps = self.project(latent).unflatten(1, (self.grid_channels, LATENT_GRID, LATENT_GRID))
        rows, columns = -(-height // TOTAL_STRIDE), -(-width // TOTAL_STRIDE)
        if (rows, columns) != (LATENT_GRID, LATENT_GRID):
            maps = F.interpolate(maps, size=(rows, columns), mode="bilinear", align_corners=False)
        for layer in (self.unlayer4, self.unlayer3, self.unlayer2, self.unlayer1, self.unstem):
            maps = layer(maps)
        return maps[:, :, :height, :width]


def _mirrored_layer(inputs: int, outputs: int, blocks: int, *, upscale: int) -> nn.Sequential:
    first = ResidualBlock(inputs, outputs, upscale=upscale)
    return nn.Sequential(first, *(ResidualBlock(outputs, outputs) for _ in range(blocks - 1)))


class DepthAutoencoder(nn.Module):
    """Encodes depth maps as vectors, and decodes these.

    Args:
        input_channels: As in :class:`SemanticEncoder`.
        latent_dim: As there.
        widths: As there.
        blocks: As there.
        depth_range: As there.
    """

    def __init__(
        self,
        input_channels: int = 1,
        latent_dim: int = 768,
        *,
        widths: Sequence[int] = (64, 128, 256, 512),
        blocks: Sequence[int] = (2, 2, 2, 2),
        depth_range: DepthRange | None = None,
    ) -> None:
        super().__init__()
        self.encoder = SemanticEncoder(
            input_channels, latent_dim, widths=widths, blocks=blocks, depth_range=depth_range
        )
        self.decoder = DepthDecoder(latent_dim, widths, blocks)

    @override
    def forward(self, images: Float[Tensor, "maps 1 height width"]) -> Reconstruction:
        """Returns embeddings and decoded maps.

        Args:
            images: Depth as ``scale_depth`` gives it; an encoder of three channels sees it three times.
        """
        latent = self.encoder(images.expand(-1, self.encoder.input_channels, -1, -1))
        return Reconstruction(latent, self.decoder(latent, *images.shape[2:]))
