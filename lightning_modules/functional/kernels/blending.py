"""Warp kernels that blend the Gaussians of a pixel's tile, front to back (3D Gaussian Splatting, section 6)."""

import typing

import warp as wp

wp.set_module_options({"enable_backward": False})

MAX_ALPHA = wp.constant(0.99)
MIN_ALPHA = wp.constant(1.0 / 255.0)
MIN_TRANSMITTANCE = wp.constant(1.0e-4)


@wp.func
@typing.no_type_check
def alpha_at(projected: wp.array2d(dtype=wp.float32), row: int, x: float, y: float) -> float:
    dx = projected[row, 0] - x
    dy = projected[row, 1] - y
    power = -0.5 * (projected[row, 2] * dx * dx + projected[row, 4] * dy * dy) - projected[row, 3] * dx * dy
    if power > 0.0 or power < projected[row, 7]:
        return 0.0
    alpha = wp.min(MAX_ALPHA, projected[row, 5] * wp.exp(power))
    if alpha < MIN_ALPHA:
        return 0.0
    return alpha


@wp.kernel
@typing.no_type_check
def blend_weights(
    start: int,
    pixel_ids: wp.array(dtype=wp.int64),
    width: int,
    tiles_x: int,
    projected: wp.array2d(dtype=wp.float32),
    row_gaussians: wp.array(dtype=wp.int32),
    tile_offsets: wp.array(dtype=wp.int32),
    tile_rows: wp.array(dtype=wp.int32),
    is_counting: wp.bool,
    counts: wp.array(dtype=wp.int32),
    offsets: wp.array(dtype=wp.int64),
    gaussian_ids: wp.array(dtype=wp.int32),
    weights: wp.array(dtype=wp.float32),
):
    p = start + wp.tid()
    pixel = int(pixel_ids[p])
    px = pixel % width
    py = pixel // width
    tile = (py // 16) * tiles_x + px // 16
    x = float(px)
    y = float(py)
    transmittance = float(1.0)
    count = int(0)
    cursor = wp.int64(0)
    if not is_counting:
        cursor = offsets[p]
    for i in range(tile_offsets[tile], tile_offsets[tile + 1]):
        row = tile_rows[i]
        alpha = alpha_at(projected, row, x, y)
        if alpha > 0.0:
            remaining = transmittance * (1.0 - alpha)
            if remaining < MIN_TRANSMITTANCE:
                break
            if is_counting:
                count += 1
            else:
                gaussian_ids[cursor] = row_gaussians[row]
                weights[cursor] = alpha * transmittance
                cursor += wp.int64(1)
            transmittance = remaining
    if is_counting:
        counts[p] = count


@wp.kernel
@typing.no_type_check
def blend_colors(
    start: int,
    pixel_ids: wp.array(dtype=wp.int64),
    width: int,
    tiles_x: int,
    projected: wp.array2d(dtype=wp.float32),
    tile_offsets: wp.array(dtype=wp.int32),
    tile_rows: wp.array(dtype=wp.int32),
    colors: wp.array(dtype=wp.vec3),
    background: wp.array(dtype=wp.vec3),
    rgb: wp.array(dtype=wp.vec3),
    depths: wp.array(dtype=wp.float32),
    alphas: wp.array(dtype=wp.float32),
):
    p = start + wp.tid()
    pixel = int(pixel_ids[p])
    px = pixel % width
    py = pixel // width
    tile = (py // 16) * tiles_x + px // 16
    x = float(px)
    y = float(py)
    transmittance = float(1.0)
    color = wp.vec3(0.0, 0.0, 0.0)
    depth = float(0.0)
    total = float(0.0)
    for i in range(tile_offsets[tile], tile_offsets[tile + 1]):
        row = tile_rows[i]
        alpha = alpha_at(projected, row, x, y)
        if alpha > 0.0:
            remaining = transmittance * (1.0 - alpha)
            if remaining < MIN_TRANSMITTANCE:
                break
            weight = alpha * transmittance
            color += weight * colors[row]
            depth += weight * projected[row, 6]
            total += weight
            transmittance = remaining
    rgb[p] = color + transmittance * background[0]
    if total > 0.0:
        depth = depth / total
    depths[p] = depth
    alphas[p] = total


@wp.kernel
@typing.no_type_check
def blend_codes(
    start: int,
    pixel_ids: wp.array(dtype=wp.int64),
    width: int,
    tiles_x: int,
    projected: wp.array2d(dtype=wp.float32),
    row_gaussians: wp.array(dtype=wp.int32),
    tile_offsets: wp.array(dtype=wp.int32),
    tile_rows: wp.array(dtype=wp.int32),
    channel_ids: wp.array2d(dtype=wp.int16),
    values: wp.array2d(dtype=wp.float32),
    out: wp.array2d(dtype=wp.float32),
    alphas: wp.array(dtype=wp.float32),
):
    p = start + wp.tid()
    pixel = int(pixel_ids[p])
    px = pixel % width
    py = pixel // width
    tile = (py // 16) * tiles_x + px // 16
    x = float(px)
    y = float(py)
    transmittance = float(1.0)
    total = float(0.0)
    for i in range(tile_offsets[tile], tile_offsets[tile + 1]):
        row = tile_rows[i]
        alpha = alpha_at(projected, row, x, y)
        if alpha > 0.0:
            remaining = transmittance * (1.0 - alpha)
            if remaining < MIN_TRANSMITTANCE:
                break
            weight = alpha * transmittance
            g = row_gaussians[row]
            for a in range(values.shape[1]):
                channel = int(channel_ids[g, a])
                out[p, channel] = out[p, channel] + weight * values[g, a]
            total += weight
            transmittance = remaining
    alphas[p] = total
