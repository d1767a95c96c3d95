"""Masks as square pictures for an image tower, and as a map of ids."""

import torch
from jaxtyping import Bool, Int32, Int64, UInt8
from torch import Tensor

_WEIGHT_ONE = 1 << 11  # OpenCV's 8-bit interpolation has weights of 11 bits


@torch.no_grad()
def mask_tiles(
    photo: UInt8[Tensor, "height width 3"], masks: Bool[Tensor, "masks height width"], size: int = 224
) -> UInt8[Tensor, "masks 3 size size"]:
    """Cuts out each mask: background black, bounding box, padded with black to a centred square, resized.

    The pixels are those of LangSplat's tiles to the bit, that is of ``cv2.resize`` (bilinear, not antialiased), save
    that boxes are complete: LangSplat's lack the last row and column, and a mask one pixel wide is empty. A tile of an
    empty mask is black.

    Args:
        photo: RGB, on any device.
        masks: M masks on the same device.
        size: Width and height of a tile, pixels.
    """
    from lightning_modules.functional.kernels import launch, tiles

    boxes = mask_boxes(masks)
    extent = boxes[:, 2:] - boxes[:, :2]
    side = extent.amax(dim=1)
    origin = boxes[:, :2] - torch.div(side[:, None] - extent, 2, rounding_mode="floor")
    cut = torch.empty(len(masks), 3, size, size, dtype=torch.uint8, device=photo.device)
    arguments = [
        photo.contiguous(),
        masks.contiguous().view(torch.uint8),
        _interpolation(origin[:, 1], side, size, clamp_weights=False),
        _interpolation(origin[:, 0], side, size, clamp_weights=True),
        size,
        cut,
    ]
    launch.launch(tiles.cut_tiles, len(masks) * size, arguments, photo.device)
    return cut


def _interpolation(
    origin: Int64[Tensor, " masks"], side: Int64[Tensor, " masks"], size: int, *, clamp_weights: bool
) -> Int32[Tensor, "masks size 4"]:
    """Returns the two source indices of each target index along one axis, and their weights, as OpenCV rounds them.

    At the border OpenCV repeats the last index; along x it also gives the first of the two all the weight.
    """
    target = torch.arange(size, device=side.device, dtype=torch.float64)
    position = ((target + 0.5) * (side[:, None].double() / size) - 0.5).float()
    low = position.floor()
    fraction = position - low
    if clamp_weights:
        fraction = torch.where((low < 0) | (low >= side[:, None] - 1), 0, fraction)
    last = (side - 1).clamp(min=0)[:, None]
    indices = [torch.minimum((low.long() + step).clamp(min=0), last) + origin[:, None] for step in (0, 1)]
    weights = [(part * _WEIGHT_ONE).round().long() for part in (1 - fraction, fraction)]
    return torch.stack([*indices, *weights], dim=-1).int()


def mask_boxes(masks: Bool[Tensor, "masks height width"]) -> Int64[Tensor, "masks 4"]:
    """Returns x1, y1, x2, y2 of each mask, the last exclusive; zeros for an empty mask."""
    bounds = []
    pixels = masks.view(torch.uint8)  # amax is faster than any() on CPU
    for occupied in (pixels.amax(dim=1).bool(), pixels.amax(dim=2).bool()):
        places = torch.arange(1, occupied.shape[1] + 1, device=masks.device)
        last = (occupied * places).amax(dim=1)
        first = occupied.shape[1] - (occupied * places.flip(0)).amax(dim=1)
        bounds.append((torch.where(last > 0, first, 0), last))
    (x1, x2), (y1, y2) = bounds
    return torch.stack([x1, y1, x2, y2], dim=1)


def mask_map(masks: Bool[Tensor, "masks height width"]) -> Int32[Tensor, "height width"]:
    """Returns the index of the mask that each pixel belongs to, -1 where there is none; later masks cover earlier."""
    ids = torch.full(masks.shape[1:], -1, dtype=torch.int32, device=masks.device)
    for index, mask in enumerate(masks):
        ids.masked_fill_(mask, index)
    return ids
