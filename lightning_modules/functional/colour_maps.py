"""From numbers to colours."""

import math
from functools import cache

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor


@cache
def _turbo_table() -> np.ndarray:
    from matplotlib import colormaps

    return colormaps["turbo"](np.linspace(0, 1, 256))[:, :3].astype(np.float32)


def turbo(values: Float[Tensor, "*size"]) -> Float[Tensor, "*size 3"]:
    """Returns the colours of values in 0..1, blue to red; values outside take the ends' colours, NaN the lower."""
    table = torch.from_numpy(_turbo_table()).to(values.device)
    return table[(values.nan_to_num(0.0).clamp(0, 1) * 255).round().long()]


def heat_picture(relevancy: Float[Tensor, "height width"]) -> Float[Tensor, "height width 3"]:
    """Colours a relevancy map from its minimum, blue, to its maximum, red: what the protocol's threshold sees."""
    above = relevancy - relevancy.min()
    return turbo(above / above.max().clamp_min(1e-9))


def pca_of_atoms(codebook: Float[Tensor, "atoms channels"], *, num_layers: int = 1) -> Float[Tensor, "atoms 3"]:
    """Returns a colour for each atom, 0..1, from the three directions in which the atoms differ most.

    Decoding is linear, so splatting these three numbers instead of a feature gives the picture of the features, and the
    same feature has the same colour in every view; no PCA over pixels is needed. Two standard deviations of the atoms
    span a channel. Atoms of zero, which nothing uses, are black; with fewer than four others there is nothing to tell
    apart and all are.

    Args:
        codebook: Atoms, layer by layer.
        num_layers: Residual layers. The first one decides on the colours; the atoms of the others are differences,
            which shift a colour and may be negative.
    """
    first = codebook[: codebook.shape[0] // num_layers]
    used = first.norm(dim=1) > 0
    colours = codebook.new_zeros(codebook.shape[0], 3)
    if int(used.sum()) < 4 or codebook.shape[1] < 3:
        return colours
    centre = first[used].mean(dim=0)
    _, _, axes = torch.linalg.svd(first[used] - centre, full_matrices=False)
    axes = axes[:3].T * torch.where(axes[:3].sum(dim=1) < 0, -1.0, 1.0)  # singular vectors have no sign of their own
    spread = ((first[used] - centre) @ axes).std(dim=0).clamp_min(torch.finfo(codebook.dtype).eps)
    colours = codebook @ axes / (4 * spread)
    colours[: first.shape[0]] = (((first - centre) @ axes) / (4 * spread) + 0.5).clamp(0, 1) * used[:, None]
    return colours


def feature_colours(
    weight_map: Float[Tensor, "pixels atoms"], codebook: Float[Tensor, "atoms channels"], *, num_layers: int = 1
) -> Float[Tensor, "pixels 3"]:
    """Colours decoded features, 0..1, by ``pca_of_atoms``; pixels that nothing covers are black."""
    return (weight_map @ pca_of_atoms(codebook, num_layers=num_layers)).clamp(0, 1)


def contact_sheet(
    images: Shaped[Tensor, "images height width channels"], columns: int | None = None
) -> Shaped[Tensor, "sheet_height sheet_width channels"]:
    """Lays images of one size out row by row in one picture; cells that are left over are zero.

    Args:
        images: At least one.
        columns: Images in a row; as many as make the sheet about square unless given.

    Raises:
        ValueError: If there is no image or no column.
    """
    count, height, width, channels = images.shape
    columns = math.ceil(math.sqrt(count)) if columns is None else columns
    if count == 0 or columns < 1:
        raise ValueError(f"A contact sheet needs images and columns, got {count} and {columns}.")
    rows = math.ceil(count / columns)
    cells = torch.cat([images, images.new_zeros(rows * columns - count, height, width, channels)])
    sheet = cells.unflatten(0, (rows, columns)).transpose(1, 2)
    return sheet.reshape(rows * height, columns * width, channels)
