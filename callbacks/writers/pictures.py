"""Writes pictures: tensors to PNG files."""

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor

from datamodules.readers.atomic_files import replacing


def write_png(path: Path, image: Float[Tensor, "height width 3"]) -> None:
    """Writes an RGB image in 0..1 as 8-bit PNG."""
    _save(path, (image.detach().clamp(0, 1) * 255).round().to(torch.uint8))


def write_mask_png(path: Path, mask: Bool[Tensor, "height width"]) -> None:
    """Writes a mask as 8-bit PNG: 255 where it is set, else 0."""
    _save(path, mask.to(torch.uint8) * 255)


def write_class_png(path: Path, class_ids: Int[Tensor, "height width"]) -> None:
    """Writes the number of each pixel's class, from 1, as 16-bit PNG; 0 stands for none (-1)."""
    _save(path, (class_ids + 1).to(torch.int32))


def _save(path: Path, pixels: Tensor) -> None:
    array = pixels.cpu().numpy()
    with replacing(path) as temporary:
        Image.fromarray(array.astype(np.uint16) if array.dtype == np.int32 else array).save(temporary)
