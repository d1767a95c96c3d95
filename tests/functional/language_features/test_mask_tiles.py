import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_modules.functional.language_features.mask_tiles import mask_boxes, mask_map, mask_tiles


def axis_of_opencv(length: int, size: int, *, is_column: bool) -> tuple[np.ndarray, ...]:
    """The source indices and 11-bit weights of OpenCV's bilinear interpolation of bytes."""
    position = ((np.arange(size) + 0.5) * (length / size) - 0.5).astype(np.float32)
    low = np.floor(position).astype(int)
    fraction = position - low.astype(np.float32)
    if is_column:
        fraction[(low < 0) | (low >= length - 1)] = 0
    weights = (np.rint(part * np.float32(2048)).astype(int) for part in (1 - fraction, fraction))
    return low.clip(0, length - 1), (low + 1).clip(0, length - 1), *weights


def resized_as_opencv(picture: np.ndarray, size: int) -> np.ndarray:
    left, right, left_weight, right_weight = axis_of_opencv(picture.shape[1], size, is_column=True)
    picture = picture.astype(int)
    columns = picture[:, left] * left_weight[:, None] + picture[:, right] * right_weight[:, None]
    top, bottom, top_weight, bottom_weight = (
        x[:, None, None] for x in axis_of_opencv(len(picture), size, is_column=False)
    )
    upper, lower = columns[top[:, 0, 0]], columns[bottom[:, 0, 0]]
    value = (top_weight * (upper >> 4) >> 16) + (bottom_weight * (lower >> 4) >> 16)
    return ((value + 2) >> 2).astype(np.uint8)


def padded_crop(photo: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """One mask at a time, as LangSplat's preprocessing describes its tiles, but with the complete box."""
    rows, columns = mask.any(axis=1).nonzero()[0], mask.any(axis=0).nonzero()[0]
    crop = (photo * mask[..., None])[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    height, width = crop.shape[:2]
    side = max(height, width)
    square = np.zeros((side, side, 3), np.uint8)
    top, left = (side - height) // 2, (side - width) // 2
    square[top : top + height, left : left + width] = crop
    return square


def photo_and_masks(seed: int, height: int, width: int, num_masks: int = 3) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    masks = np.zeros((num_masks, height, width), bool)
    for mask in masks:
        y1, y2 = np.sort(rng.choice(height + 1, 2, replace=False))
        x1, x2 = np.sort(rng.choice(width + 1, 2, replace=False))
        mask[y1:y2, x1:x2] = rng.random((y2 - y1, x2 - x1)) < rng.choice([0.3, 1.0])
        mask[y1, x1] = True
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8), masks


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 90), st.integers(1, 90), st.sampled_from([1, 7, 32]))
def test_tiles_equal_opencvs_to_the_bit(seed: int, height: int, width: int, size: int) -> None:
    photo, masks = photo_and_masks(seed, height, width)
    tiles = mask_tiles(torch.from_numpy(photo), torch.from_numpy(masks), size)
    expected = np.stack([resized_as_opencv(padded_crop(photo, mask), size) for mask in masks])
    np.testing.assert_array_equal(tiles.permute(0, 2, 3, 1).numpy(), expected)


@pytest.mark.parametrize("side", [1, 2, 50, 223, 225, 448, 449, 700])
def test_the_twin_equals_opencv_where_it_is_installed(side: int) -> None:
    cv2 = pytest.importorskip("cv2")
    picture = np.random.default_rng(side).integers(0, 256, (side, side, 3), dtype=np.uint8)
    np.testing.assert_array_equal(resized_as_opencv(picture, 224), cv2.resize(picture, (224, 224)))


def test_tiles_are_centred_squares_on_black_without_the_neighbours() -> None:
    photo = torch.full((10, 12, 3), 200, dtype=torch.uint8)
    photo[4:6, 2:8] = torch.tensor([255, 0, 0], dtype=torch.uint8)
    masks = torch.zeros(3, 10, 12, dtype=torch.bool)
    masks[0, 4:6, 2:8] = True
    masks[1, 9, 11] = True  # one pixel in the corner
    tiles = mask_tiles(photo, masks, 6)
    expected = torch.zeros(3, 6, 6, dtype=torch.uint8)
    expected[0, 2:4] = 255
    assert torch.equal(tiles[0], expected)
    assert (tiles[1] == 200).all()
    assert (tiles[2] == 0).all()  # of the empty mask
    assert mask_tiles(photo, masks[:0], 6).shape == (0, 3, 6, 6)


def test_photos_and_masks_need_not_be_contiguous() -> None:
    photo, masks = photo_and_masks(3, 20, 30)
    expected = mask_tiles(torch.from_numpy(photo), torch.from_numpy(masks), 16)
    turned = torch.from_numpy(photo.transpose(1, 0, 2).copy()).transpose(0, 1)
    other = torch.from_numpy(masks.transpose(0, 2, 1).copy()).transpose(1, 2)
    assert torch.equal(mask_tiles(turned, other, 16), expected)
    assert torch.equal(mask_boxes(other), mask_boxes(torch.from_numpy(masks)))


def test_boxes_are_complete() -> None:
    masks = torch.zeros(3, 5, 7, dtype=torch.bool)
    masks[0, 1:4, 2:7] = True
    masks[1, 4, 0] = True
    assert mask_boxes(masks).tolist() == [[2, 1, 7, 4], [0, 4, 1, 5], [0, 0, 0, 0]]


def test_later_masks_cover_earlier_ones_in_the_map() -> None:
    masks = torch.tensor([[[1, 1, 1, 0]], [[0, 1, 0, 0]]]).bool()
    assert mask_map(masks).tolist() == [[0, 1, 0, -1]]
    assert mask_map(masks[:0]).tolist() == [[-1] * 4]
