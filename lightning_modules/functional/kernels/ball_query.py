"""A Warp kernel that lists the nearest points within a radius."""

import typing

import warp as wp

wp.set_module_options({"enable_backward": False})


@typing.no_type_check
@wp.kernel
def nearest_within(
    start: int,
    grid: wp.uint64,
    points: wp.array(dtype=wp.vec3),
    queries: wp.array(dtype=wp.vec3),
    clouds: wp.array(dtype=wp.int32),
    is_own: bool,
    radius: wp.float64,
    squares: wp.array2d(dtype=wp.float64),
    neighbours: wp.array2d(dtype=wp.int32),
):
    """Lists the nearest points of a query's cloud, sorted by distance and, where it is equal, by number.

    Distances are float64: the difference of two float32 numbers is nearly exact in it, so that the order does not
    depend on how the compiler rounds. Where the queries are the points, threads take them cell by cell, so that
    neighbours are in the cache.
    """
    t = start + wp.tid()
    if is_own:
        t = wp.hash_grid_point_id(grid, t)
    x = queries[t]
    num_neighbours = neighbours.shape[1]
    # The grid compares in float32: a little more than the radius, so that rounding loses no point.
    reach = float(radius) * 1.00001 + 1.0e-6 * (wp.abs(x[0]) + wp.abs(x[1]) + wp.abs(x[2]))
    farthest = radius * radius
    count = wp.int32(0)
    for j in wp.hash_grid_query(grid, x, reach, clouds[t]):
        y = points[j]
        dx = wp.float64(y[0]) - wp.float64(x[0])
        dy = wp.float64(y[1]) - wp.float64(x[1])
        dz = wp.float64(y[2]) - wp.float64(x[2])
        square = dx * dx + dy * dy + dz * dz
        if square <= farthest:
            at = count
            if count == num_neighbours:
                at = num_neighbours - 1
                if square == farthest and neighbours[t, at] < j:
                    continue
            else:
                count += 1
            while at > 0:
                before = squares[t, at - 1]
                if before < square or (before == square and neighbours[t, at - 1] < j):
                    break
                squares[t, at] = before
                neighbours[t, at] = neighbours[t, at - 1]
                at -= 1
            squares[t, at] = square
            neighbours[t, at] = j
            if count == num_neighbours:
                farthest = squares[t, num_neighbours - 1]
    for k in range(count, num_neighbours):
        neighbours[t, k] = -1
