"""Warp kernel that finds the triangle each ray meets first."""

import typing

import warp as wp

wp.set_module_options({"enable_backward": False})


@typing.no_type_check
@wp.kernel
def first_hits(
    start: int,
    mesh: wp.uint64,
    origins: wp.array(dtype=wp.vec3),
    directions: wp.array(dtype=wp.vec3),
    distances: wp.array(dtype=float),
    face_ids: wp.array(dtype=int),
):
    """Stores distance, in lengths of the direction, and triangle; leaves a ray that meets nothing alone."""
    ray = start + wp.tid()
    hit = wp.mesh_query_ray(mesh, origins[ray], directions[ray], 1.0e8)
    if hit.result:
        distances[ray] = hit.t
        face_ids[ray] = hit.face
