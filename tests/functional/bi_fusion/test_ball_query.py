import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import cKDTree

from datamodules.readers.rgbd import read_depth, read_rgbd_frames
from lightning_modules.functional.bi_fusion import ball_query as module
from lightning_modules.functional.bi_fusion.ball_query import ball_query, ball_query_reference
from lightning_modules.functional.cameras import back_project


def by_tree(points: torch.Tensor, radius: float, num_neighbours: int) -> torch.Tensor:
    tree = cKDTree(points.double().numpy())
    _, rows = tree.query(points.double().numpy(), k=num_neighbours, distance_upper_bound=radius)
    return torch.from_numpy(np.where(rows == len(points), -1, rows).reshape(len(points), -1)).int()


@pytest.mark.parametrize(("num_neighbours", "radius"), [(2, 0.15), (8, 0.15), (32, 0.25)])
def test_every_row_equals_scipys_tree(num_neighbours, radius):
    points = torch.rand(3000, 3) * torch.tensor([4.0, 3.0, 0.25]) + 10
    neighbours = ball_query(points, radius, num_neighbours)
    assert neighbours.dtype == torch.int32
    assert torch.equal(neighbours, by_tree(points, radius, num_neighbours))
    assert (neighbours[:, -1] >= 0).any()
    assert (neighbours[:, -1] < 0).any() or num_neighbours == 2


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    num_points=st.integers(1, 200),
    radius=st.floats(0.01, 3.0),
    num_neighbours=st.integers(1, 40),
    num_clouds=st.integers(1, 4),
    shift=st.sampled_from([0.0, 50.0, -1000.0]),
)
def test_every_row_equals_the_dense_twin(seed, num_points, radius, num_neighbours, num_clouds, shift):
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(num_points, 3, generator=generator) + shift
    points[num_points // 2 :] = points[
        : num_points - num_points // 2
    ].clone()  # as where frames are sampled with return
    clouds = torch.randint(-1, num_clouds, (num_points,), generator=generator, dtype=torch.int32)
    for arguments in ((points, radius, num_neighbours), (points, radius, num_neighbours, clouds)):
        assert torch.equal(ball_query(*arguments), ball_query_reference(*arguments))


def test_queries_apart_from_the_points_equal_the_dense_twin_and_the_points_own_rows():
    points, queries = torch.rand(300, 3), torch.rand(50, 3) * 1.5
    assert torch.equal(
        ball_query(points, 0.2, 5, queries=queries), ball_query_reference(points, 0.2, 5, queries=queries)
    )
    clouds, query_clouds = torch.arange(300).int() % 3, torch.arange(50).int() % 4
    arguments = {"queries": queries, "query_cloud_ids": query_clouds}
    neighbours = ball_query(points, 0.3, 5, clouds, **arguments)
    assert torch.equal(neighbours, ball_query_reference(points, 0.3, 5, clouds, **arguments))
    assert (neighbours[query_clouds == 3] == -1).all()
    assert torch.equal(ball_query(points, 0.2, 5, queries=points), ball_query(points, 0.2, 5))
    assert torch.equal(ball_query(points[:0], 0.2, 2, queries=queries[:3]), torch.full((3, 2), -1).int())


def test_crowded_balls_are_searched_in_a_smaller_radius_first_with_the_same_result():
    points = torch.rand(1500, 3) * torch.tensor([3.0, 3.0, 0.02])
    points[1400:] = 1 + 40 * torch.rand(100, 3)  # some lie alone
    points[700:800] = points[:100]
    clouds = torch.arange(1500).int() % 3
    for arguments in ((points, 1.0, 8), (points, 1.0, 8, clouds)):
        own = (points, arguments[3] if len(arguments) > 3 else None)
        assert 0.05 < module._first_radius(*own, *own, 1.0, 8) < 0.6
        neighbours = ball_query(*arguments)
        assert torch.equal(neighbours, ball_query_reference(*arguments))
        assert (neighbours[:, -1] < 0).sum() > 50
    queries = points + 0.01
    apart = ball_query(points, 1.0, 8, clouds, queries=queries, query_cloud_ids=clouds)
    assert torch.equal(apart, ball_query_reference(points, 1.0, 8, clouds, queries=queries, query_cloud_ids=clouds))
    same = torch.ones(1500, 3)
    assert torch.equal(ball_query(same, 1.0, 3), torch.arange(3).int().expand(1500, 3))


def test_points_of_a_lattice_are_sorted_by_distance_then_number_and_the_radius_is_in():
    lattice = torch.cartesian_prod(*[torch.arange(4.0)] * 3) / 8
    neighbours = ball_query(lattice, 0.125, 7)
    assert torch.equal(neighbours, ball_query_reference(lattice, 0.125, 7))
    inner = 21  # (1, 1, 1)
    assert neighbours[inner].tolist() == [21, 5, 17, 20, 22, 25, 37]
    assert neighbours[0].tolist() == [0, 1, 4, 16, -1, -1, -1]


