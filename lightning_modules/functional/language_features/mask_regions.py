"""Small holes and islands of masks."""

import numpy as np
from jaxtyping import Bool
from scipy import ndimage

_DIAGONALS_TOUCH = np.ones((3, 3), dtype=bool)


def remove_small_regions(
    mask: Bool[np.ndarray, "height width"], min_area: int
) -> tuple[Bool[np.ndarray, "height width"], bool]:
    """Fills holes, then removes islands, of fewer pixels than ``min_area``; the largest island stays in any case.

    The decisions of Segment Anything's ``remove_small_regions``, without OpenCV and within the mask's bounding box.
    Among islands of equal size that are all too small, the first by rows stays.

    Returns:
        A new mask, and whether there was any small hole or island (a single small island counts, though it stays).
    """
    height, width = mask.shape
    rows, columns = (mask.any(axis=axis).nonzero()[0] for axis in (1, 0))
    if len(rows) == 0:
        return mask.copy(), False
    # One pixel more on each side joins the holes that open to it; a strip that is itself too small is looked at whole.
    top, bottom = _widened(rows, height, -(-min_area // width))
    left, right = _widened(columns, width, -(-min_area // (bottom - top)))
    window = mask[top:bottom, left:right].copy()

    holes, num_holes = ndimage.label(~window, _DIAGONALS_TOUCH)
    areas = np.bincount(holes.ravel(), minlength=num_holes + 1)
    if top > 0 or left > 0:
        areas[holes[0, 0]] += min_area
    if bottom < height:
        areas[holes[-1, 0]] += min_area
    if right < width:
        areas[holes[0, -1]] += min_area
    is_small = areas < min_area
    is_small[0] = False
    had_any = bool(is_small.any())
    window |= is_small[holes]

    islands, num_islands = ndimage.label(window, _DIAGONALS_TOUCH)
    areas = np.bincount(islands.ravel(), minlength=num_islands + 1)
    stays = areas >= min_area
    stays[0] = False
    had_any |= not stays[1:].all()
    if not stays.any():
        stays[1 + areas[1:].argmax()] = True
    window &= stays[islands]

    cleaned = np.zeros_like(mask)
    cleaned[top:bottom, left:right] = window
    return cleaned, had_any


def _widened(occupied: np.ndarray, length: int, min_strip: int) -> tuple[int, int]:
    """Returns the range of the occupied places and one more on each side, or all where less than a strip is left."""
    first, last = int(occupied[0]) - 1, int(occupied[-1]) + 2
    return first if first >= min_strip else 0, last if length - last >= min_strip else length
