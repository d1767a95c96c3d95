"""From numbers to colours."""

import math
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

LEAST_LANGUAGE = 0.2
"""Share of a pixel; with less its feature's colour fades."""


@cache
def _turbo_table() -> np.ndarray:
    from matplotlib import colormaps

    return colormaps["turbo"](np.linspace(0, 1, 256))[:, :3].astype(np.float32)


def turbo(values: Float[Tensor, "*size"]) -> Float[Tensor, "*size 3"]:
    """Returns the colours of values in 0..1, blue to red; values outside take the ends' colours, NaN the lower."""
    table = torch.from_numpy(_turbo_table()).to(values.device)
    return table[(values.nan_to_num(0.0).clamp(0, 1) * 255).round().long()]


def heat(relevancy: Float[Tensor, "*prompts height width"]) -> Float[Tensor, "*prompts height width"]:
    """Stretches relevancy maps to 0..1, each from its own minimum to its own maximum: what the threshold sees."""
    above = relevancy - relevancy.amin(dim=(-2, -1), keepdim=True)
    return above / above.amax(dim=(-2, -1), keepdim=True).clamp_min(1e-9)


def heat_picture(relevancy: Float[Tensor, "height width"]) -> Float[Tensor, "height width 3"]:
    """Colours a relevancy map from its minimum, blue, to its maximum, red: what the protocol's threshold sees."""
    return turbo(heat(relevancy))


def overlay(
    rgb: Float[Tensor, "height width 3"], values: Float[Tensor, "height width"], alpha: float = 0.7
) -> Float[Tensor, "height width 3"]:
    """Lays the colours of values in 0..1 over a picture, the more the higher the value; zero leaves it as it is.

    Args:
        rgb: The picture, 0..1.
        values: Such as ``heat`` of a relevancy map.
        alpha: How much of the picture the highest value covers, 0..1.
    """
    share = alpha * values.clamp(0, 1)[..., None]
    return rgb * (1 - share) + turbo(values) * share


def mask_overlay(
    rgb: Float[Tensor, "height width 3"],
    mask: Bool[Tensor, "height width"],
    colour: tuple[float, float, float] = (1.0, 0.0, 0.0),
    alpha: float = 0.3,
) -> Float[Tensor, "height width 3"]:
    """Tints a picture where a mask is set."""
    return torch.where(mask[..., None], (1 - alpha) * rgb + alpha * rgb.new_tensor(colour), rgb)


def outlined(
    rgb: Float[Tensor, "height width 3"],
    mask: Bool[Tensor, "height width"],
    colour: tuple[float, float, float] = (1.0, 1.0, 1.0),
) -> Float[Tensor, "height width 3"]:
    """Draws the border of a mask, one pixel wide and inside it."""
    outside = F.pad(~mask, (1, 1, 1, 1), value=False)
    near = outside[:-2, 1:-1] | outside[2:, 1:-1] | outside[1:-1, :-2] | outside[1:-1, 2:]
    return torch.where((mask & near)[..., None], rgb.new_tensor(colour), rgb)


def class_colours(count: int) -> Float[Tensor, "classes 3"]:
    """Returns colours, 0..1, neighbours far apart in hue; the first ones are the same for any count."""
    hues = torch.arange(count) * 0.61803398875 % 1  # the golden section: every new hue falls into the widest gap
    saturation = torch.tensor([0.85, 0.6, 0.95])[torch.arange(count) % 3]
    value = torch.tensor([0.95, 0.85, 0.6])[torch.arange(count) % 3]
    channels = []
    for offset in (5.0, 3.0, 1.0):
        k = (offset + 6 * hues) % 6
        channels.append(value - value * saturation * torch.minimum(k, 4 - k).clamp(0, 1))
    return torch.stack(channels, dim=1)


