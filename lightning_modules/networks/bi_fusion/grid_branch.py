"""The 2D branch: a frozen image tower's grid of tokens becomes a finer map of features."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from typing_extensions import override

from lightning_modules.functional.bi_fusion.neighbourhood_attention import attend, neighbourhood_weights

SHUFFLE = 2  # cells per token along each axis that the pixel shuffle makes
INTERPOLATION = 2  # and the interpolation, of each of these


class GridBranch(nn.Module):
    """Turns tokens of 14 x 14 patches into features of 56 x 56 cells.

    1x1 -> pixel shuffle by 2 (768 channels become 192) -> bilinear by 2 -> 1x1. The shuffle alone would split the
    channels of a token over its four cells, so that an even picture becomes a chequerboard; the 1x1 before it lets each
    cell choose from the whole token, as sub-pixel convolutions do (arXiv 1609.05158).

    Args:
        token_channels: Of the image tower; a multiple of 4.
        channels: Of the map.
        mix_before_shuffle: Put the learned 1x1 before the shuffle; without it a token's channels are split as they are.
        upsample: Make cells finer than patches; without it the map is a 1x1 of the tokens, to compare with.
        use_tiny_sa_2d: Two layers of self-attention over each cell's 3 x 3 neighbourhood at the end.
        heads: Of that attention.
    """

    def __init__(
        self,
        token_channels: int = 768,
        channels: int = 256,
        *,
        mix_before_shuffle: bool = True,
        upsample: bool = True,
        use_tiny_sa_2d: bool = False,
        heads: int = 4,
    ) -> None:
        super().__init__()
        if token_channels % SHUFFLE**2:
            raise ValueError(f"token_channels is {token_channels}; allowed: a multiple of {SHUFFLE**2}.")
        self.upsample = upsample
        before = mix_before_shuffle and upsample
        self.mix = nn.Linear(token_channels, token_channels) if before else nn.Identity()
        self.project = nn.Linear(token_channels // SHUFFLE**2 if upsample else token_channels, channels)
        self.neck = nn.Sequential(*(GridAttention(channels, heads) for _ in range(2 if use_tiny_sa_2d else 0)))

    @override
    def forward(
        self, tokens: Float[Tensor, "images tokens grid_height grid_width"]
    ) -> Float[Tensor, "images channels height width"]:
        """Returns the map of each image, 4 cells per token along each axis (one without ``upsample``)."""
        # Channels last throughout: a 1x1 is then a linear layer, and points are looked up without a copy of the map.
        cells = tokens.movedim(1, -1)
        if not self.upsample:
            return self.neck(self.project(cells).movedim(-1, 1))
        cells = pixel_shuffle_last(self.mix(cells), SHUFFLE)
        # A 1x1 and an interpolation, whose weights sum to one, may change places: a quarter of the work this way.
        maps = self.project(cells).movedim(-1, 1)
        return self.neck(F.interpolate(maps, scale_factor=INTERPOLATION, mode="bilinear", align_corners=False))


def pixel_shuffle_last(
    cells: Float[Tensor, "images height width channels"], factor: int
) -> Float[Tensor, "images _ _ _"]:
    """Returns what ``pixel_shuffle`` does, with channels last."""
    images, height, width, channels = cells.shape
    parts = cells.unflatten(-1, (channels // factor**2, factor, factor)).permute(0, 1, 4, 2, 5, 3)
    return parts.reshape(images, height * factor, width * factor, -1)


class GridAttention(nn.Module):
    """A layer of self-attention of each cell of a map over its 3 x 3 neighbourhood.

    Args:
        channels: Of the map.
        heads: Of the attention.
    """

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        if channels % heads:
            raise ValueError(f"heads is {heads}; allowed: divisors of channels, {channels}.")
        self.heads = heads
        self.norm = nn.LayerNorm(channels)
        self.to_attention = nn.Linear(channels, 3 * channels)
        self.place_bias = nn.Parameter(torch.zeros(9, heads))
        self.out = nn.Linear(channels, channels)

    @override
    def forward(
        self, maps: Float[Tensor, "images channels height width"]
    ) -> Float[Tensor, "images channels height width"]:
        """Returns the maps with what the attention adds."""
        images, _, height, width = maps.shape
        cells = maps.flatten(2).transpose(1, 2).flatten(0, 1)
        ids = grid_neighbours(images, height, width, maps.device)
        queries, keys, values = self.to_attention(self.norm(cells)).unflatten(-1, (3, self.heads, -1)).unbind(1)
        weights = neighbourhood_weights(queries, keys, ids, self.place_bias.expand(len(ids), -1, -1))
        cells = cells + self.out(attend(weights, values, ids).flatten(1))
        return cells.unflatten(0, (images, height * width)).transpose(1, 2).unflatten(2, (height, width))


def grid_neighbours(images: int, height: int, width: int, device: torch.device) -> Int[Tensor, "cells 9"]:
    """Returns the 3 x 3 neighbourhood of each cell, row by row; -1 outside its image."""
    ids = torch.arange(images * height * width, device=device).view(images, 1, height, width)
    padded = F.pad(ids, (1, 1, 1, 1), value=-1)
    around = [padded[:, 0, row : row + height, column : column + width] for row in range(3) for column in range(3)]
    return torch.stack(around, dim=-1).flatten(0, 2).int()
