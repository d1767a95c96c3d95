"""Writes pictures: tensors in 0..1 to PNG files."""

from pathlib import Path

import numpy as np
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from datamodules.readers.atomic_files import replacing


def write_png(path: Path, image: Float[Tensor, "height width 3"]) -> None:
    """Writes an RGB image in 0..1 as 8-bit PNG."""
    pixels = (image.detach().cpu().clamp(0, 1) * 255).round().numpy().astype(np.uint8)
    with replacing(path) as temporary:
        Image.fromarray(pixels).save(temporary)
