"""Gathering over processes; every function is the identity where no process group runs."""

import torch
import torch.distributed as dist
from torch import Tensor


def gather_rows(rows: Tensor) -> list[Tensor]:
    """Returns every process's rows in rank order; processes may have different numbers of rows, also none.

    Args:
        rows: [n, ...] tensor; dtype and trailing shape are the same on all processes.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return [rows]
    counts = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor([rows.shape[0]], device=rows.device))
    longest = int(torch.stack(counts).max())
    padded = rows.new_zeros(longest, *rows.shape[1:])
    padded[: rows.shape[0]] = rows
    gathered = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(gathered, padded)
    return [part[: int(count)] for part, count in zip(gathered, counts, strict=True)]


def broadcast_from_first(tensor: Tensor) -> Tensor:
    """Returns the first process's tensor on every process, so that rounding cannot make processes differ."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        tensor = tensor.contiguous()
        dist.broadcast(tensor, src=0)
    return tensor


def sum_over_processes(tensor: Tensor) -> Tensor:
    """Returns the sum of every process's tensor; all are of one shape."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor
