"""Features of tiles by an image tower of OpenCLIP."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn


class TileFormat(NamedTuple):
    """The pictures that an image tower was trained on.

    Attributes:
        size: Width and height, pixels.
        mean: Of each channel, 0 to 1.
        std: Of each channel.
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def tile_format(visual: nn.Module) -> TileFormat:
    """Reads the format from an image tower; OpenAI's mean and deviation where it has none of its own."""
    from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

    size: Any = visual.image_size
    return TileFormat(
        int(size[0] if isinstance(size, tuple | list) else size),
        getattr(visual, "image_mean", None) or OPENAI_DATASET_MEAN,
        getattr(visual, "image_std", None) or OPENAI_DATASET_STD,
    )


@torch.no_grad()
def encode_tiles(
    visual: nn.Module,
    tiles: UInt8[Tensor, "tiles 3 size size"],
    *,
    batch_size: int = 64,
    precision: torch.dtype = torch.float32,
) -> Float[Tensor, "tiles channels"]:
    """Returns unit features of tiles, float32, on the tower's device.

    Args:
        visual: An image tower of OpenCLIP's classes, such as ``model.visual``.
        tiles: RGB, on any device.
        batch_size: Tiles encoded at a time.
        precision: Of the matrix products; below float32 they run under autocast.
    """
    device = next(visual.parameters()).device
    look = tile_format(visual)
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (look.mean, look.std))
    num_tiles = len(tiles)
    if num_tiles == 0:  # the tower cannot take an empty batch, but tells its channels
        tiles = tiles.new_zeros(1, 3, look.size, look.size)
    features = []
    for batch in tiles.split(batch_size):
        pixels = (batch.to(device).float() / 255 - mean) / std
        with torch.autocast(device.type, dtype=precision, enabled=precision != torch.float32):
            encoded = visual(pixels)
        features.append(F.normalize(encoded.float(), dim=-1))
    return torch.cat(features)[:num_tiles]