def test_clouds_at_the_same_place_do_not_mix_and_match_their_own_queries():
    cloud = torch.rand(300, 3)
    alone = ball_query(cloud, 0.2, 9)
    stacked, cloud_ids = torch.cat([cloud, cloud, cloud[:100]]), torch.tensor([0] * 300 + [5] * 300 + [-2] * 100)
    neighbours = ball_query(stacked, 0.2, 9, cloud_ids.int())
    assert torch.equal(neighbours[:300], alone)
    assert torch.equal(neighbours[300:600], torch.where(alone < 0, -1, alone + 300))
    assert torch.equal(neighbours[600:], torch.where((part := ball_query(cloud[:100], 0.2, 9)) < 0, -1, part + 600))
    order = torch.randperm(700)
    mixed = ball_query(stacked[order], 0.2, 9, cloud_ids[order].int())
    restored = torch.where(mixed < 0, -1, order[mixed.long()])
    assert torch.equal(restored.sort(dim=1).values, neighbours[order].sort(dim=1).values.long())


def test_results_depend_neither_on_threads_nor_on_earlier_calls():
    points = torch.rand(5000, 3)
    whole = ball_query(points, 0.08, 16)
    before = torch.get_num_threads()
    try:
        for num_threads in (1, 3):
            torch.set_num_threads(num_threads)
            assert torch.equal(ball_query(points, 0.08, 16), whole)
    finally:
        torch.set_num_threads(before)
    ball_query(torch.rand(5000, 3), 0.3, 4, torch.arange(5000, dtype=torch.int32) % 7)
    assert torch.equal(ball_query(points, 0.08, 16), whole)
    results: list[torch.Tensor] = []
    threads = [threading.Thread(target=lambda: results.append(ball_query(points, 0.08, 16))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 3
    assert all(torch.equal(result, whole) for result in results)


def test_a_point_is_its_own_first_neighbour_and_neighbours_are_mutual_where_all_fit():
    points = torch.rand(400, 3)
    neighbours = ball_query(points, 0.1, 60)
    assert torch.equal(neighbours[:, 0], torch.arange(400).int())
    assert (neighbours[:, -1] == -1).all()
    near = torch.zeros(400, 401, dtype=torch.bool).scatter_(1, neighbours.long() % 401, True)[:, :400]
    assert torch.equal(near, near.T)


def test_points_that_are_not_finite_have_no_neighbours_and_are_none():
    points = torch.rand(100, 3) / 10
    points[7, 1], points[8] = float("nan"), float("inf")
    neighbours = ball_query(points, 0.05, 30)
    assert (neighbours[7:9] == -1).all()
    others = torch.tensor([i for i in range(100) if i not in (7, 8)])
    expected = ball_query(points[others], 0.05, 30)
    assert torch.equal(neighbours[others].long(), torch.where(expected < 0, -1, others[expected.long()]))


def test_no_points_have_no_rows():
    assert ball_query(torch.zeros(0, 3), 0.1, 4).shape == (0, 4)


@pytest.mark.parametrize(("radius", "num_neighbours", "name"), [(0.0, 4, "radius"), (0.1, 0, "num_neighbours")])
def test_settings_without_a_neighbour_are_refused(radius, num_neighbours, name):
    with pytest.raises(ValueError, match=f"{name} must be"):
        ball_query(torch.rand(5, 3), radius, num_neighbours)


def test_a_real_frame_equals_scipys_tree(shared_data):
    frame = read_rgbd_frames(shared_data / "rgbd")[0]
    surface, known = back_project(read_depth(frame.depth), frame.camera)
    points = surface[known]
    points = points[torch.randperm(len(points))[:20_000]]
    ours, theirs = ball_query(points, 0.04, 17), by_tree(points, 0.04, 17)
    exact = points.double()
    distances = [
        torch.where(rows < 0, -1.0, (exact[rows.long()] - exact[:, None]).norm(dim=2)) for rows in (ours, theirs)
    ]
    torch.testing.assert_close(*distances, atol=1e-12, rtol=0)
    same = (ours == theirs).all(dim=1)
    assert same.float().mean() > 0.98  # the tree sorts equal distances, frequent on planes, as it comes
    ranked = ours[~same].sort(dim=1).values
    assert ((ranked[:, 1:] > ranked[:, :-1]) | (ranked[:, 1:] < 0)).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_equals_cpu():
    points, clouds = torch.rand(20_000, 3), torch.randint(0, 4, (20_000,), dtype=torch.int32)
    ours = ball_query(points.cuda(), 0.08, 32, clouds.cuda())
    assert torch.equal(ours.cpu(), ball_query(points, 0.08, 32, clouds))
