"""Features of masks by an image tower: each mask is cut out, as LangSplat does it, and encoded by itself."""

import abc
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from PIL import Image
from torch import Tensor, nn
from typing_extensions import override


class MaskEncoder(abc.ABC):
    """Gives each mask of a photograph a unit feature."""

    @abc.abstractmethod
    def encode(
        self, photo: UInt8[np.ndarray, "height width 3"], mask_ids: Int[np.ndarray, "height width"]
    ) -> Float[np.ndarray, "masks channels"]:
        """Returns [M, C] unit features of the masks 0 to M - 1 of the map; -1 is no mask."""


def masked_crops(
    photo: UInt8[np.ndarray, "height width 3"], mask_ids: Int[np.ndarray, "height width"], size: int
) -> UInt8[np.ndarray, "masks size size 3"]:
    """Cuts out each mask: background black, bounding box, padded with black to a centred square, resized.

    LangSplat's boxes lack their last row and column (and a mask one pixel wide is empty); these are complete.
    """
    crops = []
    for mask_id in range(int(mask_ids.max()) + 1):
        mask = mask_ids == mask_id
        rows, columns = mask.any(axis=1).nonzero()[0], mask.any(axis=0).nonzero()[0]
        box = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        crop = photo[box] * mask[box][..., None]
        side = max(crop.shape[:2])
        square = np.zeros((side, side, 3), np.uint8)
        top, left = (side - crop.shape[0]) // 2, (side - crop.shape[1]) // 2
        square[top : top + crop.shape[0], left : left + crop.shape[1]] = crop
        crops.append(np.asarray(Image.fromarray(square).resize((size, size), Image.Resampling.BILINEAR)))
    return np.stack(crops) if crops else np.zeros((0, size, size, 3), np.uint8)


class OpenClipMaskEncoder(MaskEncoder):
    """Encodes masks with the image tower of an OpenCLIP model.

    Args:
        model: A model of OpenCLIP's classes.
        batch_size: Crops encoded at a time.
    """

    def __init__(self, model: nn.Module, batch_size: int = 64) -> None:
        self.model = model.eval()
        self.batch_size = batch_size
        visual = model.visual
        assert isinstance(visual, nn.Module)
        size: Any = visual.image_size
        self.size = int(size[0] if isinstance(size, tuple) else size)
        from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

        mean = getattr(visual, "image_mean", None) or OPENAI_DATASET_MEAN
        std = getattr(visual, "image_std", None) or OPENAI_DATASET_STD
        self._mean = torch.tensor(mean).view(1, 3, 1, 1)
        self._std = torch.tensor(std).view(1, 3, 1, 1)

    @override
    @torch.inference_mode()
    def encode(
        self, photo: UInt8[np.ndarray, "height width 3"], mask_ids: Int[np.ndarray, "height width"]
    ) -> Float[np.ndarray, "masks channels"]:
        """Returns [M, C] unit features of the masks 0 to M - 1 of the map; -1 is no mask."""
        device = next(self.model.parameters()).device
        crops = torch.from_numpy(masked_crops(photo, mask_ids, self.size)).permute(0, 3, 1, 2)
        num_masks = len(crops)
        if num_masks == 0:  # the tower cannot take an empty batch, but tells its channels
            crops = crops.new_zeros(1, 3, self.size, self.size)
        features: list[Tensor] = []
        for batch in crops.split(self.batch_size):
            pixels = (batch.float() / 255 - self._mean) / self._std
            features.append(self.model.encode_image(pixels.to(device)).float().cpu())  # type: ignore[operator]
        return F.normalize(torch.cat(features), dim=-1)[:num_masks].numpy()


def random_open_clip(seed: int, embed_dim: int = 512, image_size: int = 96) -> nn.Module:
    """Builds a small CLIP of OpenCLIP's own class with random weights that follow from the seed.

    Its features tell crops apart by colour and texture and mean nothing in words: for tests and demonstrations without
    downloaded weights. Pooling the patches instead of a class token makes them depend on what the crop shows.
    """
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    vision = CLIPVisionCfg(layers=2, width=128, head_width=32, patch_size=16, image_size=image_size, pool_type="avg")
    text = CLIPTextCfg(context_length=8, vocab_size=64, width=32, heads=2, layers=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CLIP(embed_dim, vision, text).eval()
