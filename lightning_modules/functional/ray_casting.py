"""What rays meet first in a mesh of triangles."""

import contextlib
from typing import NamedTuple

import torch
import warp as wp
from jaxtyping import Float, Int
from torch import Tensor

from lightning_modules.functional.kernels.launch import launch
from lightning_modules.functional.kernels.ray_casting import first_hits


class RayHits(NamedTuple):
    """Where rays end.

    Attributes:
        distances: [R] in lengths of the ray's direction, infinite where it meets nothing.
        face_ids: [R] int32 the triangle, -1 for none.
    """

    distances: Float[Tensor, " rays"]
    face_ids: Int[Tensor, " rays"]


def cast_rays(
    vertices: Float[Tensor, "vertices 3"],
    faces: Int[Tensor, "faces 3"],
    origins: Float[Tensor, "rays 3"],
    directions: Float[Tensor, "rays 3"],
) -> RayHits:
    """Finds the triangle that each ray meets first, from either side; a Warp mesh query on CPU and CUDA.

    Args:
        vertices: float32.
        faces: Rows of ``vertices``.
        origins: float32.
        directions: Of any length above zero; distances are multiples of it.
    """
    device = vertices.device
    distances = torch.full((len(origins),), torch.inf, device=device)
    face_ids = torch.full((len(origins),), -1, dtype=torch.int32, device=device)
    wp.init()
    # On CUDA everything is queued behind what torch has queued before.
    stream = wp.stream_from_torch(torch.cuda.current_stream(device)) if device.type == "cuda" else None
    with contextlib.nullcontext() if stream is None else wp.ScopedStream(stream):
        points, corners = vertices.contiguous(), faces.int().reshape(-1).contiguous()
        mesh = wp.Mesh(wp.from_torch(points, dtype=wp.vec3), wp.from_torch(corners))  # type: ignore[arg-type]
        rays = [wp.from_torch(values.contiguous(), dtype=wp.vec3) for values in (origins, directions)]
        launch(first_hits, len(origins), [mesh.id, *rays, distances, face_ids], device)
        if stream is not None:
            wp.synchronize_stream(stream)  # the mesh goes with this call
    return RayHits(distances, face_ids)


def cast_rays_reference(
    vertices: Float[Tensor, "vertices 3"],
    faces: Int[Tensor, "faces 3"],
    origins: Float[Tensor, "rays 3"],
    directions: Float[Tensor, "rays 3"],
) -> RayHits:
    """Tries every ray on every triangle (Moeller and Trumbore 1997): the twin of :func:`cast_rays`."""
    corner, along, across = (
        vertices[faces[:, 0].long()],
        *(vertices[faces[:, k].long()] - vertices[faces[:, 0].long()] for k in (1, 2)),
    )
    normal = torch.linalg.cross(directions[:, None], across[None])
    scale = (along * normal).sum(-1)
    offset = origins[:, None] - corner
    tangent = torch.linalg.cross(offset, along[None].expand_as(offset))
    u = (offset * normal).sum(-1) / scale
    v = (directions[:, None] * tangent).sum(-1) / scale
    distances = (across * tangent).sum(-1) / scale
    inside = (scale.abs() > 0) & (u >= 0) & (v >= 0) & (u + v <= 1) & (distances > 0)
    nearest, face_ids = distances.masked_fill(~inside, torch.inf).min(1)
    return RayHits(nearest, torch.where(nearest.isfinite(), face_ids, -1).int())
