import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_modules.functional.answers.lerf_protocol import (
    ProtocolSettings,
    best_level_masks,
    box_average,
    intersection_over_union,
    localize,
    majority,
    segment,
)


def average(image, side):
    """AvgPool2d(side, stride 1, padding side // 2, count_include_pad=False), window by window."""
    height, width = image.shape
    reach = side // 2
    result = np.empty_like(image)
    for y in range(height):
        for x in range(width):
            window = image[max(0, y - reach) : y + reach + 1, max(0, x - reach) : x + reach + 1]
            result[y, x] = window.mean()
    return result


def literal_segmentation(maps, relevancy_pool, mask_pool, threshold):
    """The protocol of LangSplatV2's eval_lerf.py, prompt by prompt and level by level."""
    masks, levels, peaks = [], [], []
    for prompt in range(maps.shape[1]):
        own_masks, own_peaks = [], []
        for level in range(maps.shape[0]):
            relevancy = maps[level, prompt]
            smooth = 0.5 * (average(relevancy, relevancy_pool) + relevancy)
            stretched = smooth - smooth.min()
            stretched = stretched / (stretched.max() + 1e-9)
            stretched = np.clip(stretched * 2 - 1, 0, 1)
            own_masks.append(average((stretched > threshold).astype(float), mask_pool) > 0.5)
            own_peaks.append(smooth.max())
        levels.append(int(np.argmax(own_peaks)))
        masks.append(own_masks)
        peaks.append(own_peaks)
    return np.array(masks).swapaxes(0, 1), np.array(levels), np.array(peaks).T


def literal_mask(maps, thresholds, mask_pool):
    """One level's mask: every map stretched to -1..1, clipped, cut; the cuts united; the majority of a window."""
    union = np.zeros(maps[0].shape, dtype=bool)
    for image in maps:
        stretched = image - image.min()
        stretched = np.clip(2 * (stretched / (stretched.max() + 1e-9)) - 1, 0, 1)
        union |= stretched > thresholds
    return average(union.astype(float), mask_pool) > 0.5


def literal_mean_rule(maps, companion, threshold, candidates, pools, num_levels):
    """eval_3d_ovs.py and eval_mip_nerf360.py for one prompt: the level with the highest mean of R' in its own mask.

    ``companion`` is the map of the second prompt (3D-OVS's room), or None; the scripts do not smooth it.
    """
    masks, scores = [], np.zeros(num_levels)
    for level in range(num_levels):
        smooth = 0.5 * (average(maps[level], pools[0]) + maps[level])
        seconds = [] if companion is None else [companion[level]]
        masks.append(literal_mask([smooth, *seconds], threshold, pools[1]))
        if level in candidates and masks[-1].any():
            scores[level] = (smooth * masks[-1]).sum() / masks[-1].sum()
    return np.array(masks), max(candidates, key=lambda level: scores[level]), scores


def literal_localization(maps, boxes, pool):
    hits, levels = [], []
    for prompt, own_boxes in enumerate(boxes):
        averages = [average(maps[level, prompt], pool) for level in range(maps.shape[0])]
        levels.append(int(np.argmax([a.max() for a in averages])))
        best = averages[levels[-1]]
        hit = False
        for y, x in np.argwhere(best == best.max()):
            for x1, y1, x2, y2 in own_boxes:
                hit |= bool(min(x1, x2) <= x <= max(x1, x2) and min(y1, y2) <= y <= max(y1, y2))
        hits.append(hit)
    return hits, levels


sizes = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 20), st.integers(1, 20))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), size=sizes, pools=st.tuples(st.sampled_from([1, 3, 9]), st.sampled_from([1, 3, 7])))
def test_segmentation_equals_the_literal_protocol(seed, size, pools):
    maps = torch.rand(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ours = segment(maps, ProtocolSettings(*pools))
    masks, levels, scores = literal_segmentation(maps.numpy(), *pools, 0.4)
    assert torch.equal(ours.level_masks, torch.from_numpy(masks))
    assert ours.levels.tolist() == levels.tolist()
    torch.testing.assert_close(ours.scores, torch.from_numpy(scores))
    for prompt, level in enumerate(levels):
        assert torch.equal(ours.masks[prompt], ours.level_masks[level, prompt])
        assert ours.relevancy[prompt].max() == ours.scores[level, prompt]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), size=sizes, pool=st.sampled_from([1, 3, 9]))
def test_localization_equals_the_literal_protocol(seed, size, pool):
    generator = torch.Generator().manual_seed(seed)
    maps = torch.rand(size, generator=generator, dtype=torch.float64)
    extent = torch.tensor([size[3], size[2]] * 2)
    boxes = [
        (torch.rand(prompt, 4, generator=generator, dtype=torch.float64) * extent).float() for prompt in range(size[1])
    ]
    ours = localize(maps, boxes, ProtocolSettings(pool))
    hits, levels = literal_localization(maps.numpy(), [b.numpy() for b in boxes], pool)
    assert ours.hits.tolist() == hits
    assert ours.levels.tolist() == levels


