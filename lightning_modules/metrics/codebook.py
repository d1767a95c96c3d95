"""How a codebook is used. The state is a count of each code, so processes add up."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override

from lightning_modules.functional.sdf_vqvae.code_statistics import code_counts, entropy, usage


class CodebookUsage(Metric):
    """Usage over all tokens since the last reset: one batch alone says little about thousands of codes.

    Args:
        num_codes: K.
    """

    full_state_update = False
    counts: Tensor

    def __init__(self, num_codes: int) -> None:
        super().__init__()
        self.num_codes = num_codes
        self.add_state("counts", torch.zeros(num_codes, dtype=torch.int64), dist_reduce_fx="sum")

    @override
    def update(self, code_ids: Int[Tensor, " tokens"]) -> None:
        """Counts tokens."""
        self.counts += code_counts(code_ids, self.num_codes)

    @override
    def compute(self) -> dict[str, Float[Tensor, ""]]:
        """Returns ``codebook_usage`` (0 to 1), ``dead_codes``, ``token_entropy`` in nats, and its ``perplexity``."""
        nats = entropy(self.counts)
        return {
            "codebook_usage": usage(self.counts),
            "dead_codes": (self.counts == 0).sum().float(),
            "token_entropy": nats,
            "perplexity": nats.exp(),
        }
