"""Batches of depth maps, and what is wrong with them."""

import torch
from torch import Tensor


def batch_starts(count: int, batch_size: int) -> range:
    """Returns where batches begin.

    Raises:
        ValueError: If the batch size is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; allowed: at least 1.")
    return range(0, count, batch_size)


def check_finite(maps: Tensor, first: int) -> None:
    """Refuses NaN and infinity, and says in which maps.

    Args:
        maps: A batch.
        first: Number of its first map among all.

    Raises:
        ValueError: If there is any.
    """
    finite = maps.isfinite()
    if not bool(finite.all()):
        raise ValueError(f"{maps_with(~finite, first)} hold NaN or infinity; set pixels without depth to 0.")


def maps_with(found: Tensor, first: int) -> str:
    """Names the maps of a batch that have a pixel set, counted from ``first``, for a message."""
    ids = (found.flatten(1).any(1).nonzero().flatten() + first).tolist()
    return ("Map " if len(ids) == 1 else "Maps ") + ", ".join(map(str, ids[:8])) + (" ..." if len(ids) > 8 else "")


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device computes in bfloat16; others convert back and forth, and are slower for it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