def test_the_protocols_own_pools_equal_the_literal_protocol():
    maps = torch.rand(2, 1, 40, 50, dtype=torch.float64)
    maps[1, 0, 5:20, 10:30] += 1
    ours = segment(maps, ProtocolSettings())
    masks, levels, _ = literal_segmentation(maps.numpy(), 29, 7, 0.4)
    assert levels == [1]
    assert ours.masks.any()
    assert torch.equal(ours.level_masks, torch.from_numpy(masks))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), with_companion=st.booleans())
def test_3d_ovs_equals_the_literal_script(seed, with_companion):
    generator = torch.Generator().manual_seed(seed)
    maps, companion = torch.rand(2, 3, 1, 14, 17, generator=generator, dtype=torch.float64).pow(3)
    protocol = ProtocolSettings(5, 3, mask_threshold=0.25, level_score="mean_in_mask", competing_levels=(1, 2))
    ours = segment(maps, protocol, companions={0: companion[:, 0]} if with_companion else None)
    second = companion[:, 0].numpy() if with_companion else None
    masks, level, scores = literal_mean_rule(maps[:, 0].numpy(), second, 0.25, (1, 2), (5, 3), 3)
    assert torch.equal(ours.level_masks[:, 0], torch.from_numpy(masks))
    assert ours.levels.item() == level
    assert torch.equal(ours.masks[0], torch.from_numpy(masks[level]))
    torch.testing.assert_close(ours.scores[1:, 0], torch.from_numpy(scores[1:]))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_mip_nerf360_ovs_equals_the_literal_script(seed):
    maps = torch.rand(3, 2, 14, 17, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ours = segment(maps, ProtocolSettings(5, 3, level_score="mean_in_mask"))
    for prompt in range(2):
        masks, level, scores = literal_mean_rule(maps[:, prompt].numpy(), None, 0.4, (0, 1, 2), (5, 3), 3)
        assert torch.equal(ours.level_masks[:, prompt], torch.from_numpy(masks))
        assert ours.levels[prompt].item() == level
        torch.testing.assert_close(ours.scores[:, prompt], torch.from_numpy(scores))


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_the_papers_smoothing_is_the_average_alone(seed):
    maps = torch.rand(2, 1, 13, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ours = segment(maps, ProtocolSettings(5, 3, smoothing="paper"))
    averages = np.stack([average(maps[level, 0].numpy(), 5) for level in range(2)])
    expected = np.stack([literal_mask([image], 0.4, 3) for image in averages])
    assert torch.equal(ours.level_masks[:, 0], torch.from_numpy(expected))
    torch.testing.assert_close(ours.scores[:, 0], torch.from_numpy(averages.max(axis=(1, 2))))


def test_a_level_with_an_empty_mask_is_not_chosen_although_the_scripts_would():
    maps = torch.zeros(2, 1, 9, 9, dtype=torch.float64)
    maps[0, 0, 4, 4] = 1.0  # a lone pixel: the majority vote takes it away
    maps[1, 0, 2:7, 2:7] = 0.6
    ours = segment(maps, ProtocolSettings(1, 3, level_score="mean_in_mask"))
    assert not ours.level_masks[0].any()
    assert ours.levels.tolist() == [1]
    nan_of_the_scripts = torch.tensor([0.0, float(ours.scores[1])]) / torch.tensor([0.0, 1.0])
    assert nan_of_the_scripts.argmax() == 0


def test_where_all_masks_are_empty_a_competing_level_answers():
    maps = torch.zeros(3, 1, 9, 9)
    maps[:, 0, 4, 4] = torch.tensor([0.9, 0.5, 0.6])
    ours = segment(maps, ProtocolSettings(1, 3, level_score="mean_in_mask", competing_levels=(1, 2)))
    assert ours.levels.tolist() == [1]
    assert not ours.masks.any()


def test_levels_that_do_not_compete_do_not_answer():
    maps = torch.rand(3, 2, 9, 9, generator=torch.Generator().manual_seed(0))
    maps[0] += 1
    assert segment(maps, ProtocolSettings(3, 3)).levels.tolist() == [0, 0]
    assert set(segment(maps, ProtocolSettings(3, 3, competing_levels=(1, 2))).levels.tolist()) <= {1, 2}
    with pytest.raises(ValueError, match=r"competing_levels is \[1, 3\], but there are 3 levels"):
        segment(maps, ProtocolSettings(3, 3, competing_levels=(1, 3)))


def test_no_prompt_gives_no_mask_and_no_point():
    maps = torch.rand(3, 0, 5, 6)
    assert segment(maps, ProtocolSettings()).masks.shape == (0, 5, 6)
    assert localize(maps, [], ProtocolSettings()).peaks.shape == (0, 2)


def test_a_threshold_of_forty_percent_is_seventy_of_the_way_from_least_to_most_relevant():
    maps = torch.linspace(0.2, 0.6, 101)[None, None, None]
    mask = segment(maps, ProtocolSettings(1, 1)).masks[0, 0]
    assert mask[71:].all()
    assert not mask[:70].any()


def test_segmentation_does_not_depend_on_scale_and_offset_of_the_relevancy():
    maps = torch.rand(2, 3, 20, 30, dtype=torch.float64)
    settings = ProtocolSettings(5, 3)
    assert torch.equal(segment(3 * maps - 7, settings).level_masks, segment(maps, settings).level_masks)


def test_a_tie_of_the_majority_is_no_majority():
    masks = torch.zeros(1, 4, 5, dtype=torch.bool)
    masks[0, :, :2] = True
    # At column 1 and the top border, 2 x 3 pixels are inside the window, of which 4 are set; at column 2, 2 of 6.
    assert majority(masks, 3)[0, 0].tolist() == [True, True, False, False, False]
    half = torch.tensor([[[True, False]]])
    assert not majority(half, 3).any()


@pytest.mark.parametrize("side", [1, 3, 7, 29, 41])
def test_a_constant_map_is_its_own_average_to_the_border(side):
    maps = torch.full((2, 17, 23), 0.7)
    torch.testing.assert_close(box_average(maps, side), maps, rtol=1e-6, atol=0)


@pytest.mark.parametrize("side", [1, 3, 9, 29])
def test_averages_equal_torchs_pooling(side):
    maps = torch.rand(2, 3, 33, 41)
    pooled = torch.nn.functional.avg_pool2d(maps, side, 1, side // 2, count_include_pad=False)
    torch.testing.assert_close(box_average(maps, side), pooled)


def test_the_border_of_a_box_counts_and_its_corners_may_be_in_any_order():
    maps = torch.zeros(1, 3, 10, 10)
    maps[0, :, 4, 6] = 1
    boxes = [torch.tensor([[6.0, 4, 9, 9]]), torch.tensor([[9.0, 9, 6, 4]]), torch.tensor([[6.1, 4, 9, 9]])]
    found = localize(maps, boxes, ProtocolSettings(1))
    assert found.hits.tolist() == [True, True, False]
    assert found.peaks.tolist() == [[6, 4]] * 3


def test_one_of_several_equal_peaks_in_a_box_is_enough():
    maps = torch.zeros(1, 1, 10, 10)
    maps[0, 0, [1, 8], [1, 8]] = 1
    found = localize(maps, [torch.tensor([[7.0, 7, 9, 9]])], ProtocolSettings(1))
    assert found.hits.item()
    assert found.peaks.tolist() == [[1, 1]]


def test_segmentation_smooths_with_half_the_map_and_localization_with_the_average_alone():
    # A single spike beats a broad bump in the map, not in its average: so the two choose different levels.
    spike, bump = torch.zeros(20, 20), torch.zeros(20, 20)
    spike[10, 10] = 1
    bump[5:16, 5:16] = 0.45
    maps = torch.stack([spike, bump])[:, None]
    settings = ProtocolSettings(9)
    assert segment(maps, settings).levels.tolist() == [0]
    assert localize(maps, [torch.zeros(0, 4)], settings).levels.tolist() == [1]


@pytest.mark.parametrize(
    ("width", "pools"), [(988, (29, 7)), (320, (9, 3)), (640, (19, 5)), (160, (5, 3)), (1976, (59, 15))]
)
def test_relative_pools_are_the_protocols_share_of_the_width(width, pools):
    assert ProtocolSettings(pool_scaling="relative").pools(width) == pools
    assert ProtocolSettings().pools(width) == (29, 7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"relevancy_pool": 28}, "relevancy_pool must be odd .* got 28"),
        ({"mask_pool": 0}, "mask_pool must be odd .* got 0"),
        ({"mask_threshold": 1.0}, "mask_threshold .* got 1.0"),
        ({"competing_levels": ()}, r"competing_levels is \[\]"),
        ({"competing_levels": (1, 1)}, r"competing_levels is \[1, 1\]"),
    ],
)
def test_bad_settings_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        ProtocolSettings(**change)


