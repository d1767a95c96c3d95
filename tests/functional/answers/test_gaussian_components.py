import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_modules.functional.answers.gaussian_answers import (
    best_level,
    gaussian_relevancy,
    nearest_gaussians,
)
from lightning_modules.functional.answers.gaussian_components import (
    GaussianSelector,
    SelectionSettings,
    linked_groups,
    object_boxes,
    select_gaussians,
    stretch,
)
from lightning_modules.functional.splatting.gaussians import GaussianScene
from tests.functional.answers.test_gaussian_answers import random_language, unit
from tests.functional.random_scenes import isotropic_scene

RAW = SelectionSettings(smoothing_neighbours=1)


def blobs(*sizes: int, gap: float = 5.0, spacing: float = 0.1) -> GaussianScene:
    """Rows of touching Gaussians along x, ``gap`` apart along y."""
    means = [[spacing * i, gap * row, 0.0] for row, size in enumerate(sizes) for i in range(size)]
    return isotropic_scene(means, [spacing] * len(means), [0.9] * len(means))


def literal_groups(scene: GaussianScene, reach: float) -> list[set[int]]:
    """Single linkage by flooding, for scenes of few Gaussians that are all each other's neighbours."""
    means, sizes = scene.means.double(), scene.scales.amax(dim=1).double()
    distances = torch.cdist(means, means)
    spacing = distances.sort(dim=1).values[:, 1].quantile(0.5)
    linked = distances <= reach * torch.maximum(sizes[:, None] + sizes, spacing)
    left, groups = set(range(len(means))), []
    while left:
        group, frontier = set(), {min(left)}
        while frontier:
            group |= frontier
            frontier = {int(j) for i in frontier for j in linked[i].nonzero()[:, 0]} - group
        groups.append(group)
        left -= group
    return sorted(groups, key=len, reverse=True)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), num=st.integers(3, 16), reach=st.sampled_from([0.3, 0.7, 1.1, 2.0]))
def test_groups_are_those_of_flooding(seed, num, reach):
    generator = torch.Generator().manual_seed(seed)
    means = torch.rand(num, 3, generator=generator)
    scales = (0.1 * torch.rand(num, generator=generator)).tolist()
    scene = isotropic_scene(means.tolist(), [scale + 1e-3 for scale in scales], [0.9] * num)
    groups = linked_groups(scene, torch.ones(num, dtype=torch.bool), SelectionSettings(link_reach=reach))
    ours = [set((groups == group).nonzero()[:, 0].tolist()) for group in range(int(groups.amax()) + 1)]
    theirs = literal_groups(scene, reach)
    assert sorted(map(len, ours)) == sorted(map(len, theirs))
    assert all(group in theirs for group in ours)
    assert [len(group) for group in ours] == sorted((len(group) for group in ours), reverse=True)


def test_groups_do_not_depend_on_the_unit_of_length():
    scene = blobs(12, 5)
    larger = scene._replace(means=100 * scene.means, log_scales=scene.log_scales + math.log(100))
    everyone = torch.ones(17, dtype=torch.bool)
    assert torch.equal(linked_groups(scene, everyone), linked_groups(larger, everyone))


def test_groups_hold_the_selected_gaussians_alone():
    selected = torch.zeros(17, dtype=torch.bool)
    selected[[0, 1, 2, 12]] = True
    assert linked_groups(blobs(12, 5), selected).tolist() == [0, 0, 0, *[-1] * 9, 1, *[-1] * 4]


def test_a_gap_that_a_large_gaussian_spans_is_no_gap():
    scene = isotropic_scene([[0, 0, 0], [0.1, 0, 0], [1.1, 0, 0], [1.2, 0, 0]], [0.05, 0.05, 0.05, 0.05], [0.9] * 4)
    everyone = torch.ones(4, dtype=torch.bool)
    assert linked_groups(scene, everyone).tolist() == [0, 0, 1, 1]
    wide = scene._replace(log_scales=torch.tensor([0.05, 0.5, 0.05, 0.05]).log()[:, None].expand(4, 3))
    assert linked_groups(wide, everyone).tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("num", [0, 1, 2])
def test_hardly_any_selected_gaussians_make_groups_too(num):
    selected = torch.arange(5) < num
    groups = linked_groups(blobs(5), selected)
    assert groups.tolist() == [0] * num + [-1] * (5 - num)


def test_small_groups_are_dropped_and_several_equal_objects_stay():
    scene = blobs(40, 40, 1, 10)
    scores = torch.tensor([0.7] * 81 + [0.2] * 10)
    assert select_gaussians(scene, scores, RAW).tolist() == [True] * 80 + [False] * 11
    everything = SelectionSettings(smoothing_neighbours=1, min_component_share=0)
    assert select_gaussians(scene, scores, everything).tolist() == [True] * 81 + [False] * 10


def test_the_stretched_threshold_is_a_share_of_the_way_to_the_peak():
    scene = blobs(101)
    scores = torch.linspace(0.3, 0.8, 101)
    selected = select_gaussians(scene, scores, SelectionSettings(smoothing_neighbours=1, threshold=0.6))
    assert selected.tolist() == [False] * 60 + [True] * 41
    # However little a prompt fits, what fits it best is selected.
    assert torch.equal(select_gaussians(scene, 0.5 * scores, RAW), selected)


