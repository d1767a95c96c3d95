import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.measure import label

from lightning_modules.functional.language_features.mask_regions import remove_small_regions


def looked_at_whole(mask: np.ndarray, min_area: int) -> tuple[np.ndarray, bool]:
    """Holes, then islands, of the whole picture, one region after the other."""
    mask, had_any = mask.copy(), False
    holes = label(~mask, connectivity=2)
    for region in range(1, holes.max() + 1):
        if (holes == region).sum() < min_area:
            mask[holes == region] = had_any = True
    islands = label(mask, connectivity=2)
    areas = [(islands == region).sum() for region in range(1, islands.max() + 1)]
    for region, area in enumerate(areas, start=1):
        had_any |= bool(area < min_area)
        if area < min_area and region != 1 + int(np.argmax(areas)):
            mask[islands == region] = False
    return mask, had_any


def spotted_mask(seed: int, height: int, width: int) -> np.ndarray:
    """A rectangle with holes, touching borders or not, and specks around it."""
    rng = np.random.default_rng(seed)
    mask = np.zeros((height, width), bool)
    y1, y2 = np.sort(rng.choice(height + 1, 2, replace=False))
    x1, x2 = np.sort(rng.choice(width + 1, 2, replace=False))
    mask[y1:y2, x1:x2] = rng.random((y2 - y1, x2 - x1)) < rng.choice([0.5, 0.7, 0.9])
    return mask ^ (rng.random((height, width)) < rng.choice([0, 0.02]))


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 5, 20, 100]))
def test_looking_within_the_box_decides_like_looking_at_the_whole(
    seed: int, height: int, width: int, min_area: int
) -> None:
    mask = spotted_mask(seed, height, width)
    before = mask.copy()
    cleaned, had_any = remove_small_regions(mask, min_area)
    if before.any():
        expected, expected_any = looked_at_whole(mask, min_area)
        np.testing.assert_array_equal(cleaned, expected)
        assert had_any == expected_any
    else:
        assert not cleaned.any()
    np.testing.assert_array_equal(mask, before)


def test_decisions_are_those_of_segment_anything_where_opencv_is_installed() -> None:
    pytest.importorskip("cv2")
    from segment_anything.utils.amg import remove_small_regions as stock

    num_changed = 0
    for seed in range(60):
        mask = spotted_mask(seed, 50, 70)
        if not mask.any():
            continue
        filled, is_filled = stock(mask, 12, mode="holes")
        expected, is_cut = stock(filled, 12, mode="islands")
        cleaned, had_any = remove_small_regions(mask, 12)
        np.testing.assert_array_equal(cleaned, expected)
        assert had_any == (is_filled or is_cut)
        num_changed += bool((cleaned != mask).any())
    assert num_changed > 20


def test_the_largest_island_stays_though_it_is_small() -> None:
    mask = np.zeros((8, 8), bool)
    mask[0, 0] = mask[5, 4:7] = True
    cleaned, had_any = remove_small_regions(mask, 10)
    assert had_any
    assert cleaned.sum() == 3
    assert cleaned[5, 4:7].all()
