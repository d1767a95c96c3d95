import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_modules.functional.language_features import mask_nms
from lightning_modules.functional.language_features.mask_nms import mask_intersections, suppress_masks


def literal_loop(masks: Tensor, scores: Tensor, iou: float, score: float, inner: float) -> list[int]:
    """LangSplat's decisions pair by pair, with its two triangles; empty where its fallback raises IndexError."""
    order = scores.sort(descending=True, stable=True).indices.tolist()
    areas = [masks[i].sum().float() for i in order]
    overlap = torch.zeros(len(order), len(order))
    containment = torch.zeros(len(order), len(order))
    for i, first in enumerate(order):
        for j in range(i, len(order)):
            shared = (masks[first] & masks[order[j]]).sum().float()
            overlap[i, j] = shared / (masks[first] | masks[order[j]]).sum().float()
            part_i, part_j = shared / areas[i], shared / areas[j]
            if part_i < 0.5 and part_j >= 0.85:
                containment[i, j] = 1 - part_j * part_i
            if part_i >= 0.85 and part_j < 0.5:
                containment[j, i] = 1 - part_j * part_i
    keep = overlap.triu(diagonal=1).amax(dim=0) <= iou
    keep &= scores[order] > score
    keep &= containment.triu(diagonal=1).amax(dim=0) <= 1 - inner
    keep &= containment.tril(diagonal=1).amax(dim=0) <= 1 - inner
    return sorted(i for i, kept in zip(order, keep.tolist(), strict=True) if kept)


def overlapping_masks(seed: int, num_masks: int, height: int, width: int) -> Tensor:
    """Rectangles, parts of earlier masks and near copies of them, none empty."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((num_masks, height, width), bool)
    for index in range(num_masks):
        y1, y2 = np.sort(rng.choice(height + 1, 2, replace=False))
        x1, x2 = np.sort(rng.choice(width + 1, 2, replace=False))
        masks[index, y1:y2, x1:x2] = True
        if index and rng.random() < 0.6:
            earlier = masks[rng.integers(index)]
            masks[index] = [masks[index] & earlier, masks[index] | earlier, earlier][rng.integers(3)]
            masks[index] ^= rng.random((height, width)) < rng.choice([0, 0.02, 0.1])
        masks[index, rng.integers(height), rng.integers(width)] |= not masks[index].any()
    return torch.from_numpy(masks)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.tuples(st.integers(1, 14), st.integers(1, 24), st.integers(1, 24)),
    choices=st.lists(st.sampled_from([0.3, 0.69999999, 0.7, 0.75, 0.9]), min_size=14, max_size=14),
    thresholds=st.sampled_from([(0.8, 0.7, 0.5), (0.8, 0.2, 0.5), (0.5, 0.2, 0.3), (0.9, 0.2, 0.2), (1.0, 0.2, 0.0)]),
)
def test_decisions_are_those_of_the_loop_over_pairs(seed: int, size, choices: list[float], thresholds) -> None:
    iou, score, inner = thresholds
    masks, scores = overlapping_masks(seed, *size), torch.tensor(choices[: size[0]])
    kept = suppress_masks(masks, scores, iou=iou, score=score, inner=inner)
    expected = literal_loop(masks, scores, iou, score, inner)
    if not expected:
        expected = sorted(scores.sort(descending=True, stable=True).indices[:3].tolist())
    assert kept.tolist() == expected


def squares(*sides: int) -> Tensor:
    masks = torch.zeros(len(sides), 20, 20, dtype=torch.bool)
    for mask, side in zip(masks, sides, strict=True):
        mask[:side, :side] = True
    return masks


def test_a_mask_inside_one_of_more_than_twice_its_size_goes_whatever_the_scores() -> None:
    assert suppress_masks(squares(20, 10), torch.tensor([0.75, 0.99])).tolist() == [0]
    assert suppress_masks(squares(20, 15), torch.tensor([0.75, 0.99])).tolist() == [0, 1]  # 225 of 400 pixels


def test_a_suppressed_mask_suppresses_others() -> None:
    assert suppress_masks(squares(20, 13, 8), torch.tensor([0.9, 0.9, 0.9])).tolist() == [0]
    low = suppress_masks(squares(13, 12), torch.tensor([0.6, 0.9]))  # below the threshold, yet it contains
    assert low.tolist() == [1]
    assert suppress_masks(squares(20, 8), torch.tensor([0.6, 0.9])).tolist() == [0, 1]  # nothing survives: the best


def test_of_equal_masks_the_better_stays_and_of_equal_scores_the_earlier() -> None:
    assert suppress_masks(squares(9, 9, 9), torch.tensor([0.8, 0.9, 0.8])).tolist() == [1]
    assert suppress_masks(squares(9, 9, 9), torch.tensor([0.8, 0.8, 0.8])).tolist() == [0]


def test_when_nothing_survives_the_three_best_stay_and_empty_masks_never_do() -> None:
    masks, scores = squares(9, 7, 0, 8, 6), torch.tensor([0.2, 0.5, 0.6, 0.4, 0.3])
    assert suppress_masks(masks, scores).tolist() == [1, 3, 4]
    assert suppress_masks(squares(0, 5), torch.tensor([0.9, 0.3])).tolist() == [1]
    assert suppress_masks(squares(0, 0), torch.tensor([0.9, 0.9])).tolist() == []
    assert suppress_masks(squares(), torch.zeros(0)).tolist() == []


@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_intersections_are_exact_across_blocks_and_at_reduced_precision(
    monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    masks = overlapping_masks(5, 7, 61, 83)
    masks[0] = True  # a run longer than any whole number that bfloat16 holds exactly
    flat = masks.flatten(1).long()
    monkeypatch.setattr(mask_nms, "_BLOCK_ELEMENTS", 7 * 512)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        assert torch.equal(mask_intersections(masks), flat @ flat.T)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(mask_intersections(masks), flat @ flat.T)
    finally:
        torch.set_float32_matmul_precision(before)
