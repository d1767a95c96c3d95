import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_modules.metrics.point_segmentation import PointSegmentation, ViewConsistency

NAMES = ("wall", "chair", "floor", "table", "lamp", "otherfurniture")
BACKGROUND = ("wall", "floor", "otherfurniture")
GROUPS = {"head": ("wall", "chair", "floor"), "tail": ("lamp",)}


def points(seed, number=60, classes=range(6)):
    generator = torch.Generator().manual_seed(seed)
    truth = torch.tensor(list(classes))[torch.randint(len(classes), (number,), generator=generator)]
    truth[torch.rand(number, generator=generator) < 0.1] = -1
    scores = torch.randn(number, 6, generator=generator)
    scores[torch.arange(number), truth.clamp_min(0)] += 1
    return scores, truth


def twin(scores, truth, wanted, *, without=(), closed=False):
    """Set by set in numpy: mean IoU and accuracy over ``wanted`` of points whose truth is not in ``without``."""
    scores, truth = scores.numpy().copy(), truth.numpy()
    if closed:
        scores[:, list(without)] = -np.inf
    keep = (truth >= 0) & ~np.isin(truth, list(without))
    predicted, truth = scores.argmax(axis=1)[keep], truth[keep]
    ious, accuracies = [], []
    for c in wanted:
        if (truth == c).any():
            both = ((predicted == c) & (truth == c)).sum()
            ious.append(both / ((predicted == c) | (truth == c)).sum())
            accuracies.append(both / (truth == c).sum())
    return (np.mean(ious), np.mean(accuracies)) if ious else (np.nan, np.nan)


def figures_by_twin(scores, truth):
    sets = {
        "": twin(scores, truth, range(6)),
        "_head": twin(scores, truth, (0, 1, 2)),
        "_tail": twin(scores, truth, (4,)),
        "_foreground_3": twin(scores, truth, (1, 3, 4), without=(0, 2, 5)),
        "_foreground_3_closed": twin(scores, truth, (1, 3, 4), without=(0, 2, 5), closed=True),
    }
    return {f"{kind}{name}": values[i] for name, values in sets.items() for i, kind in enumerate(("miou", "macc"))}


def evaluated(batches):
    metric = PointSegmentation(NAMES, GROUPS, BACKGROUND)
    for batch in batches:
        metric.update(*batch)
    return {name: float(value) for name, value in metric.compute().items()}


@pytest.mark.parametrize("classes", [range(6), (0, 1, 3), (4,)])
def test_every_figure_equals_its_definition_over_all_points(classes):
    batches = [points(seed, classes=classes) for seed in range(3)]
    expected = figures_by_twin(*(torch.cat(parts) for parts in zip(*batches, strict=True)))
    assert evaluated(batches) == pytest.approx(expected, nan_ok=True)


def test_known_points():
    truth = torch.tensor([0, 0, 0, 1, 1, -1])
    predicted = torch.tensor([0, 0, 1, 1, 2, 0])
    metric = PointSegmentation(("a", "b", "c"))
    metric.update(torch.eye(3)[predicted], truth)
    figures = metric.compute()
    assert float(figures["miou"]) == pytest.approx((2 / 3 + 1 / 3) / 2)  # c occurs in no truth
    assert float(figures["macc"]) == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert metric.class_table() == {"a": pytest.approx((2 / 3, 2 / 3, 3)), "b": pytest.approx((1 / 3, 1 / 2, 2))}
    assert set(figures) == {"miou", "macc"}