def test_not_a_number_is_refused_instead_of_winning_the_level_choice():
    maps = torch.rand(2, 1, 6, 6)
    maps[1, 0, 2, 2] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        segment(maps, ProtocolSettings(3, 3))
    with pytest.raises(ValueError, match="NaN"):
        localize(maps, [torch.zeros(0, 4)], ProtocolSettings(3, 3))


def test_boxes_for_another_number_of_prompts_are_refused():
    with pytest.raises(ValueError, match="2 prompts but boxes for 1"):
        localize(torch.rand(1, 2, 5, 5), [torch.zeros(1, 4)], ProtocolSettings(3))


def test_intersection_over_union_of_known_masks():
    a = torch.tensor([[[1, 1, 0, 0]], [[0, 0, 0, 0]], [[1, 1, 1, 1]]], dtype=torch.bool)
    b = torch.tensor([[[0, 1, 1, 0]], [[0, 0, 0, 0]], [[1, 1, 1, 1]]], dtype=torch.bool)
    torch.testing.assert_close(intersection_over_union(a, b), torch.tensor([1 / 3, 0, 1]))


def test_the_best_level_is_the_one_closest_to_the_label():
    level_masks = torch.rand(3, 4, 8, 9) > 0.5
    targets = level_masks[[2, 0, 1, 1], range(4)]
    assert torch.equal(best_level_masks(level_masks, targets), targets)
