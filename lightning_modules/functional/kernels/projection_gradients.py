"""Warp kernel that carries the gradients of projected Gaussians back to their parameters."""

import typing

import warp as wp

from lightning_modules.functional.kernels.projection import Projected
from lightning_modules.functional.kernels.tile_blending import NUM_SUMS

wp.set_module_options({"enable_backward": False})

Sums = wp.types.vector(length=NUM_SUMS, dtype=wp.float32)


@typing.no_type_check
@wp.func
def rotation_gradient(q: wp.vec4, g: wp.mat33) -> wp.vec4:
    """Returns dL/dq of the unit quaternion q, wxyz, from dL/drotation."""
    w = q[0]
    x = q[1]
    y = q[2]
    z = q[3]
    return 2.0 * wp.vec4(
        x * (g[2, 1] - g[1, 2]) + y * (g[0, 2] - g[2, 0]) + z * (g[1, 0] - g[0, 1]),
        y * (g[0, 1] + g[1, 0]) + z * (g[0, 2] + g[2, 0]) + w * (g[2, 1] - g[1, 2]) - 2.0 * x * (g[1, 1] + g[2, 2]),
        x * (g[0, 1] + g[1, 0]) + z * (g[1, 2] + g[2, 1]) + w * (g[0, 2] - g[2, 0]) - 2.0 * y * (g[0, 0] + g[2, 2]),
        x * (g[0, 2] + g[2, 0]) + y * (g[1, 2] + g[2, 1]) + w * (g[1, 0] - g[0, 1]) - 2.0 * z * (g[0, 0] + g[1, 1]),
    )


@typing.no_type_check
@wp.kernel
def project_gradients(
    start: int,
    visible_rows: wp.array(dtype=wp.int32),
    projected: wp.array(dtype=Projected),
    ends: wp.array(dtype=wp.int64),
    sums: wp.array(dtype=Sums),
    means: wp.array(dtype=wp.vec3),
    log_scales: wp.array(dtype=wp.vec3),
    quaternions: wp.array(dtype=wp.vec4),
    camera_from_world: wp.array2d(dtype=float),
    fx: float,
    fy: float,
    cx: float,
    cy: float,
    width: int,
    height: int,
    grad_means: wp.array(dtype=wp.vec3),
    grad_log_scales: wp.array(dtype=wp.vec3),
    grad_quaternions: wp.array(dtype=wp.vec4),
    grad_opacity_logits: wp.array(dtype=float),
    grad_colors: wp.array(dtype=wp.vec3),
    grad_centres: wp.array(dtype=wp.vec2),
):
    """Adds up what Gaussian n received in its tiles, in the order of the tiles, and differentiates its projection."""
    n = start + wp.tid()
    v = visible_rows[n]
    if v < 0:
        grad_means[n] = wp.vec3()
        grad_log_scales[n] = wp.vec3()
        grad_quaternions[n] = wp.vec4()
        grad_opacity_logits[n] = 0.0
        grad_centres[n] = wp.vec2()
        return
    total = Sums()
    first = int(0)  # noqa: UP018, RUF046 - a literal would be a constant to Warp
    if n > 0:
        first = int(ends[n - 1])
    for k in range(first, int(ends[n])):
        total += sums[k]
    grad_colors[v] = wp.vec3(total[0], total[1], total[2])

    g = projected[v]
    grad_opacity_logits[n] = (1.0 - g[5]) * total[4]
    grad_centre = wp.vec2(-total[5], -total[6])
    grad_centres[n] = grad_centre
    # dL/dcovariance: dL/dconic is -1/2 the sum of dL/dpower offset offset^T, and d(conic) = -conic d(covariance) conic.
    h = 0.5 * wp.mat22(total[7], total[8], total[8], total[9])

    m = camera_from_world
    rotation = wp.mat33(m[0, 0], m[0, 1], m[0, 2], m[1, 0], m[1, 1], m[1, 2], m[2, 0], m[2, 1], m[2, 2])
    p = rotation * means[n] + wp.vec3(m[0, 3], m[1, 3], m[2, 3])
    z = p[2]
    length = wp.length(quaternions[n])
    q = wp.normalize(quaternions[n])  # of length zero: no rotation, and no gradient
    axes = rotation * wp.quat_to_matrix(wp.quat(q[1], q[2], q[3], q[0]))
    s = wp.vec3(wp.exp(log_scales[n][0]), wp.exp(log_scales[n][1]), wp.exp(log_scales[n][2]))
    spread = axes * wp.diag(s)
    low_x = (-0.15 * float(width) - cx) / fx
    high_x = (1.15 * float(width) - cx) / fx
    low_y = (-0.15 * float(height) - cy) / fy
    high_y = (1.15 * float(height) - cy) / fy
    slope_x = wp.clamp(p[0] / z, low_x, high_x)
    slope_y = wp.clamp(p[1] / z, low_y, high_y)
    row_x = wp.vec3(fx / z, 0.0, -fx * slope_x / z)
    row_y = wp.vec3(0.0, fy / z, -fy * slope_y / z)
    to_x = wp.transpose(spread) * row_x
    to_y = wp.transpose(spread) * row_y
    grad_to_x = 2.0 * (h[0, 0] * to_x + h[0, 1] * to_y)
    grad_to_y = 2.0 * (h[1, 1] * to_y + h[0, 1] * to_x)

    grad_spread = wp.outer(row_x, grad_to_x) + wp.outer(row_y, grad_to_y)
    columns = wp.cw_mul(grad_spread, spread)
    grad_log_scales[n] = wp.vec3(
        columns[0, 0] + columns[1, 0] + columns[2, 0],
        columns[0, 1] + columns[1, 1] + columns[2, 1],
        columns[0, 2] + columns[1, 2] + columns[2, 2],
    )
    grad_q = rotation_gradient(q, wp.transpose(rotation) * grad_spread * wp.diag(s))
    grad_quaternions[n] = wp.vec4()
    if length > 0.0:
        grad_quaternions[n] = (grad_q - wp.dot(q, grad_q) * q) / length

    grad_row_x = spread * grad_to_x
    grad_row_y = spread * grad_to_y
    grad_slope_x = -fx / z * grad_row_x[2]
    grad_slope_y = -fy / z * grad_row_y[2]
    grad_z = total[3] - (wp.dot(row_x, grad_row_x) + wp.dot(row_y, grad_row_y)) / z
    grad_z -= (fx * p[0] * grad_centre[0] + fy * p[1] * grad_centre[1]) / (z * z)
    grad_x = fx / z * grad_centre[0]
    grad_y = fy / z * grad_centre[1]
    if p[0] / z == slope_x:  # inside the clamp
        grad_x += grad_slope_x / z
        grad_z -= grad_slope_x * slope_x / z
    if p[1] / z == slope_y:
        grad_y += grad_slope_y / z
        grad_z -= grad_slope_y * slope_y / z
    grad_means[n] = wp.transpose(rotation) * wp.vec3(grad_x, grad_y, grad_z)