def test_background_counts_in_the_whole_alone():
    """A chair called wall is a miss of the open variant; the closed one asks for the next best."""
    scores = torch.tensor([[0.9, 0.8, 0, 0, 0, 0], [0.9, 0.8, 0, 0, 0, 0], [0.1, 0.8, 0, 0, 0, 0]])
    figures = evaluated([(scores, torch.tensor([0, 1, 1]))])
    assert figures["miou"] == pytest.approx(0.5)
    assert figures["miou_foreground_3"] == pytest.approx(0.5)
    assert figures["miou_foreground_3_closed"] == 1


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_streaming_order_and_renaming_of_classes_change_nothing(seed):
    batches = [points(seed + i, 20) for i in range(3)]
    expected = evaluated(batches)
    whole = tuple(torch.cat(parts) for parts in zip(*batches, strict=True))
    assert evaluated([whole]) == pytest.approx(expected, nan_ok=True)
    assert evaluated(batches[::-1]) == pytest.approx(expected, nan_ok=True)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    renamed = PointSegmentation([NAMES[i] for i in order], GROUPS, BACKGROUND)
    inverse = order.argsort()
    renamed.update(whole[0][:, order], torch.where(whole[1] < 0, -1, inverse[whole[1].clamp_min(0)]))
    assert {k: float(v) for k, v in renamed.compute().items()} == pytest.approx(expected, nan_ok=True)
    perfect = evaluated([(torch.eye(6)[whole[1].clamp_min(0)], whole[1])])
    assert all(value == 1 or np.isnan(value) for value in perfect.values())


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_nothing_labelled_is_not_a_number():
    metric = PointSegmentation(NAMES, GROUPS, BACKGROUND)
    metric.update(torch.randn(4, 6), torch.full((4,), -1))
    metric.update(torch.zeros(0, 6), torch.zeros(0, dtype=torch.int64))
    assert all(value.isnan() for value in metric.compute().values())
    assert metric.class_table() == metric.scene_table() == {}


def test_the_table_of_scenes_has_each_scenes_own_figures():
    metric = PointSegmentation(NAMES)
    parts = {"scene0000_00": [points(0), points(1)], "scene0011_01": [points(2)]}
    for scene, batches in parts.items():
        for batch in batches:
            metric.update(*batch, scene=scene)
    metric.update(*points(3))
    table = metric.scene_table()
    assert list(table) == list(parts)
    for scene, batches in parts.items():
        scores, truth = (torch.cat(columns) for columns in zip(*batches, strict=True))
        miou, macc = twin(scores, truth, range(6))
        assert table[scene] == pytest.approx({"miou": miou, "macc": macc, "points": int((truth >= 0).sum())})
    metric.reset()
    assert metric.scene_table() == {}


def test_unknown_classes_and_an_empty_foreground_are_refused():
    with pytest.raises(ValueError, match=r"\['sofa'\] are not among the 6 classes"):
        PointSegmentation(NAMES, {"head": ("sofa",)})
    with pytest.raises(ValueError, match="background has all classes"):
        PointSegmentation(("wall",), background=("wall",))


def consistency(seeds):
    metric, text = ViewConsistency(), torch.eye(5)
    for seed in seeds:
        a = torch.randn(9, 5, generator=torch.Generator().manual_seed(seed))
        metric.update(a, a + 0.5 * a.roll(1, 0), text)
    return {name: float(value) for name, value in metric.compute().items()}


def test_view_consistency_is_the_mean_over_pairs():
    metric = ViewConsistency()
    a = torch.tensor([[2.0, 0], [1, 1], [0, 3]])
    b = torch.tensor([[1.0, 0], [-1, -1], [3, 0.5]])
    metric.update(a[:1], b[:1], torch.eye(2))
    metric.update(a[1:], b[1:], torch.eye(2))
    cosines = [1, -1, 0.5 / np.sqrt(9.25)]
    figures = metric.compute()
    assert float(figures["view_cosine"]) == pytest.approx(np.mean(cosines))
    assert float(figures["view_label_agreement"]) == pytest.approx(2 / 3)


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_view_consistency_without_pairs_is_not_a_number():
    assert all(value.isnan() for value in ViewConsistency().compute().values())


def evaluated_with_tables(scenes):
    metric = PointSegmentation(NAMES, GROUPS, BACKGROUND)
    for scene, seed in scenes:
        metric.update(*points(seed), scene=scene)
    numbers = {name: float(value) for name, value in metric.compute().items()}
    for scene, figures in metric.scene_table().items():
        numbers |= {f"{name} of {scene}": value for name, value in figures.items()}
    return numbers | consistency([seed for _, seed in scenes])


def check_process(rank, port, cases):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    for scenes_of_rank, whole in cases:
        assert evaluated_with_tables(scenes_of_rank[rank]) == pytest.approx(whole, nan_ok=True)
    dist.destroy_process_group()


@pytest.mark.ddp
def test_two_processes_agree_on_the_result_of_one(free_port):
    shares = [
        ([("a", 0), ("b", 1)], [("b", 2), ("c", 3)]),
        ([("a", 0)], []),  # a process without a scene
    ]
    cases = [(share, evaluated_with_tables(share[0] + share[1])) for share in shares]
    mp.spawn(check_process, (free_port, cases), nprocs=2)
