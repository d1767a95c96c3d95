"""A Warp kernel that looks points up in posed images."""

import typing

import warp as wp

wp.set_module_options({"enable_backward": False})


@typing.no_type_check
@wp.kernel
def look_up(
    start: int,
    num_points: int,
    num_views: int,
    width: float,
    height: float,
    near: wp.float64,
    tolerance: float,
    tolerance_fraction: float,
    has_depth: bool,
    points: wp.array2d(dtype=float),
    image_from_world: wp.array2d(dtype=wp.float64),
    has_frame: wp.array(dtype=wp.bool),
    depth: wp.array3d(dtype=float),
    uv: wp.array2d(dtype=float),
    valid: wp.array(dtype=wp.bool),
    conf: wp.array(dtype=float),
    depths: wp.array(dtype=float),
):
    """Projects one point into the views of its scene; results are by scene, then view, then point."""
    row = start + wp.tid()
    scene = row // num_points
    x = wp.float64(points[row, 0])
    y = wp.float64(points[row, 1])
    z = wp.float64(points[row, 2])
    for view in range(scene * num_views, (scene + 1) * num_views):
        out = view * num_points + row - scene * num_points
        m = image_from_world[view]
        w = m[8] * x + m[9] * y + m[10] * z + m[11]
        depths[out] = float(w)
        u = float(0.0)  # noqa: UP018  # a variable of the kernel, not a constant
        v = float(0.0)  # noqa: UP018
        if w > near:
            inverse = wp.float64(1.0) / w
            u = float((m[0] * x + m[1] * y + m[2] * z + m[3]) * inverse)
            v = float((m[4] * x + m[5] * y + m[6] * z + m[7]) * inverse)
        uv[out, 0] = u
        uv[out, 1] = v
        sure = float(0.0)  # noqa: UP018
        if w > near and u >= 0.0 and u < width and v >= 0.0 and v < height and has_frame[view]:
            sure = 1.0
            if has_depth:
                column = wp.min(int(u * (float(depth.shape[2]) / width)), depth.shape[2] - 1)
                line = wp.min(int(v * (float(depth.shape[1]) / height)), depth.shape[1] - 1)
                observed = depth[view, line, column]
                deviation = wp.abs(observed - float(w)) / wp.max(tolerance, tolerance_fraction * float(w))
                sure = 0.0
                if observed > 0.0 and deviation <= 1.0:
                    sure = 1.0 / (1.0 + 4.0 * deviation * deviation)
        valid[out] = sure > 0.0
        conf[out] = sure
