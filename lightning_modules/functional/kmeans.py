"""K-means clustering: seeded, with restarts, in bounded memory, on any device."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

BLOCK_BYTES = 16 * 2**20
"""Limit of the block of point-to-centroid distances that exists at a time."""

SEEDING_POINTS_PER_CLUSTER = 16
MIN_SEEDING_POINTS = 4096
"""Seeds are searched among so many random points a cluster, but not among fewer than the minimum."""


class KMeansResult(NamedTuple):
    """A clustering of M points.

    Attributes:
        centroids: [K, C]. With fewer distinct points than clusters the last ones repeat others and have no members.
        assignments: [M] int64 nearest centroid of each point.
        inertia: Sum of the weighted squared distances to them.
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
    """Clusters points by Lloyd's or mini-batch k-means from greedy k-means++ seeds; keeps the best of some restarts.

    The same input and seed give the same result; draws are made on the CPU whatever the device, so devices and numbers
    of threads differ by rounding alone. A cluster that loses its points restarts at the point farthest from its
    centroid. Memory beside the input: one copy of it and ``BLOCK_BYTES``.

    Args:
        features: M points.
        num_clusters: K.
        seed: Seed of all draws.
        num_restarts: Seedings; the lowest inertia wins.
        num_iterations: Most Lloyd iterations a restart makes (it stops when no point moves), or its mini-batches.
        spherical: Cluster directions: points and centroids are scaled to unit length.
        sample_weights: [M] weight of each point, 0 or more; all 1 unless given.
        batch_size: Points of a mini-batch (Sculley, WWW 2010: a centroid is the running mean of what it was given);
            None takes all points in each iteration.

    Raises:
        ValueError: If there are no points, one is not finite (or zero, with ``spherical``), weights are negative, not
            finite or all zero, or a count is below 1.
    """
    weights = _checked_weights(features, sample_weights, spherical)
    for name, count in {
        "num_clusters": num_clusters,
        "num_restarts": num_restarts,
        "num_iterations": num_iterations,
        "batch_size": 1 if batch_size is None else batch_size,
    }.items():
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}.")
    points = features.detach().to(weights.dtype)
    # Squared distances are differences of squared norms: far from the origin they would lose their digits.
    origin = torch.zeros_like(points[0]) if spherical else weights @ points / weights.sum()
    points = F.normalize(points, dim=1) if spherical else points - origin
    cloud = _Cloud(points, points.square().sum(1), weights)
    generator = torch.Generator().manual_seed(seed)
    results = []
    for _ in range(num_restarts):
        centroids = _seed_centroids(cloud, num_clusters, generator)
        if batch_size is None:
            centroids = _lloyd(cloud, centroids, num_iterations, spherical)
        else:
            centroids = _mini_batches(cloud, centroids, num_iterations, spherical, batch_size, generator)
        assignments, distances = _nearest(cloud, centroids)
        results.append(KMeansResult(centroids, assignments, float((weights * distances).sum(dtype=torch.float64))))
    best = min(results, key=lambda result: result.inertia)
    return best._replace(centroids=best.centroids + origin)


class _Cloud(NamedTuple):
    """Weighted points and their squared norms."""

    points: Tensor
    norms: Tensor
    weights: Tensor

    def take(self, rows: Tensor) -> "_Cloud":
        return _Cloud(self.points[rows], self.norms[rows], self.weights[rows])


def _checked_weights(features: Tensor, weights: Tensor | None, spherical: bool) -> Tensor:
    if features.shape[0] == 0:
        raise ValueError("features are empty: k-means needs at least one point.")
    finite = features.isfinite().all(1)
    if not bool(finite.all()):
        bad = int((~finite).nonzero()[0])
        raise ValueError(f"features must be finite; row {bad} of {features.shape[0]} holds NaN or infinity.")
    if spherical and bool((features == 0).all(1).any()):
        bad = int((features == 0).all(1).nonzero()[0])
        raise ValueError(f"Row {bad} of features is zero and has no direction; drop it or set spherical to false.")
    if weights is None:
        return features.new_ones(features.shape[0], dtype=torch.promote_types(features.dtype, torch.float32))
    if not bool((weights.isfinite() & (weights >= 0)).all()) or not bool((weights > 0).any()):
        raise ValueError("sample_weights must be finite and 0 or more, with at least one above 0.")
    return weights.to(torch.promote_types(features.dtype, torch.float32))


def _seed_centroids(cloud: _Cloud, num_clusters: int, generator: torch.Generator) -> Tensor:
    """Greedy k-means++ (Arthur and Vassilvitskii, SODA 2007): of several draws by squared distance the best is kept."""
    candidates = cloud.weights.nonzero()[:, 0]
    limit = max(MIN_SEEDING_POINTS, SEEDING_POINTS_PER_CLUSTER * num_clusters)
    if candidates.shape[0] > limit:
        drawn = torch.randperm(candidates.shape[0], generator=generator)[:limit]
        candidates = candidates[drawn.sort().values.to(candidates.device)]
    if candidates.shape[0] < cloud.points.shape[0]:
        cloud = cloud.take(candidates)
    trials = 2 + int(math.log(num_clusters))
    chosen = [_draw(cloud.weights, 1, generator)]
    closest = _square_distances(cloud, cloud.points[chosen[0]])[:, 0]
    while len(chosen) < num_clusters:
        potential = cloud.weights * closest
        if not bool((potential > 0).any()):
            break
        drawn = _draw(potential, trials, generator)
        distances = torch.minimum(_square_distances(cloud, cloud.points[drawn]), closest[:, None])
        pick = (cloud.weights @ distances).argmin()
        chosen.append(drawn[pick, None])
        closest = distances[:, pick]
    centroids = cloud.points[torch.cat(chosen)]
    # Fewer distinct points than clusters: the rest repeats the first and stays without members.
    return torch.cat([centroids, centroids[:1].expand(num_clusters - centroids.shape[0], -1)])


