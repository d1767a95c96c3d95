import itertools

import hypothesis.strategies as st
import torch
from hypothesis import given, settings
from hypothesis.extra.numpy import arrays

from lightning_modules.functional.bi_fusion.instances import (
    box_iou,
    frame_instances,
    majority_class,
    match_objects,
    same_class,
    voxel_overlap,
)


def cluster(centre: tuple[float, float, float], size: int, seed: int) -> torch.Tensor:
    return torch.tensor(centre) + 0.1 * torch.rand(size, 3, generator=torch.Generator().manual_seed(seed))


def test_neighbouring_points_of_one_class_are_one_object():
    points = torch.cat([cluster((0, 0, 0), 60, 0), cluster((0.1, 0, 0), 60, 1), cluster((2, 0, 0), 60, 2)])
    classes = torch.tensor([3] * 60 + [4] * 60 + [3] * 60)
    features = torch.nn.functional.one_hot(classes, 6).float()
    order = torch.randperm(180, generator=torch.Generator().manual_seed(3))
    found = frame_instances(points[order], features[order], classes[order], torch.full((180,), 0.7))
    assert sorted(found.class_ids.tolist()) == [3, 3, 4]
    for rows, class_id, box, descriptor in zip(
        found.point_ids, found.class_ids, found.boxes, found.descriptors, strict=True
    ):
        assert len(rows) == 60
        assert set(classes[order][rows].tolist()) == {int(class_id)}
        assert torch.equal(box, torch.cat([points[order][rows].amin(0), points[order][rows].amax(0)]))
        assert descriptor[class_id] == 1.0
    assert torch.allclose(found.scores, torch.tensor(0.7))


def test_small_groups_walls_and_points_without_a_class_are_no_objects():
    points = torch.cat([cluster((x, 0, 0), n, n) for x, n in ((0.0, 10), (2.0, 50), (4.0, 50), (6.0, 50))])
    classes = torch.tensor([1] * 10 + [2] * 50 + [0] * 50 + [-1] * 50)
    found = frame_instances(points, torch.ones(160, 2), classes, torch.ones(160), min_points=20, leave_out=(0,))
    assert found.class_ids.tolist() == [2]


def test_a_frame_without_points_has_no_objects():
    found = frame_instances(torch.empty(0, 3), torch.empty(0, 4), torch.empty(0, dtype=torch.int64), torch.empty(0))
    assert found.point_ids == ()
    assert found.boxes.shape == (0, 6)


def test_a_superpoint_takes_the_class_of_most():
    classes = torch.tensor([1, 1, 2, -1, 2, 0, -1])
    groups = torch.tensor([7, 7, 7, 7, 3, 3, 9])
    assert majority_class(classes, groups).tolist() == [1, 1, 1, 1, 0, 0, -1]


@given(arrays("float64", (2, 2, 6), elements=st.floats(-2, 2)))
def test_box_overlap_is_that_of_its_definition(corners):
    ones, others = (
        torch.cat([torch.minimum(x[:, :3], x[:, 3:]), torch.maximum(x[:, :3], x[:, 3:]) + 0.01], dim=1)
        for x in torch.from_numpy(corners).float()
    )
    iou = box_iou(ones, others)
    for (i, a), (j, b) in itertools.product(enumerate(ones.double()), enumerate(others.double())):
        shared = (torch.minimum(a[3:], b[3:]) - torch.maximum(a[:3], b[:3])).clamp_min(0).prod()
        united = (a[3:] - a[:3]).prod() + (b[3:] - b[:3]).prod() - shared
        assert abs(float(iou[i, j]) - float(shared / united)) < 1e-3
    torch.testing.assert_close(iou, box_iou(others, ones).T)


def test_a_flat_box_still_overlaps_itself():
    door = torch.tensor([[0.0, 0, 0, 1, 0, 2]])
    assert box_iou(door, door).item() == 1.0


def test_voxel_overlap_is_the_share_of_the_smaller_object():
    one, part, away = torch.tensor([1, 2, 3, 4]), torch.tensor([3, 4]), torch.tensor([9])
    assert voxel_overlap((one, part), (part, away)).tolist() == [[1.0, 0.0], [1.0, 0.0]]
    assert voxel_overlap((), (one,)).shape == (0, 1)


def test_an_unknown_class_agrees_with_every_class():
    assert same_class(torch.tensor([1, -1]), torch.tensor([1, 2])).tolist() == [[1.0, 0.0], [1.0, 1.0]]


@settings(max_examples=30)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 10**6))
def test_pairs_have_the_largest_sum_of_all_pairings(rows, columns, seed):
    similarity = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed))
    a, b = match_objects(similarity)
    best = max(
        sum(float(similarity[i, j]) for i, j in zip(chosen, order, strict=False))
        for chosen in itertools.permutations(range(rows), min(rows, columns))
        for order in itertools.permutations(range(columns), min(rows, columns))
    )
    assert abs(float(similarity[a, b].sum()) - best) < 1e-5
    assert len(set(a.tolist())) == len(a) == min(rows, columns)


def test_weak_pairs_are_dropped():
    a, b = match_objects(torch.tensor([[0.9, 0.0], [0.0, 0.1]]), min_similarity=0.2)
    assert (a.tolist(), b.tolist()) == ([0], [0])


def test_objects_without_voxels_overlap_with_none():
    none, some = torch.empty(0, dtype=torch.int64), torch.tensor([3, 5])
    assert voxel_overlap((some, none), (some, none)).tolist() == [[1, 0], [0, 0]]
    assert voxel_overlap((none,), (none,)).tolist() == [[0]]
