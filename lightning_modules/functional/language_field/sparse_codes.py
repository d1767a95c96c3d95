"""Sparse coefficients over a codebook: what a Gaussian stores of language (LangSplatV2, arXiv 2507.07136, section 3).

A Gaussian has A coefficients, at most ``top_k`` in each of ``levels x layers`` groups. Channels are numbered
``(level * layers + layer) * size + entry``, so one pass of splatting fills the weight maps of all levels.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


class SparseCodes(NamedTuple):
    """Sparse coefficients of N Gaussians.

    Attributes:
        channel_ids: [N, A] int16 channel of each coefficient, 0 to ``num_channels`` - 1. A channel may occur twice in a
            row; its values add up.
        values: [N, A] coefficients; zero where a Gaussian has fewer than A.
        num_channels: Channels of the weight map.
    """

    channel_ids: Int[Tensor, "gaussians active"]
    values: Float[Tensor, "gaussians active"]
    num_channels: int


def densify_codes(codes: SparseCodes) -> Float[Tensor, "gaussians channels"]:
    """Returns the coefficients as a dense [N, num_channels] matrix (the reference form; memory in proportion to it)."""
    dense = codes.values.new_zeros(codes.values.shape[0], codes.num_channels)
    return dense.scatter_add(1, codes.channel_ids.long(), codes.values)


def top_k_softmax(
    logits: Float[Tensor, "gaussians groups size"], top_k: int
) -> tuple[Int[Tensor, "gaussians groups top_k"], Float[Tensor, "gaussians groups top_k"]]:
    """Keeps the ``top_k`` largest logits of each group and returns their entries and weights, which sum to one.

    LangSplatV2 renormalises a full softmax after the selection; the partition function cancels, so a softmax over the
    kept logits is the same number without its epsilon. Logits that are not kept get no gradient.

    Raises:
        ValueError: If ``top_k`` is not between 1 and the size of a group.
    """
    size = logits.shape[-1]
    if not 1 <= top_k <= size:
        raise ValueError(f"top_k must be between 1 and {size} (the codebook size), got {top_k}.")
    kept, entries = logits.topk(top_k, dim=-1)
    return entries, kept.softmax(dim=-1)


def group_channels(
    entries: Int[Tensor, "gaussians groups top_k"], values: Float[Tensor, "gaussians groups top_k"], size: int
) -> SparseCodes:
    """Numbers the entries of ``groups = levels * layers`` codebooks as channels of one weight map.

    Raises:
        ValueError: If there are more channels than their 16-bit numbers can tell apart.
    """
    num_groups = entries.shape[1]
    if num_groups * size > 2**15:
        raise ValueError(
            f"{num_groups} codebooks (levels x layers) of {size} entries are {num_groups * size} channels; at most "
            f"{2**15} fit. Use smaller codebooks, fewer layers or fewer levels."
        )
    offsets = torch.arange(num_groups, device=entries.device)[:, None] * size
    return SparseCodes((entries + offsets).flatten(1).to(torch.int16), values.flatten(1), num_groups * size)
