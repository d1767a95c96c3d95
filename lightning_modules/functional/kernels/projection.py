"""Warp kernels that project Gaussians into a camera and list the tiles they touch."""

import typing

import warp as wp

wp.set_module_options({"enable_backward": False})

Projected = wp.types.vector(length=8, dtype=wp.float32)


@typing.no_type_check
@wp.func
def span(centre: float, radius: float, half: float, tiles: int) -> wp.vec2i:
    """Returns the first tile, and the one after the last, along one axis.

    The square of 3 sigma (``radius``) decides by whole tiles, as in 3D Gaussian Splatting; the box of alpha >= 1/255
    (``half``) only drops tiles on which nothing would be drawn.
    """
    first = wp.max(wp.floor((centre - radius) / 16.0), wp.floor((centre - half) / 16.0))
    last = wp.min(wp.floor((centre + radius + 15.0) / 16.0), wp.floor((centre + half) / 16.0) + 1.0)
    return wp.vec2i(int(wp.clamp(first, 0.0, float(tiles))), int(wp.clamp(last, 0.0, float(tiles))))


@typing.no_type_check
@wp.kernel
def project(
    start: int,
    means: wp.array(dtype=wp.vec3),
    log_scales: wp.array(dtype=wp.vec3),
    quaternions: wp.array(dtype=wp.vec4),
    opacity_logits: wp.array(dtype=float),
    camera_from_world: wp.array2d(dtype=float),
    fx: float,
    fy: float,
    cx: float,
    cy: float,
    width: int,
    height: int,
    projected: wp.array(dtype=Projected),
    boxes: wp.array(dtype=wp.vec4i),
):
    """Projects Gaussian n; its box of tiles is empty where it cannot be seen."""
    n = start + wp.tid()
    boxes[n] = wp.vec4i(0, 0, 0, 0)
    m = camera_from_world
    rotation = wp.mat33(m[0, 0], m[0, 1], m[0, 2], m[1, 0], m[1, 1], m[1, 2], m[2, 0], m[2, 1], m[2, 2])
    p = rotation * means[n] + wp.vec3(m[0, 3], m[1, 3], m[2, 3])
    z = p[2]
    opacity = 1.0 / (1.0 + wp.exp(-opacity_logits[n]))
    if not (z > 0.2 and opacity >= 1.0 / 255.0):
        return
    q = wp.normalize(quaternions[n])
    axes = wp.quat_to_matrix(wp.quat(q[1], q[2], q[3], q[0]))
    s = log_scales[n]
    spread = rotation * axes * wp.diag(wp.vec3(wp.exp(s[0]), wp.exp(s[1]), wp.exp(s[2])))
    # 1.3 tan(fov / 2) on both sides where the principal point is central: 0.15 image widths beyond the border.
    slope_x = wp.clamp(p[0] / z, (-0.15 * float(width) - cx) / fx, (1.15 * float(width) - cx) / fx)
    slope_y = wp.clamp(p[1] / z, (-0.15 * float(height) - cy) / fy, (1.15 * float(height) - cy) / fy)
    to_x = wp.transpose(spread) * wp.vec3(fx / z, 0.0, -fx * slope_x / z)
    to_y = wp.transpose(spread) * wp.vec3(0.0, fy / z, -fy * slope_y / z)
    a = wp.dot(to_x, to_x) + 0.3
    b = wp.dot(to_x, to_y)
    c = wp.dot(to_y, to_y) + 0.3
    determinant = a * c - b * b
    if not (determinant > 0.0):
        return
    middle = 0.5 * (a + c)
    radius = wp.ceil(3.0 * wp.sqrt(middle + wp.sqrt(wp.max(0.1, middle * middle - determinant))))
    x = fx * p[0] / z + cx - 0.5
    y = fy * p[1] / z + cy - 0.5
    # alpha >= 1/255 where power >= -reach; a little more, so that rounding loses no pixel.
    reach = wp.log(opacity * 255.0) * 1.0001 + 0.0001
    across = span(x, radius, wp.sqrt(2.0 * reach * a) + 0.01, (width + 15) // 16)
    down = span(y, radius, wp.sqrt(2.0 * reach * c) + 0.01, (height + 15) // 16)
    if across[1] > across[0] and down[1] > down[0]:
        boxes[n] = wp.vec4i(across[0], across[1], down[0], down[1])
        projected[n] = Projected(x, y, c / determinant, -b / determinant, a / determinant, opacity, z, -reach)


@typing.no_type_check
@wp.kernel
def list_tiles(
    start: int,
    boxes: wp.array(dtype=wp.vec4i),
    offsets: wp.array(dtype=wp.int64),
    tiles_x: int,
    tiles: wp.array(dtype=wp.int32),
    rows: wp.array(dtype=wp.int32),
):
    """Writes the tiles of one Gaussian's box."""
    v = start + wp.tid()
    box = boxes[v]
    i = offsets[v]
    for tile_y in range(box[2], box[3]):
        for tile_x in range(box[0], box[1]):
            tiles[i] = tile_y * tiles_x + tile_x
            rows[i] = v
            i += wp.int64(1)
