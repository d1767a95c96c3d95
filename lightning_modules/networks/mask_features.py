"""CLIP features of masks, cut out as tiles."""

from typing import Literal

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from typing_extensions import override

from lightning_modules.functional.language_features.tile_features import encode_tiles, tile_format
from lightning_modules.functional.open_clip_loading import image_tower, load_open_clip, random_open_clip

Precision = Literal["auto", "float32", "bfloat16", "float16"]


class TileEncoder(nn.Module):
    """A frozen image tower of OpenCLIP that turns tiles into unit features.

    Args:
        visual: An image tower of OpenCLIP's classes, such as ``model.visual``.
        batch_size: Tiles encoded at a time.
        precision: Of the matrix products. "auto" is float16 on CUDA, bfloat16 on CPUs that multiply it natively, and
            float32 elsewhere.

    Raises:
        ValueError: If ``batch_size`` is not positive.
    """

    def __init__(self, visual: nn.Module, batch_size: int = 64, precision: Precision = "auto") -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, got {batch_size}.")
        self.visual = visual.eval().requires_grad_(False)
        self.batch_size = batch_size
        self.precision = precision
        self.tile_size = tile_format(visual).size

    @override
    def train(self, mode: bool = True) -> nn.Module:
        """Stays in evaluation mode."""
        return super().train(False)

    @override
    def forward(self, tiles: UInt8[Tensor, "tiles 3 size size"]) -> Float[Tensor, "tiles channels"]:
        """Returns unit float32 features on the tower's device."""
        return encode_tiles(self.visual, tiles, batch_size=self.batch_size, precision=self._dtype())

    def _dtype(self) -> torch.dtype:
        if self.precision != "auto":
            return getattr(torch, self.precision)
        device = next(self.visual.parameters()).device.type
        if device == "cuda":
            return torch.float16
        is_native = device == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
        return torch.bfloat16 if is_native else torch.float32


class OpenClipTiles(TileEncoder):
    """An OpenCLIP image tower by tag or local file. The defaults are those of LangSplat's preprocessing.

    Args:
        model_name: Architecture, one of ``open_clip.list_models()``.
        pretrained: Tag of the weights (downloaded once from the Hugging Face hub), or the path of a local file.
        batch_size: Tiles encoded at a time.
        precision: As in :class:`TileEncoder`.

    Raises:
        ValueError: If the architecture or the tag is unknown or no CLIP, or the file does not fit the architecture.
        FileNotFoundError: If the weights are neither a local file nor in reach.
    """

    def __init__(
        self,
        model_name: str = "ViT-B-16",
        pretrained: str = "laion2b_s34b_b88k",
        batch_size: int = 64,
        precision: Precision = "auto",
    ) -> None:
        super().__init__(image_tower(load_open_clip(model_name, pretrained)), batch_size, precision)


class RandomTiles(TileEncoder):
    """A small tower of OpenCLIP's own class with random weights: no downloads, and no meaning in words.

    Args:
        seed: Of the weights.
        embed_dim: Channels of a feature.
        image_size: Width and height of a tile, pixels.
        batch_size: Tiles encoded at a time.
    """

    def __init__(self, seed: int = 0, embed_dim: int = 512, image_size: int = 96, batch_size: int = 64) -> None:
        super().__init__(image_tower(random_open_clip(seed, embed_dim, image_size)), batch_size, "float32")