def test_the_plain_threshold_selects_nothing_where_nothing_fits():
    settings_ = SelectionSettings(smoothing_neighbours=1, threshold=0.5, threshold_scale="relevancy")
    scores = torch.linspace(0.3, 0.8, 101)
    assert torch.equal(select_gaussians(blobs(101), scores, settings_), scores >= 0.5)
    assert not select_gaussians(blobs(101), 0.5 * scores, settings_).any()


def test_faint_gaussians_and_those_without_language_are_not_selected():
    scene = blobs(6)
    scene.opacity_logits[1] = torch.tensor(0.09).logit()
    scores = torch.tensor([0.7, 0.7, 0.0, 0.7, 0.7, 0.2])
    assert select_gaussians(scene, scores, RAW).tolist() == [True, False, False, True, True, False]


def test_nothing_to_select_from_is_an_empty_selection():
    assert not select_gaussians(blobs(6), torch.zeros(6)).any()


def test_the_lowest_score_of_the_stretch_is_that_of_a_gaussian_with_language():
    stretched = stretch(torch.tensor([0.0, 0.4, 0.6, 0.8]), SelectionSettings())
    torch.testing.assert_close(stretched, torch.tensor([0.0, 0.0, 0.5, 1.0]))


def test_smoothing_closes_holes_and_removes_lone_answers():
    scene = blobs(60)
    scores = torch.full((60,), 0.3)
    scores[:20] = 0.8
    scores[10] = 0.0  # the gate took its language
    scores[40] = 0.8  # a floater's
    selected = select_gaussians(scene, scores)
    assert selected[:18].all()
    assert not selected[24:].any()
    raw = select_gaussians(scene, scores, SelectionSettings(smoothing_neighbours=1, min_component_share=0))
    assert not raw[10]
    assert raw[40]


def test_neighbours_at_hand_change_nothing():
    scene, scores = blobs(30, 7), torch.rand(37, generator=torch.Generator().manual_seed(0))
    neighbours = nearest_gaussians(scene, SelectionSettings().smoothing_neighbours)
    assert torch.equal(select_gaussians(scene, scores, neighbours=neighbours), select_gaussians(scene, scores))


def test_the_selector_takes_the_steps_one_after_the_other():
    language = random_language(0, num=200)
    prompt = unit(16, seed=3)
    answer = GaussianSelector(language).select(prompt)
    (scores,), (level,) = best_level(gaussian_relevancy(language, prompt[None]))
    assert torch.equal(answer.scores, scores)
    assert answer.level == level
    assert torch.equal(answer.selected, select_gaussians(language.gaussians, scores))


def test_boxes_hold_their_groups():
    scene = blobs(4, 3)
    scores = torch.tensor([0.5, 0.6, 0.7, 0.8, 0.2, 0.2, 0.5])
    first, second = object_boxes(scene, scores, torch.tensor([0, 0, 0, 0, 1, 1, -1]))
    assert first.minimum == pytest.approx((0, 0, 0))
    assert first.maximum == pytest.approx((0.3, 0, 0))
    assert first.centre == pytest.approx((0.15, 0, 0))
    assert first.size == pytest.approx((0.3, 0, 0))
    assert (first.num_gaussians, second.num_gaussians) == (4, 2)
    assert first.mean_score == pytest.approx(0.65)
    assert second.centre == pytest.approx((0.05, 5, 0))
    assert object_boxes(scene, scores, torch.full((7,), -1)) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"threshold": 1.2}, "threshold must be from 0 to 1, got 1.2"),
        ({"link_reach": 0.0}, "link_reach .* got 0.0"),
        ({"num_neighbours": 0}, "num_neighbours must be at least 1, got 0"),
        ({"smoothing_neighbours": 0}, "smoothing_neighbours must be at least 1, got 0"),
    ],
)
def test_bad_settings_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        SelectionSettings(**change)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_gpu_selects_the_same_gaussians():
    language, prompt = random_language(0, num=500, channels=256), unit(256, seed=3)
    expected = GaussianSelector(language).select(prompt)
    on_gpu = language._replace(
        gaussians=GaussianScene(*(part.cuda() for part in language.gaussians)),
        codes=language.codes._replace(
            channel_ids=language.codes.channel_ids.cuda(), values=language.codes.values.cuda()
        ),
        codebooks=language.codebooks.cuda(),
        negatives=language.negatives.cuda(),
    )
    ours = GaussianSelector(on_gpu).select(prompt.cuda())
    assert ours.level == expected.level
    torch.testing.assert_close(ours.scores.cpu(), expected.scores, atol=1e-5, rtol=0)
    assert (ours.selected.cpu() == expected.selected).float().mean() > 0.99  # scores beside the threshold may differ
    boxes = object_boxes(on_gpu.gaussians, ours.scores, linked_groups(on_gpu.gaussians, ours.selected))
    assert sum(box.num_gaussians for box in boxes) == int(ours.selected.sum())
