import io

import pytest
import torch
import torch.nn.functional as F

from lightning_modules.functional.bi_fusion.instances import Instances, describe_instances
from lightning_modules.networks.bi_fusion.online_merge import OnlineMerge


def frame(*objects: tuple[float, int], size: int = 40, seed: int = 0) -> tuple[torch.Tensor, Instances]:
    """A frame with an object of some class at some x each; a descriptor per class."""
    draw = torch.Generator().manual_seed(seed)
    points = torch.cat(
        [torch.tensor([x, 0.0, 0.0]) + 0.5 * torch.rand(size, 3, generator=draw) for x, _ in objects]
        + [torch.empty(0, 3)]
    )
    classes = torch.tensor([c for _, c in objects for _ in range(size)], dtype=torch.int64)
    features = F.one_hot(classes.clamp_min(0), 8).float()
    rows = tuple(torch.arange(i * size, (i + 1) * size) for i in range(len(objects)))
    return points, describe_instances(points, features, classes, torch.full((len(points),), 0.5), rows)


@pytest.mark.parametrize("overlap", ["boxes", "voxels"])
def test_objects_keep_their_id_whatever_their_order_and_number_of_points(overlap):
    merge = OnlineMerge(overlap=overlap, voxel_size=0.25)
    assert merge.merge(*frame((0, 1), (3, 2))).tolist() == [0, 1]
    assert merge.merge(*frame((3.05, 2), (6, 1), (0.05, 1), size=70, seed=1)).tolist() == [1, 2, 0]
    assert merge.counts.tolist() == [2, 2, 1]


def test_objects_of_different_classes_are_never_one_but_an_unknown_class_may_be_any():
    merge = OnlineMerge()
    merge.merge(*frame((0, 1)))
    assert merge.merge(*frame((0, 2))).tolist() == [1]
    points, instances = frame((0, 2), seed=1)
    assert merge.merge(points, instances._replace(class_ids=torch.tensor([-1]))).tolist() == [1]


def test_partners_are_averaged_over_their_frames():
    merge = OnlineMerge(box_update="mean")
    seen = [frame((0.01 * i, 1), seed=i) for i in range(4)]
    for points, instances in seen:
        merge.merge(points, instances._replace(scores=instances.scores * (1 + instances.boxes[:, 0])))
    assert len(merge) == 1
    torch.testing.assert_close(merge.boxes, torch.stack([i.boxes[0] for _, i in seen]).mean(0, keepdim=True))
    expected = torch.stack([i.scores[0] * (1 + i.boxes[0, 0]) for _, i in seen]).mean()
    torch.testing.assert_close(merge.scores[0], expected)


def test_a_box_grows_with_what_frames_show_of_an_object():
    merge = OnlineMerge()
    for i in range(4):
        merge.merge(*frame((0.2 * i, 1), seed=i))
    assert len(merge) == 1
    assert merge.boxes[0, 3] - merge.boxes[0, 0] > 0.9


def test_the_class_is_that_of_most_votes():
    merge = OnlineMerge()
    for i, class_id in enumerate((5, -1, 2)):
        points, instances = frame((0, 1), seed=i)
        merge.merge(points, instances._replace(class_ids=torch.tensor([-1])))
        merge._vote(torch.tensor([0]), torch.tensor([class_id]), torch.tensor([1.0 + (class_id == 2)]))
    assert merge.class_ids.tolist() == [2]


def test_frames_without_objects_change_nothing_and_the_first_may_be_one():
    merge = OnlineMerge()
    assert merge.merge(*frame()).tolist() == []
    merge.merge(*frame((0, 1)))
    assert merge.merge(*frame()).tolist() == []
    assert (len(merge), merge.num_frames) == (1, 3)


def test_seeing_a_surface_again_needs_no_more_memory():
    merge = OnlineMerge(voxel_size=0.25)
    for i in range(20):
        merge.merge(*frame((0, 1), size=200, seed=i))
    assert len(merge.voxels[0]) <= 3**3


def test_old_and_unsure_objects_are_forgotten_and_ids_stay():
    merge = OnlineMerge(max_age=1, max_objects=2)
    merge.merge(*frame((0, 1), (9, 1)))
    for i in range(2):
        merge.merge(*frame((0, 1), seed=i))
    assert merge.ids.tolist() == [0]
    merge.merge(*frame((3, 1), (5, 2), (7, 3)))
    assert len(merge) == 2
    assert merge.ids[0] == 0
    assert merge.merge(*frame((20, 1), seed=9)).tolist() == [5]


def test_a_stored_state_goes_on_where_it_stopped():
    stream = [frame((0.1 * i, 1), (3 - 0.1 * i, 2), (5 + i, 3), seed=i) for i in range(6)]
    whole, first, second = OnlineMerge(), OnlineMerge(), OnlineMerge()
    expected = [whole.merge(*seen).tolist() for seen in stream]
    first.reset("scene0000_00")
    found = [first.merge(*seen).tolist() for seen in stream[:3]]
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert second.scene == "scene0000_00"
    found += [second.merge(*seen).tolist() for seen in stream[3:]]
    assert found == expected
    assert torch.equal(second.boxes, whole.boxes)
    with pytest.raises(ValueError, match=r"voxel_size=0\.05"):
        OnlineMerge(voxel_size=0.1).load_state_dict(first.state_dict())


def test_reset_starts_another_scene():
    merge = OnlineMerge()
    merge.merge(*frame((0, 1)))
    merge.reset("next")
    assert merge.merge(*frame((0, 1))).tolist() == [0]
    assert (merge.scene, merge.num_frames) == ("next", 1)


@pytest.mark.parametrize("setting", [{"voxel_size": 0.0}, {"max_age": -1}, {"max_objects": -1}])
def test_settings_out_of_range_are_refused(setting):
    name, value = next(iter(setting.items()))
    with pytest.raises(ValueError, match=f"{name} (is )?{value}"):
        OnlineMerge(**setting)
