import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_modules.functional import kmeans as kmeans_module
from lightning_modules.functional.kmeans import kmeans


def blobs(num_blobs=5, per_blob=20, channels=8, spread=0.05):
    centres = F.normalize(torch.randn(num_blobs, channels), dim=1)
    return (centres[:, None] + spread * torch.randn(num_blobs, per_blob, channels)).flatten(0, 1)


def square_distances(points, centroids):
    return (points[:, None] - centroids).square().sum(-1)


def same_partition(a, b):
    return torch.equal(a[:, None] == a, b[:, None] == b)


@pytest.mark.parametrize("options", [{}, {"spherical": True}, {"batch_size": 32}])
def test_separated_blobs_are_found(options):
    result = kmeans(blobs(), 5, seed=0, **options)
    assert same_partition(result.assignments, torch.arange(100) // 20)


def test_the_result_is_a_fixed_point_of_the_literal_algorithm():
    points = torch.randn(60, 3)
    result = kmeans(points, 4, seed=3)
    distances = square_distances(points, result.centroids)
    torch.testing.assert_close(result.assignments, distances.argmin(1))
    means = torch.stack([points[result.assignments == k].mean(0) for k in range(4)])
    torch.testing.assert_close(result.centroids, means)
    assert result.inertia == pytest.approx(float(distances.amin(1).sum()), rel=1e-5)


def test_in_one_dimension_two_clusters_reach_the_best_split():
    points = torch.randn(40, 1).sort(0).values
    best = min(
        float(sum(half.var(0, correction=0) * len(half) for half in points.split([i, 40 - i]))) for i in range(1, 40)
    )
    assert kmeans(points, 2, seed=0, num_restarts=8).inertia == pytest.approx(best, rel=1e-4)


def test_the_seed_decides_the_result():
    points = torch.randn(200, 6)
    first, again, other = (kmeans(points, 20, seed=seed, num_restarts=1) for seed in (1, 1, 2))
    assert torch.equal(first.centroids, again.centroids)
    assert not torch.equal(first.centroids, other.centroids)


def test_the_global_generator_is_neither_read_nor_moved():
    points = torch.randn(50, 3)
    state = torch.get_rng_state()
    first = kmeans(points, 5, seed=0, batch_size=10)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert torch.equal(kmeans(points, 5, seed=0, batch_size=10).centroids, first.centroids)


def test_more_restarts_never_raise_the_inertia():
    points = torch.randn(150, 4)
    inertias = [kmeans(points, 12, seed=5, num_restarts=restarts).inertia for restarts in (1, 2, 4, 8)]
    assert inertias == sorted(inertias, reverse=True)


def test_an_integer_weight_counts_as_that_many_points():
    # Started alike, weighted and repeated points take the same Lloyd steps.
    points, weights = blobs(3, 8), torch.randint(1, 4, (24,))
    weighted = kmeans(points, 3, seed=0, sample_weights=weights.float())
    repeated = kmeans(points.repeat_interleave(weights, dim=0), 3, seed=0)
    assert weighted.inertia == pytest.approx(repeated.inertia, rel=1e-4)
    torch.testing.assert_close(weighted.centroids.sort(0).values, repeated.centroids.sort(0).values)


def test_points_of_no_weight_move_no_centroid():
    points = torch.cat([blobs(3, 10), 100 + torch.randn(5, 8)])
    weights = torch.cat([torch.ones(30), torch.zeros(5)])
    centroids = kmeans(points, 3, seed=0, sample_weights=weights).centroids
    assert centroids.abs().max() < 10


def test_spherical_centroids_have_unit_length_and_ignore_the_lengths_of_points():
    points = blobs()
    result = kmeans(points, 5, seed=0, spherical=True)
    scaled = kmeans(points * torch.rand(100, 1).add(0.1), 5, seed=0, spherical=True)
    torch.testing.assert_close(result.centroids.norm(dim=1), torch.ones(5))
    assert same_partition(result.assignments, scaled.assignments)


def test_mini_batches_come_close_to_all_points():
    points = blobs(8, 200)
    full = kmeans(points, 8, seed=0)
    mini = kmeans(points, 8, seed=0, batch_size=128)
    assert full.inertia <= mini.inertia * (1 + 1e-5) < full.inertia * 1.05


@settings(max_examples=25, deadline=None)
@given(distinct=st.integers(1, 6), copies=st.integers(1, 4), clusters=st.integers(1, 9), spherical=st.booleans())
def test_with_fewer_distinct_points_than_clusters_every_point_is_a_centroid(distinct, copies, clusters, spherical):
    generator = torch.Generator().manual_seed(distinct * 100 + clusters)
    points = torch.randn(distinct, 3, generator=generator).repeat(copies, 1)
    result = kmeans(points, clusters, seed=0, spherical=spherical)
    assert result.centroids.shape == (clusters, 3)
    assert result.centroids.isfinite().all()
    used = len(result.assignments.unique())
    assert used == min(distinct, clusters)
    if clusters >= distinct:
        assert result.inertia == pytest.approx(0, abs=1e-6)


def test_a_cluster_without_points_restarts_at_the_farthest_point():
    points = torch.tensor([[0.0], [0.1], [10.0]])
    cloud = kmeans_module._Cloud(points, points.square().sum(1), torch.ones(3))
    centroids = torch.tensor([[0.0], [-50.0]])
    assert kmeans_module._lloyd(cloud, centroids, 10, spherical=False).flatten().tolist() == pytest.approx([0.05, 10])


def test_points_far_from_the_origin_keep_their_clusters():
    points = blobs()
    far = kmeans(points + 300.0, 5, seed=0)
    assert same_partition(far.assignments, kmeans(points, 5, seed=0).assignments)


def test_blocks_of_any_size_give_the_same_clusters(monkeypatch):
    points = torch.randn(97, 5)
    whole = kmeans(points, 7, seed=0)
    monkeypatch.setattr(kmeans_module, "BLOCK_BYTES", 64)
    blocked = kmeans(points, 7, seed=0)
    assert torch.equal(blocked.assignments, whole.assignments)
    torch.testing.assert_close(blocked.centroids, whole.centroids)


def test_seeding_on_a_subset_of_the_points_still_finds_the_blobs(monkeypatch):
    monkeypatch.setattr(kmeans_module, "MIN_SEEDING_POINTS", 30)
    points = blobs(5, 100)
    monkeypatch.setattr(kmeans_module, "SEEDING_POINTS_PER_CLUSTER", 6)
    assert same_partition(kmeans(points, 5, seed=0).assignments, torch.arange(500) // 100)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_half_precision_is_clustered_in_single_and_double_stays_double(dtype):
    result = kmeans(blobs().to(dtype), 5, seed=0)
    assert result.centroids.dtype == (torch.float32 if dtype == torch.float16 else torch.float64)
    assert same_partition(result.assignments, torch.arange(100) // 20)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": torch.full((3, 2), float("nan"))}, "row 0 of 3 holds NaN"),
        ({"features": torch.zeros(0, 2)}, "empty"),
        ({"features": torch.zeros(3, 2), "spherical": True}, "Row 0 of features is zero"),
        ({"sample_weights": torch.tensor([1.0, -1, 1, 1])}, "sample_weights"),
        ({"sample_weights": torch.zeros(4)}, "sample_weights"),
        ({"num_clusters": 0}, "num_clusters must be at least 1, got 0"),
        ({"num_restarts": 0}, "num_restarts"),
        ({"num_iterations": 0}, "num_iterations"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {"features": torch.randn(4, 2), "num_clusters": 2, "seed": 0} | change
    with pytest.raises(ValueError, match=message):
        kmeans(**arguments)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("options", [{}, {"spherical": True}, {"batch_size": 32}])
def test_the_gpu_finds_the_same_clusters_every_time(options):
    points = blobs()
    first, second = (kmeans(points.cuda(), 5, seed=0, **options) for _ in range(2))
    assert torch.equal(first.centroids, second.centroids)
    assert torch.equal(first.assignments.cpu(), kmeans(points, 5, seed=0, **options).assignments)
