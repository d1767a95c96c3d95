"""Seeded k-means: k-means++ seeding, Lloyd or mini-batch steps, Euclidean or spherical."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

CHUNK_ELEMENTS = 2**24  # distances computed at once: 64 MiB of float32


class KMeansResult(NamedTuple):
    """A clustering.

    Attributes:
        centroids: [K, C]; unit length if spherical.
        assignments: [M] nearest centroid of each point, ties to the lower number.
        inertia: Weighted sum of the squared distances to it.
    """

    centroids: Float[Tensor, "clusters channels"]
    assignments: Int[Tensor, " points"]
    inertia: float


def kmeans(
    features: Float[Tensor, "points channels"],
    num_clusters: int,
    *,
    seed: int,
    num_restarts: int = 4,
    num_iterations: int = 60,
    spherical: bool = False,
    sample_weights: Float[Tensor, " points"] | None = None,
    batch_size: int | None = None,
) -> KMeansResult:
    """Clusters points; the result is a function of the points and the seed.

    Args:
        features: M points.
        num_clusters: K. With fewer than K distinct points, centroids repeat.
        seed: Seed of the seedings and of the mini-batches.
        num_restarts: k-means++ seedings, of which the one with the lowest inertia is kept.
        num_iterations: Most Lloyd steps, or mini-batch steps, after a seeding.
        spherical: Cluster directions: points and centroids are normalised.
        sample_weights: Weight of each point, 0 or more; equal unless given.
        batch_size: Points of a mini-batch step (Sculley 2010); all points in every step (Lloyd) unless given.

    Raises:
        ValueError: If there is no point, a coordinate or weight is not finite, a weight is negative, or a number is
            below one.
    """
    if num_clusters < 1 or num_restarts < 1 or features.shape[0] == 0:
        raise ValueError(
            f"k-means needs points, clusters and restarts, got {features.shape[0]}, {num_clusters} and {num_restarts}."
        )
    if not torch.isfinite(features).all():
        bad = int((~torch.isfinite(features).all(dim=1)).sum())
        raise ValueError(f"k-means: {bad} of {features.shape[0]} points hold NaN or infinity; remove them first.")
    weights = torch.ones_like(features[:, 0]) if sample_weights is None else sample_weights.to(features.dtype)
    if not torch.isfinite(weights).all() or bool((weights < 0).any()) or not bool((weights > 0).any()):
        raise ValueError("k-means: sample_weights must be finite, not negative, and not all zero.")
    points = F.normalize(features, dim=1) if spherical else features
    generator = torch.Generator().manual_seed(seed)
    results = []
    for _ in range(num_restarts):
        centroids = _seed_centroids(points, weights, num_clusters, generator)
        if batch_size is None:
            centroids = _lloyd(points, weights, centroids, num_iterations, spherical)
        else:
            centroids = _mini_batches(points, weights, centroids, num_iterations, spherical, batch_size, generator)
        assignments, distances = nearest_centroids(points, centroids)
        inertia = float((distances * weights).sum(dtype=torch.float64))
        results.append(KMeansResult(centroids, assignments, inertia))
    return min(results, key=lambda result: result.inertia)


def nearest_centroids(
    points: Float[Tensor, "points channels"], centroids: Float[Tensor, "clusters channels"]
) -> tuple[Int[Tensor, " points"], Float[Tensor, " points"]]:
    """Returns each point's nearest centroid and the squared distance to it, in bounded memory."""
    lengths = centroids.square().sum(dim=1)
    assignments, distances = [], []
    for chunk in points.split(max(1, CHUNK_ELEMENTS // centroids.shape[0])):
        # |p|^2 is common to all centroids, so it is added after the minimum.
        nearest = torch.addmm(lengths, chunk, centroids.T, alpha=-2).min(dim=1)
        assignments.append(nearest.indices)
        distances.append((nearest.values + chunk.square().sum(dim=1)).clamp_min(0))
    return torch.cat(assignments), torch.cat(distances)


def _seed_centroids(points: Tensor, weights: Tensor, num_clusters: int, generator: torch.Generator) -> Tensor:
    """k-means++ (Arthur and Vassilvitskii 2007): each seed with probability in proportion to its squared distance."""
    chosen = [_draw(weights, generator)]
    distances = (points - points[chosen[0]]).square().sum(dim=1)
    while len(chosen) < num_clusters:
        probabilities = distances * weights
        # Fewer distinct points than clusters: the rest repeat.
        chosen.append(_draw(probabilities if float(probabilities.sum()) > 0 else weights, generator))
        distances = torch.minimum(distances, (points - points[chosen[-1]]).square().sum(dim=1))
    return points[torch.tensor(chosen, device=points.device)].clone()


def _draw(probabilities: Tensor, generator: torch.Generator) -> int:
    cumulative = probabilities.double().cpu().cumsum(0)
    target = torch.rand((), generator=generator, dtype=torch.float64) * cumulative[-1]
    return min(int(torch.searchsorted(cumulative, target, right=True)), len(cumulative) - 1)


def _lloyd(points: Tensor, weights: Tensor, centroids: Tensor, num_iterations: int, spherical: bool) -> Tensor:
    previous = None
    for _ in range(num_iterations):
        assignments, distances = nearest_centroids(points, centroids)
        if previous is not None and torch.equal(assignments, previous):
            break
        previous = assignments
        sums = torch.zeros_like(centroids).index_add_(0, assignments, points * weights[:, None])
        totals = centroids.new_zeros(len(centroids)).index_add_(0, assignments, weights)
        filled = totals > 0
        centroids = torch.where(filled[:, None], sums / totals.clamp_min(1e-30)[:, None], centroids)
        num_empty = int((~filled).sum())
        if num_empty:  # an empty cluster starts again at one of the points that fit worst
            worst = (distances * weights).topk(min(num_empty, len(points))).indices
            centroids[(~filled).nonzero().squeeze(1)[: len(worst)]] = points[worst]
        if spherical:
            centroids = F.normalize(centroids, dim=1)
    return centroids


def _mini_batches(
    points: Tensor,
    weights: Tensor,
    centroids: Tensor,
    num_iterations: int,
    spherical: bool,
    batch_size: int,
    generator: torch.Generator,
) -> Tensor:
    totals = centroids.new_zeros(len(centroids))
    for _ in range(num_iterations):
        batch = torch.randint(len(points), (batch_size,), generator=generator).to(points.device)
        assignments, _ = nearest_centroids(points[batch], centroids)
        sums = torch.zeros_like(centroids).index_add_(0, assignments, points[batch] * weights[batch, None])
        new = totals.new_zeros(len(centroids)).index_add_(0, assignments, weights[batch])
        totals = totals + new
        share = (new / totals.clamp_min(1e-30))[:, None]
        centroids = torch.where(
            new[:, None] > 0, centroids * (1 - share) + sums / totals.clamp_min(1e-30)[:, None], centroids
        )
        if spherical:
            centroids = F.normalize(centroids, dim=1)
    return centroids
