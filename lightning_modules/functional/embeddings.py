"""What embeddings tell of each other: nearest neighbours, and what a linear classifier finds in them."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


def nearest_neighbours(
    queries: Float[Tensor, "queries channels"],
    gallery: Float[Tensor, "maps channels"],
    count: int,
    *,
    leave_out_own: bool = False,
    block: int = 1024,
) -> tuple[Float[Tensor, "queries count"], Int[Tensor, "queries count"]]:
    """Returns cosine similarities and rows of the nearest embeddings, nearest first.

    Memory is ``block`` x maps, whatever the number of queries.

    Args:
        queries: Embeddings of any length.
        gallery: Where to look.
        count: Neighbours of each query; as many as there are where there are fewer.
        leave_out_own: The queries are the gallery, and none is its own neighbour.
        block: Queries at a time.
    """
    unit, found = F.normalize(gallery, dim=1), []
    count = min(count, len(gallery) - leave_out_own)
    for start in range(0, len(queries), block):
        cosine = F.normalize(queries[start : start + block], dim=1) @ unit.T
        if leave_out_own:
            rows = torch.arange(len(cosine), device=cosine.device)
            cosine[rows, rows + start] = -torch.inf
        found.append(cosine.topk(count, dim=1))
    if not found:
        return queries.new_zeros(0, count), torch.zeros(0, count, dtype=torch.int64, device=queries.device)
    return torch.cat([best.values for best in found]), torch.cat([best.indices for best in found])


def neighbour_agreement(
    kind_ids: Int[Tensor, " queries"], neighbour_kind_ids: Int[Tensor, "queries count"]
) -> Float[Tensor, " queries"]:
    """Returns the share of each query's neighbours that are of its kind."""
    return (neighbour_kind_ids == kind_ids[:, None]).float().mean(dim=1)


def fit_linear_probe(
    embeddings: Float[Tensor, "maps channels"], kind_ids: Int[Tensor, " maps"], num_kinds: int, *, ridge: float = 1e-2
) -> Float[Tensor, "channels_and_one kinds"]:
    """Fits the linear map to one-hot kinds of least squares, in closed form: the same on every machine and process.

    Channels are not standardised; the ridge is a share of their mean variance, so the scale of embeddings is no matter.

    Args:
        embeddings: One row per map.
        kind_ids: Their kinds, 0 to ``num_kinds`` - 1.
        num_kinds: Columns of the result.
        ridge: Weight of the penalty on weights; none is on the offset.

    Returns:
        Weights for ``linear_probe``; the last row is the offset.
    """
    mean = embeddings.double().mean(dim=0)
    centred = embeddings.double() - mean
    targets = F.one_hot(kind_ids.long(), num_kinds).double()
    covariance = centred.T @ centred / len(embeddings)
    penalty = (ridge * covariance.diagonal().mean()).clamp_min(torch.finfo(torch.float64).tiny)
    eye = torch.eye(len(covariance), dtype=torch.float64, device=embeddings.device)
    weights = torch.linalg.solve(
        covariance + penalty * eye, centred.T @ (targets - targets.mean(dim=0)) / len(embeddings)
    )
    offset = targets.mean(dim=0) - mean @ weights
    return torch.cat([weights, offset[None]]).to(embeddings)


def linear_probe(
    embeddings: Float[Tensor, "maps channels"], weights: Float[Tensor, "channels_and_one kinds"]
) -> Int[Tensor, " maps"]:
    """Returns the most likely kind of each map."""
    return (embeddings @ weights[:-1] + weights[-1]).argmax(dim=1)
