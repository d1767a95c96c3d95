"""Windows of sparse voxels, gathered into padded batches of similar sizes for attention without a loop over windows."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int32, Int64
from torch import Tensor

# Windows are padded to the longest below each of these: at most a dozen batches, little waste.
_LENGTHS = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)


class WindowBatch(NamedTuple):
    """Windows of similar sizes.

    Attributes:
        rows: Rows of each window's voxels; padding repeats one of the window's.
        mask: Which are no padding.
    """

    rows: Int64[Tensor, "windows length"]
    mask: Bool[Tensor, "windows length"]


class WindowPartition(NamedTuple):
    """All windows of a set of voxels.

    Attributes:
        batches: Of windows of similar sizes.
        places: Where each voxel is in the batches' rows, laid out one after the other.
    """

    batches: tuple[WindowBatch, ...]
    places: Int64[Tensor, " voxels"]


@torch.no_grad()
def window_partition(
    coords: Int32[Tensor, "voxels 4"], resolution: int, window_size: int, shift: int = 0
) -> WindowPartition:
    """Cuts the grid into cubes; voxels of one shape and cube form a window (Swin, arXiv 2103.14030, without its roll).

    Args:
        coords: Rows (shape, x, y, z).
        resolution: Voxels along an edge of the grid.
        window_size: Voxels along an edge of a window.
        shift: Added to the coordinates before they are divided among windows.
    """
    per_edge = (resolution - 1 + shift) // window_size + 1
    cell = (coords[:, 1:].long() + shift).div(window_size, rounding_mode="floor")
    key = ((coords[:, 0].long() * per_edge + cell[:, 0]) * per_edge + cell[:, 1]) * per_edge + cell[:, 2]
    sorted_key, order = key.sort(stable=True)
    _, counts = torch.unique_consecutive(sorted_key, return_counts=True)
    starts = counts.cumsum(0) - counts
    lengths = torch.tensor(_LENGTHS, device=coords.device)
    kind = torch.searchsorted(lengths, counts).clamp_max(len(_LENGTHS) - 1)
    longest = torch.zeros_like(lengths).scatter_reduce_(0, kind, counts, "amax")
    places = torch.empty_like(order)
    batches, laid_out = [], 0
    for number, most in enumerate(longest.tolist()):
        if most == 0:
            continue
        windows = (kind == number).nonzero()[:, 0]
        index = torch.arange(most, device=coords.device)
        mask = index < counts[windows, None]
        rows = order[torch.where(mask, starts[windows, None] + index, starts[windows, None])]
        places[rows[mask]] = mask.flatten().nonzero()[:, 0] + laid_out
        laid_out += mask.numel()
        batches.append(WindowBatch(rows, mask))
    return WindowPartition(tuple(batches), places)


def windowed_attention(
    queries_keys_values: Float[Tensor, "voxels 3 heads channels"], partition: WindowPartition
) -> Float[Tensor, "voxels heads*channels"]:
    """Computes softmax attention among the voxels of each window.

    Args:
        queries_keys_values: Of each voxel.
        partition: The voxels' windows.
    """
    if not partition.batches:
        return queries_keys_values[:, 0].flatten(1)
    outputs = []
    for rows, mask in partition.batches:
        gathered = queries_keys_values.index_select(0, rows.flatten()).unflatten(0, rows.shape)
        queries, keys, values = gathered.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask[:, None, None, :])
        outputs.append(attended.transpose(1, 2).flatten(2).flatten(0, 1))
    return torch.cat(outputs).index_select(0, partition.places)
