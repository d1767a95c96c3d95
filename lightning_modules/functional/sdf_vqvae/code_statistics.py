"""How often codes are used, and what the latents are that use them."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor


class CodeStatistics(NamedTuple):
    """Sums over the latents of each code; those of several processes add up.

    Attributes:
        counts: [K] float32 how many latents a code has.
        sums: [K, C] float32 their sum.
    """

    counts: Float[Tensor, " codes"]
    sums: Float[Tensor, "codes channels"]


@torch.no_grad()
def code_statistics(
    latents: Float[Tensor, "latents channels"], code_ids: Int[Tensor, " latents"], num_codes: int
) -> CodeStatistics:
    """Adds up the latents of each code.

    Memory and time grow with latents plus codes; a one-hot matrix would have their product. The same input gives the
    same bits: on CPU rows are added in order, on CUDA, where ``index_add`` uses atomics, they are sorted first.
    """
    latents = latents.float()
    # Whole numbers in float32 add up exactly in any order; bincount would have to wait for a GPU.
    counts = latents.new_zeros(num_codes).index_add_(0, code_ids, latents.new_ones(len(code_ids)))
    if latents.device.type == "cpu":
        sums = latents.new_zeros(num_codes, latents.shape[1]).index_add_(0, code_ids, latents)
    else:
        by_code = latents[code_ids.sort(stable=True).indices]
        sums = torch.segment_reduce(by_code, "sum", lengths=counts.long(), axis=0, unsafe=True, initial=0)
    return CodeStatistics(counts, sums)


def code_counts(code_ids: Int[Tensor, " latents"], num_codes: int) -> Int[Tensor, " codes"]:
    """Returns how many latents use each code."""
    return torch.bincount(code_ids.flatten(), minlength=num_codes)


def usage(counts: Float[Tensor, " codes"] | Int[Tensor, " codes"]) -> Float[Tensor, ""]:
    """Returns the share of codes that are used at all."""
    return (counts > 0).float().mean()


def entropy(counts: Float[Tensor, " codes"] | Int[Tensor, " codes"]) -> Float[Tensor, ""]:
    """Returns the entropy, in nats, of a token drawn from the counts; its exponential is the perplexity.

    0 where nothing was counted.
    """
    shares = counts.double() / counts.sum().clamp_min(1)
    return -torch.special.xlogy(shares, shares).sum().float()


def summed_over_processes(statistics: CodeStatistics) -> CodeStatistics:
    """Adds up the statistics of all processes in one message; the result is the same on each."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return statistics
    together = torch.cat([statistics.counts[:, None], statistics.sums], dim=1)
    dist.all_reduce(together)
    return CodeStatistics(together[:, 0], together[:, 1:])
