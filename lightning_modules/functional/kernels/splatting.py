"""Warp kernels that multiply stored blending weights with what Gaussians carry, and the transposed products."""

import typing

import warp as wp

wp.set_module_options({"enable_backward": False})


@wp.kernel
@typing.no_type_check
def splat_codes(
    start: int,
    offsets: wp.array(dtype=wp.int64),
    gaussian_ids: wp.array(dtype=wp.int32),
    weights: wp.array(dtype=wp.float32),
    channel_ids: wp.array2d(dtype=wp.int16),
    values: wp.array2d(dtype=wp.float32),
    out: wp.array2d(dtype=wp.float32),
):
    p = start + wp.tid()
    i = offsets[p]
    while i < offsets[p + 1]:
        g = gaussian_ids[i]
        weight = weights[i]
        for a in range(values.shape[1]):
            channel = int(channel_ids[g, a])
            out[p, channel] = out[p, channel] + weight * values[g, a]
        i += wp.int64(1)


@wp.kernel
@typing.no_type_check
def gather_codes(
    start: int,
    offsets: wp.array(dtype=wp.int64),
    pixel_rows: wp.array(dtype=wp.int32),
    weights: wp.array(dtype=wp.float32),
    channel_ids: wp.array2d(dtype=wp.int16),
    maps: wp.array2d(dtype=wp.float32),
    out: wp.array2d(dtype=wp.float32),
):
    g = start + wp.tid()
    for a in range(out.shape[1]):
        channel = int(channel_ids[g, a])
        total = float(0.0)
        i = offsets[g]
        while i < offsets[g + 1]:
            total += weights[i] * maps[pixel_rows[i], channel]
            i += wp.int64(1)
        out[g, a] = total
