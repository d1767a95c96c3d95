"""Warp kernel that cuts masks out of a photograph and resizes them."""

import typing

import warp as wp

wp.set_module_options({"enable_backward": False})


@typing.no_type_check
@wp.func
def masked_color(
    photo: wp.array3d(dtype=wp.uint8), masks: wp.array3d(dtype=wp.uint8), mask: int, row: int, column: int
) -> wp.vec3i:
    """Returns the colour of a pixel, black off the mask. A tile's padding reaches past the photograph."""
    if row < 0 or row >= photo.shape[0] or column < 0 or column >= photo.shape[1]:
        return wp.vec3i(0, 0, 0)
    if masks[mask, row, column] == wp.uint8(0):
        return wp.vec3i(0, 0, 0)
    return wp.vec3i(int(photo[row, column, 0]), int(photo[row, column, 1]), int(photo[row, column, 2]))


@typing.no_type_check
@wp.kernel
def cut_tiles(
    start: int,
    photo: wp.array3d(dtype=wp.uint8),
    masks: wp.array3d(dtype=wp.uint8),
    rows: wp.array3d(dtype=int),
    columns: wp.array3d(dtype=int),
    size: int,
    tiles: wp.array4d(dtype=wp.uint8),
):
    """Fills one row of one tile by OpenCV's 8-bit bilinear interpolation: weights of 11 bits, columns before rows."""
    thread = start + wp.tid()
    tile = thread // size
    y = thread - tile * size
    top = rows[tile, y, 0]
    bottom = rows[tile, y, 1]
    for x in range(size):
        left = columns[tile, x, 0]
        right = columns[tile, x, 1]
        weight_left = columns[tile, x, 2]
        weight_right = columns[tile, x, 3]
        upper = weight_left * masked_color(photo, masks, tile, top, left) + weight_right * masked_color(
            photo, masks, tile, top, right
        )
        lower = weight_left * masked_color(photo, masks, tile, bottom, left) + weight_right * masked_color(
            photo, masks, tile, bottom, right
        )
        for channel in range(3):
            value = (rows[tile, y, 2] * (upper[channel] >> 4)) >> 16
            value = value + ((rows[tile, y, 3] * (lower[channel] >> 4)) >> 16)
            tiles[tile, channel, y, x] = wp.uint8((value + 2) >> 2)
