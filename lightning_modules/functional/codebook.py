"""Residual vector quantization: a codebook of layers, each fitted to what the layers before it leave over."""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from lightning_modules.functional.kmeans import kmeans, nearest_centroids


def residual_kmeans(
    features: Float[Tensor, "masks channels"],
    *,
    num_layers: int,
    size: int,
    seed: int,
    num_restarts: int = 4,
    num_iterations: int = 60,
    spherical: bool = False,
    batch_size: int | None = None,
) -> Float[Tensor, "layers size channels"]:
    """Fits a codebook layer by layer with k-means, as LangSplatV2 starts its codebook, but seeded.

    Args:
        features: Features to quantize.
        num_layers: Residual layers.
        size: Entries of a layer.
        seed: Seed of the clustering; layer i uses seed + i.
        num_restarts: See :func:`kmeans`.
        num_iterations: See :func:`kmeans`.
        spherical: Cluster directions in the first layer; residuals have no common length, so later layers do not.
        batch_size: See :func:`kmeans`.
    """
    residual, layers = features, []
    for layer in range(num_layers):
        result = kmeans(
            residual,
            size,
            seed=seed + layer,
            num_restarts=num_restarts,
            num_iterations=num_iterations,
            spherical=spherical and layer == 0,
            batch_size=batch_size,
        )
        layers.append(result.centroids)
        residual = residual - result.centroids[result.assignments]
    return torch.stack(layers)


def residual_assign(
    features: Float[Tensor, "masks channels"],
    codebook: Float[Tensor, "layers size channels"],
    *,
    metric: Literal["cosine", "euclidean"] = "cosine",
) -> Int[Tensor, "masks layers"]:
    """Returns the entry of each layer that stands for a feature.

    Args:
        features: Features to quantize.
        codebook: Layers of entries.
        metric: How the first layer is matched; later layers code differences, whose length matters, and are always
            matched by Euclidean distance.
    """
    residual, entries = features, []
    for layer, atoms in enumerate(codebook):
        matched = F.normalize(atoms, dim=1) if metric == "cosine" and layer == 0 else atoms
        chosen, _ = nearest_centroids(residual, matched)
        entries.append(chosen)
        residual = residual - atoms[chosen]
    return torch.stack(entries, dim=1)


def codebook_usage(counts: Float[Tensor, " entries"]) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Returns the share of entries in use and the perplexity (the number of equally used entries with this entropy).

    Args:
        counts: How much each entry is used, 0 or more; all zero gives zero for both.
    """
    total = counts.sum()
    shares = counts / total.clamp_min(1e-30)
    entropy = -(shares * shares.clamp_min(1e-30).log()).sum()
    return (counts > 0).float().mean(), torch.where(total > 0, entropy.exp(), torch.zeros_like(entropy))