def class_picture(
    rgb: Float[Tensor, "height width 3"],
    class_ids: Int[Tensor, "height width"],
    colours: Float[Tensor, "classes 3"],
    alpha: float = 0.65,
) -> Float[Tensor, "height width 3"]:
    """Lays the colour of each pixel's class over a picture; pixels of no class, -1, turn grey and dark.

    Args:
        rgb: The picture, 0..1.
        class_ids: Row of ``colours`` of each pixel, or -1.
        colours: One per class.
        alpha: How much of the picture a class covers.
    """
    grey = rgb.mean(dim=-1, keepdim=True).expand_as(rgb)
    painted = (1 - alpha) * grey + alpha * colours.to(rgb)[class_ids.clamp_min(0).long()]
    return torch.where((class_ids >= 0)[..., None], painted, 0.5 * grey)


def depth_picture(
    depth: Float[Tensor, "height width"], covered: Bool[Tensor, "height width"]
) -> tuple[Float[Tensor, "height width 3"], tuple[float, float]]:
    """Colours depth from near, red, to far, blue; black where nothing is.

    Returns:
        The picture; and the depths of both ends, in the unit of the scene: the nearest and the farthest hundredth of
        the covered pixels lie beyond them. Both are 0 where nothing is covered.
    """
    if not bool(covered.any()):
        return depth.new_zeros(*depth.shape, 3), (0.0, 0.0)
    inside = depth[covered].sort().values
    cut = inside.numel() // 100
    near, far = float(inside[cut]), float(inside[-1 - cut])
    picture = turbo((far - depth) / max(far - near, 1e-9))
    return torch.where(covered[..., None], picture, torch.zeros_like(picture)), (near, far)


def pca_of_atoms(
    codebook: Float[Tensor, "atoms channels"], *, num_layers: int = 1, usage: Float[Tensor, " atoms"] | None = None
) -> Float[Tensor, "atoms 3"]:
    """Returns a colour for each atom, 0..1, from the three directions in which the atoms differ most.

    Decoding is linear, so splatting these three numbers instead of a feature gives the picture of the features, and the
    same feature has the same colour in every view; no PCA over pixels is needed. Two standard deviations of the atoms
    span a channel. Atoms of zero, or which nothing uses, are black; with fewer than four others there is nothing to
    tell apart and all are.

    Args:
        codebook: Atoms, layer by layer.
        num_layers: Residual layers. The first one decides on the colours; the atoms of the others are differences,
            which shift a colour and may be negative.
        usage: How much each atom counts; all alike unless given.
    """
    first = codebook[: codebook.shape[0] // num_layers]
    shares = first.new_ones(first.shape[0]) if usage is None else usage[: first.shape[0]].to(first)
    shares = shares * (first.norm(dim=1) > 0)
    colours = codebook.new_zeros(codebook.shape[0], 3)
    if int((shares > 0).sum()) < 4 or codebook.shape[1] < 3:
        return colours
    shares = (shares / shares.sum())[:, None]
    centred = first - (shares * first).sum(dim=0)
    _, _, axes = torch.linalg.svd(shares.sqrt() * centred, full_matrices=False)
    axes = axes[:3].T * torch.where(axes[:3].sum(dim=1) < 0, -1.0, 1.0)  # singular vectors have no sign of their own
    places = centred @ axes
    spread = (shares * places.square()).sum(dim=0).sqrt().clamp_min(torch.finfo(codebook.dtype).eps)
    colours = codebook @ axes / (4 * spread)
    colours[: first.shape[0]] = (places / (4 * spread) + 0.5).clamp(0, 1) * (shares > 0)
    return colours


def feature_colours(
    weight_map: Float[Tensor, "pixels atoms"],
    codebook: Float[Tensor, "atoms channels"],
    *,
    num_layers: int = 1,
    usage: Float[Tensor, " atoms"] | None = None,
) -> Float[Tensor, "pixels 3"]:
    """Colours decoded features, 0..1, by ``pca_of_atoms``.

    A feature's length says how much of the pixel carries language and is left out, as it is in a cosine; only pixels
    of which less than ``LEAST_LANGUAGE`` does fade to black.
    """
    carries = weight_map[:, : weight_map.shape[1] // num_layers].sum(dim=1, keepdim=True).clamp_min(LEAST_LANGUAGE)
    return (weight_map @ pca_of_atoms(codebook, num_layers=num_layers, usage=usage) / carries).clamp(0, 1)


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
