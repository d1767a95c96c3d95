"""Residual vector quantization: a codebook of layers, each of which codes what the layers before it leave over."""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from lightning_modules.functional.kmeans import BLOCK_BYTES, kmeans


def residual_kmeans(
    features: Float[Tensor, "points channels"],
    *,
    num_layers: int,
    size: int,
    seed: int,
    num_restarts: int = 4,
    num_iterations: int = 60,
    spherical: bool = False,
    sample_weights: Float[Tensor, " points"] | None = None,
    batch_size: int | None = None,
) -> Float[Tensor, "layers size channels"]:
    """Fits a codebook by k-means, layer after layer on the residuals to the nearest entry (LangSplatV2, section 3.2).

    Residuals have no common length, so ``spherical`` concerns the first layer alone. See ``kmeans`` for the arguments;
    layer i is seeded with ``seed + i``.

    Raises:
        ValueError: If ``num_layers`` is below 1, or ``kmeans`` refuses its input.
    """
    if num_layers < 1:
        raise ValueError(f"num_layers must be at least 1, got {num_layers}.")
    residuals, layers = features.detach(), []
    for layer in range(num_layers):
        result = kmeans(
            residuals,
            size,
            seed=seed + layer,
            num_restarts=num_restarts,
            num_iterations=num_iterations,
            spherical=spherical and layer == 0,
            sample_weights=sample_weights,
            batch_size=batch_size,
        )
        layers.append(result.centroids)
        residuals = residuals - result.centroids[result.assignments]
    return torch.stack(layers)


def residual_assign(
    features: Float[Tensor, "points channels"],
    codebook: Float[Tensor, "layers size channels"],
    *,
    metric: Literal["cosine", "euclidean"] = "cosine",
) -> Int[Tensor, "points layers"]:
    """Returns the entry of each layer that codes each feature; the sum of the entries approximates the feature.

    Args:
        features: What to code.
        codebook: Entries.
        metric: How the first layer chooses. A language feature is a direction, so its nearest entry is the one of the
            highest cosine; the layers after it take the residual's nearest entry by Euclidean distance, whatever
            ``metric`` says, as a residual's length counts.

    Raises:
        ValueError: If the metric is unknown.
    """
    if metric not in ("cosine", "euclidean"):
        raise ValueError(f"metric must be 'cosine' or 'euclidean', got {metric!r}.")
    rows = max(1, BLOCK_BYTES // ((codebook.shape[1] + features.shape[1]) * features.element_size()))
    return torch.cat([_assign(block, codebook, metric) for block in features.split(rows)])


def _assign(residuals: Tensor, codebook: Tensor, metric: str) -> Tensor:
    chosen = []
    for layer, atoms in enumerate(codebook):
        if layer == 0 and metric == "cosine":
            scores = residuals @ F.normalize(atoms, dim=1).T
        else:
            scores = residuals @ atoms.T - atoms.square().sum(1) / 2  # the largest is the nearest
        chosen.append(scores.argmax(1))
        residuals = residuals - atoms[chosen[-1]]
    return torch.stack(chosen, dim=1)


def codebook_usage(
    counts: Int[Tensor, "*batch size"] | Float[Tensor, "*batch size"],
) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    """Returns the fraction of entries in use and the perplexity of their use.

    The perplexity is exp of the entropy: ``size`` if all are used alike, 1 if a single one is, 0 if none is.

    Args:
        counts: How often, or with how much weight, each entry is used; 0 or more. Several processes sum theirs first.
    """
    shares = counts / counts.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.get_default_dtype()).tiny)
    used = (counts > 0).to(shares.dtype)
    entropy = torch.special.entr(shares).sum(-1)
    return used.mean(-1), entropy.exp() * (used.sum(-1) > 0)