def _draw(potential: Tensor, count: int, generator: torch.Generator) -> Tensor:
    # On the CPU in double precision: a cumulative sum on a GPU may differ from run to run.
    cumulative = potential.double().cpu().cumsum(0)
    draws = torch.rand(count, generator=generator, dtype=torch.float64) * cumulative[-1]
    drawn = torch.searchsorted(cumulative, draws, right=True).clamp_max(potential.shape[0] - 1)
    return drawn.to(potential.device)


def _lloyd(cloud: _Cloud, centroids: Tensor, num_iterations: int, spherical: bool) -> Tensor:
    previous: Tensor | None = None
    for _ in range(num_iterations):
        assignments, distances = _nearest(cloud, centroids)
        if previous is not None and torch.equal(assignments, previous):
            break
        sums, masses = _cluster_sums(cloud, assignments, centroids.shape[0])
        centroids = _fill_empty(cloud, distances, _means(sums, masses, centroids, spherical), masses)
        previous = assignments
    return centroids


def _mini_batches(
    cloud: _Cloud,
    centroids: Tensor,
    num_iterations: int,
    spherical: bool,
    batch_size: int,
    generator: torch.Generator,
) -> Tensor:
    num_points, num_clusters = cloud.points.shape[0], centroids.shape[0]
    total_sums, total_masses = torch.zeros_like(centroids), centroids.new_zeros(num_clusters)
    order, position = torch.randperm(num_points, generator=generator), 0
    for _ in range(num_iterations):
        if position >= num_points:
            order, position = torch.randperm(num_points, generator=generator), 0
        batch = cloud.take(order[position : position + batch_size].to(cloud.points.device))
        position += batch_size
        assignments, _ = _nearest(batch, centroids)
        sums, masses = _cluster_sums(batch, assignments, num_clusters)
        total_sums, total_masses = total_sums + sums, total_masses + masses
        centroids = _means(total_sums, total_masses, centroids, spherical)
    assignments, distances = _nearest(cloud, centroids)
    _, masses = _cluster_sums(cloud, assignments, num_clusters)
    return _fill_empty(cloud, distances, centroids, masses)


def _means(sums: Tensor, masses: Tensor, previous: Tensor, spherical: bool) -> Tensor:
    """Returns the new centroids; one without members, or whose directions cancel, stays where it was."""
    if spherical:
        means = F.normalize(sums, dim=1)
        return torch.where((means == 0).all(1, keepdim=True), previous, means)
    return torch.where(masses[:, None] > 0, sums / masses.clamp_min(torch.finfo(masses.dtype).tiny)[:, None], previous)


def _fill_empty(cloud: _Cloud, distances: Tensor, centroids: Tensor, masses: Tensor) -> Tensor:
    """Moves each centroid without members to the point that fits worst; no two go to equal points."""
    potential = cloud.weights * distances
    for empty in (masses == 0).nonzero()[:, 0]:
        farthest = potential.argmax()
        if not bool(potential[farthest] > 0):
            break  # every point is a centroid already
        centroids = centroids.index_copy(0, empty[None], cloud.points[farthest, None])
        taken = _square_distances(cloud, cloud.points[farthest, None])[:, 0] == 0
        potential = potential.masked_fill(taken, 0)
    return centroids


def _cluster_sums(cloud: _Cloud, assignments: Tensor, num_clusters: int) -> tuple[Tensor, Tensor]:
    """Returns the weighted sum of the points of each cluster, and their weight."""
    points, weights = cloud.points, cloud.weights
    sums, masses = points.new_zeros(num_clusters, points.shape[1]), points.new_zeros(num_clusters)
    rows = max(1, BLOCK_BYTES // (max(num_clusters, points.shape[1]) * points.element_size()))
    for block, mass, ids in zip(points.split(rows), weights.split(rows), assignments.split(rows), strict=True):
        if points.device.type == "cpu":
            sums.index_add_(0, ids, block * mass[:, None])
            masses.index_add_(0, ids, mass)
        else:  # there index_add adds in an order that changes from run to run; a matrix product does not
            members = F.one_hot(ids, num_clusters).to(points.dtype) * mass[:, None]
            sums.addmm_(members.T, block)
            masses += members.sum(0)
    return sums, masses


def _nearest(cloud: _Cloud, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the nearest centroid of each point and the squared distance to it."""
    rows = max(1, BLOCK_BYTES // (centroids.shape[0] * centroids.element_size()))
    blocks = zip(*(tensor.split(rows) for tensor in cloud), strict=True)
    nearest = [_square_distances(_Cloud(*block), centroids).min(1) for block in blocks]
    return torch.cat([block.indices for block in nearest]), torch.cat([block.values for block in nearest])


def _square_distances(cloud: _Cloud, centroids: Tensor) -> Tensor:
    """Returns [M, K] squared distances; those below the rounding of the operands are exactly 0."""
    norms = cloud.norms[:, None] + centroids.square().sum(1)
    distances = torch.addmm(norms, cloud.points, centroids.T, alpha=-2)
    return torch.where(distances > 16 * torch.finfo(norms.dtype).eps * norms, distances, 0)
