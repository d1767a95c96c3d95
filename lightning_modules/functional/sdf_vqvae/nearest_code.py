"""The nearest entry of a codebook, in float32 and bounded memory."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from lightning_modules.functional.sdf_vqvae.matrix_product import product_with_rows

BLOCK_BYTES = {"cpu": 4 * 2**20, "cuda": 256 * 2**20}
"""Limit of the block of latent-to-code distances that exists at a time: within the cache, or enough to fill a GPU."""

COLUMNS = 128
"""A row of distances is folded into so many columns, whose minima the processor finds lane by lane."""


@torch.no_grad()
def nearest_code_ids(
    latents: Float[Tensor, "latents channels"], codebook: Float[Tensor, "codes channels"]
) -> Int[Tensor, " latents"]:
    """Returns which code is nearest to each latent; of codes that are equally near, any one.

    ``argmin`` of ``torch.cdist`` in blocks gives the same; it spends more time on the minimum of a long row than on the
    product. Here the minimum is taken over a strided view, which vectorises, and the column that holds it is searched.
    Distances are taken from the codebook's mean, so that latents far from the origin keep their digits, and never in
    half precision, under autocast neither: that picks another code for one latent in a hundred.
    """
    dtype = torch.promote_types(torch.promote_types(latents.dtype, codebook.dtype), torch.float32)
    with torch.autocast(latents.device.type, enabled=False):
        codes = codebook.to(dtype)
        mean = codes.mean(0)
        codes = codes - mean
        padding = -codes.shape[0] % COLUMNS
        norms = F.pad(codes.square().sum(1), (0, padding), value=torch.inf)  # codes that pad are infinitely far
        factors = F.pad(codes * -2, (0, 0, 0, padding))
        block_bytes = BLOCK_BYTES.get(latents.device.type, BLOCK_BYTES["cpu"])
        rows = max(1, block_bytes // (norms.shape[0] * norms.element_size()))
        nearest = [_minimum(product_with_rows(part.to(dtype) - mean, factors, norms)) for part in latents.split(rows)]
    return torch.cat(nearest)


def _minimum(distances: Tensor) -> Tensor:
    if distances.device.type != "cpu":  # a GPU reduces a row as fast as it reads it
        return distances.argmin(1)
    folded = distances.unflatten(1, (-1, COLUMNS))
    column = folded.amin(1).argmin(1)
    in_column = folded.gather(2, column[:, None, None].expand(-1, folded.shape[1], 1))[:, :, 0]
    return in_column.argmin(1) * COLUMNS + column
