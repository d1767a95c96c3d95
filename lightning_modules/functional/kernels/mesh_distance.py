"""Warp kernels of distances to a triangle mesh: near cells of an octree, winding numbers, nearest faces."""

import typing

import warp as wp

wp.set_module_options({"enable_backward": False})


@typing.no_type_check
@wp.kernel
def near_children(
    start: int,
    mesh: wp.uint64,
    cells: wp.array2d(dtype=int),
    cell_distances: wp.array(dtype=float),
    size: int,
    resolution: int,
    limit: float,
    distances: wp.array2d(dtype=float),
):
    """Measures how far the centres of a cell's eight children are from the mesh.

    A cell is a cube of grid points, named by its lowest. What is beyond the limit stays as it is. By the triangle
    inequality, a child's distance is at most its cell's plus that between their centres: the search begins there.

    Args:
        start: Cell of the first thread.
        mesh: The mesh in the cube [-1, 1]^3.
        cells: [P, 3] cells of twice the size.
        cell_distances: [P] of the cells' centres.
        size: Grid points of a child along each axis.
        resolution: Grid points of the cube along each axis.
        limit: Farthest centre that counts.
        distances: [P, 8] result.
    """
    p = start + wp.tid()
    step = 2.0 / float(resolution - 1)
    between = 0.8660254 * float(size) * step  # the centres of a cell and its child
    # Rounding must not put the nearest point beyond where the search ends.
    farthest = wp.min(limit, cell_distances[p] + between) * 1.00001 + 1.0e-6
    for child in range(8):
        x = cells[p, 0] + (child >> 2) * size
        y = cells[p, 1] + ((child >> 1) & 1) * size
        z = cells[p, 2] + (child & 1) * size
        if x < resolution and y < resolution and z < resolution:
            centre = wp.vec3(
                float(2 * x + size - 1) * 0.5 * step - 1.0,
                float(2 * y + size - 1) * 0.5 * step - 1.0,
                float(2 * z + size - 1) * 0.5 * step - 1.0,
            )
            nearest = wp.mesh_query_point_no_sign(mesh, centre, farthest)
            if nearest.result:
                surface = wp.mesh_eval_position(mesh, nearest.face, nearest.u, nearest.v)
                distances[p, child] = wp.length(surface - centre)


@typing.no_type_check
@wp.kernel
def winding_signs(
    start: int,
    mesh: wp.uint64,
    coords: wp.array2d(dtype=int),
    resolution: int,
    distances: wp.array(dtype=float),
):
    """Makes the distances of grid points negative where the winding number of the mesh is above a half.

    Args:
        start: Grid point of the first thread.
        mesh: The mesh, built for winding numbers.
        coords: [N, 3] grid points.
        resolution: Grid points of the cube along each axis.
        distances: [N] not negative; changed in place.
    """
    n = start + wp.tid()
    step = 2.0 / float(resolution - 1)
    point = wp.vec3(
        float(coords[n, 0]) * step - 1.0, float(coords[n, 1]) * step - 1.0, float(coords[n, 2]) * step - 1.0
    )
    # The query tells the sign where it finds a point, so it must look as far as one is; its accuracy is Warp's own.
    query = wp.mesh_query_point_sign_winding_number(mesh, point, distances[n] * 1.00001 + 1.0e-6)
    if query.result:
        distances[n] *= query.sign


@typing.no_type_check
@wp.kernel
def nearest_faces(
    start: int,
    mesh: wp.uint64,
    points: wp.array2d(dtype=float),
    face_ids: wp.array(dtype=int),
):
    """Finds the face nearest to each point; leaves the number as it is where the mesh has none with an area."""
    n = start + wp.tid()
    nearest = wp.mesh_query_point_no_sign(mesh, wp.vec3(points[n, 0], points[n, 1], points[n, 2]), 1.0e18)
    if nearest.result:
        face_ids[n] = nearest.face
