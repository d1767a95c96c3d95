"""Solids of rounded parts, blended and cut, and their exact signed distance at the grid points near the surface.

Part fields follow the well-known closed forms (https://iquilezles.org/articles/distfunctions). A blend or a cut of
exact fields is a bound only: never above the distance, and right where the point that it leads to lies on the surface.
Everywhere else the nearest surface point is looked for among those that were found so, and refined.
"""

import math
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.spatial import cKDTree

PartKind = Literal["ball", "capsule", "box", "ring", "cylinder", "half_space"]
ON_SURFACE = 1e-4  # of a voxel: a point with a smaller field lies on the surface
SLIDES = 4  # of a foot along its face


class Part(NamedTuple):
    """A solid with an exact distance field.

    Attributes:
        kind: Its core: a point, a segment along z, a box, a circle in the xy plane, an upright cylinder, or all z < 0.
        centre: [3] where the core's centre is.
        axes: [3, 3] the part's own axes, one per row.
        size: [3] of the core: half its length (first); three half sizes; its radius (first); its radius and half
            its height.
        radius: The core is thickened by it, so edges are round; 0 for sharp ones.
    """

    kind: PartKind
    centre: Float[np.ndarray, "3"]
    axes: Float[np.ndarray, "3 3"]
    size: Float[np.ndarray, "3"]
    radius: float


class Solid(NamedTuple):
    """Parts that flow into each other, less a part.

    Sharp parts (``radius`` 0) may stand alone; one that is blended, cut or cuts must be smooth near the surface, or
    the distance around its edges is found only to a part of a voxel.

    Attributes:
        parts: One or more.
        blend: Width over which they flow together: that of the quadratic smooth minimum; above 0 for several parts.
        cut: What is taken away, or None.
    """

    parts: tuple[Part, ...]
    blend: float = 0.0
    cut: Part | None = None


class Field(NamedTuple):
    """A scalar field with its gradient at P points."""

    value: Float[np.ndarray, " points"]
    gradient: Float[np.ndarray, "points 3"]


def signed_distance_near_surface(
    solid: Solid, resolution: int, band: float = 4.0
) -> tuple[Int[np.ndarray, "voxels 3"], Float[np.ndarray, " voxels"]]:
    """Returns the grid points within a band of the surface, sorted by key, and their signed distance over the band.

    Grid points lie at ``2 * i / (resolution - 1) - 1``. They are found from cells of many points down to single ones:
    the field is 1-Lipschitz, so a cell is empty if its centre is farther from the surface than half its diagonal and
    the band. Memory is in proportion to the surface. Single parts are exact; beside blends and edges distances are
    found to a few hundredths of a voxel, from above.

    Args:
        solid: What to measure.
        resolution: Grid points along each axis.
        band: In voxels of width ``2 / (resolution - 1)``.

    Returns:
        [N, 3] int32 points and [N] float32 distance in -1 to 1, negative inside.

    Raises:
        ValueError: If no grid point is near the surface, or parts meet in a crease, for they are not blended.
    """
    if len(solid.parts) > 1 and solid.blend <= 0:
        raise ValueError(f"blend is {solid.blend} for {len(solid.parts)} parts; allowed: above 0, or a single part.")
    voxel = 2 / (resolution - 1)
    coords = _points_near_zero(solid, resolution, band * voxel)
    if not len(coords):
        raise ValueError(f"No point of a grid of {resolution} lies within {band} voxels of the surface of {solid}.")
    key = (coords[:, 0] * resolution + coords[:, 1]) * resolution + coords[:, 2]
    coords = coords[np.argsort(key)]
    points = coords * voxel - 1
    distance = signed_distance(solid, points, voxel)
    near = np.abs(distance) <= band * voxel
    return coords[near].astype(np.int32), (distance[near] / (band * voxel)).astype(np.float32)


def points_on_surface(solid: Solid, resolution: int) -> Float[np.ndarray, "points 3"]:
    """Returns points of the surface, about two for each square of a grid's voxels."""
    voxel = 2 / (resolution - 1)
    near = _points_near_zero(solid, resolution, voxel) * voxel - 1
    return np.concatenate([_projected(solid, near, voxel), _edge_points(solid, near, voxel)])


def _points_near_zero(solid: Solid, resolution: int, reach: float) -> Int[np.ndarray, "voxels 3"]:
    voxel = 2 / (resolution - 1)
    cell = 1 << max(math.ceil(math.log2(resolution / 8)), 0)
    corners = np.stack(np.meshgrid(*[np.arange(0, resolution, cell)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)
    octants = np.stack(np.meshgrid([0, 1], [0, 1], [0, 1], indexing="ij"), axis=-1).reshape(-1, 3)
    while True:
        middle = (corners + (cell - 1) / 2) * voxel - 1
        half_diagonal = math.sqrt(3) * (cell - 1) / 2 * voxel
        corners = corners[np.abs(solid_field(solid, middle).value) <= reach + half_diagonal]
        if cell == 1:
            return corners
        cell //= 2
        corners = (corners[:, None] + octants * cell).reshape(-1, 3)
        corners = corners[(corners < resolution).all(1)]


def signed_distance(
    solid: Solid, points: Float[np.ndarray, "points 3"], spacing: float
) -> Float[np.ndarray, " points"]:
    """Returns the signed distance of points near the surface, negative inside.

    Args:
        solid: What to measure.
        points: Points that cover the surface's surroundings: the surface is known from what they lead to.
        spacing: Of the points; the scale of all tolerances.
    """
    field = solid_field(solid, points)
    if len(solid.parts) == 1 and solid.cut is None:
        return field.value
    feet = points - field.value[:, None] * field.gradient
    is_exact = np.abs(solid_field(solid, feet).value) <= ON_SURFACE * spacing
    distance = np.abs(field.value)
    searched = points[~is_exact]
    if len(searched):
        edge = _edge_points(solid, points, spacing)
        distance[~is_exact] = _distance_to_surface(solid, searched, feet[is_exact], edge, spacing)
    return np.copysign(distance, field.value)


def _distance_to_surface(
    solid: Solid, points: np.ndarray, surface: np.ndarray, edge: np.ndarray, spacing: float
) -> Float[np.ndarray, " points"]:
    """Returns the distance to a surface of which some points are known, found from the nearest of them.

    The nearest point lies on the blend's face, on the cut's, or on the edge where they meet.
    """
    surface = np.concatenate([surface, _projected(solid, points, spacing)])
    if not len(surface):
        raise ValueError(f"{solid} has no surface: all is cut away, or it is thinner than the grid can tell.")
    surface = _thinned(surface, spacing / 4)
    distance, ids = cKDTree(surface).query(points)
    distance = _distance_along_face(solid, points, surface[ids], distance, spacing)
    if len(edge):
        np.minimum(distance, cKDTree(_thinned(edge, spacing / 10)).query(points)[0], out=distance)
    return distance


def _projected(solid: Solid, points: np.ndarray, spacing: float) -> Float[np.ndarray, "feet 3"]:
    """Returns points of the surface that points near it lead to, each down the gradient."""
    feet, field = points, solid_field(solid, points)
    for _ in range(4):
        square = np.maximum(np.einsum("ij,ij->i", field.gradient, field.gradient), 1e-12)
        feet = feet - (field.value / square)[:, None] * field.gradient
        field = solid_field(solid, feet)
    return feet[np.abs(field.value) <= ON_SURFACE * spacing]


def _thinned(points: np.ndarray, size: float) -> np.ndarray:
    """Keeps one point of each cube of a size."""
    x, y, z = np.floor((points - points.min(0)) / size).astype(np.int64).T
    return points[np.unique((x * (y.max() + 1) + y) * (z.max() + 1) + z, return_index=True)[1]]


def _lengths(vectors: np.ndarray) -> np.ndarray:
    return np.sqrt(np.einsum("ij,ij->i", vectors, vectors))


def _distance_along_face(
    solid: Solid, points: np.ndarray, start: np.ndarray, distance: np.ndarray, spacing: float
) -> Float[np.ndarray, " points"]:
    """Slides feet along the face they lie on towards their points; returns the least distance met on the surface.

    A step is damped by the strongest curvature outwards, one over the least radius, or it would not converge.
    """
    parts = [*solid.parts, *([] if solid.cut is None else [solid.cut])]
    least_radius = min(part.radius for part in parts if part.kind != "half_space")
    feet, on_cut = start, None
    for step in range(SLIDES + 2):
        blend, cut = blend_field(solid, feet), None if solid.cut is None else part_field(solid.cut, feet)
        field = _united(blend, cut)
        gap = points - feet
        reached = _lengths(gap)
        distance = np.where((np.abs(field.value) <= ON_SURFACE * spacing) & (reached < distance), reached, distance)
        if cut is not None:
            on_cut = -cut.value > blend.value if on_cut is None else on_cut
            field = _chosen(blend, cut, on_cut)
        square = np.maximum(np.einsum("ij,ij->i", field.gradient, field.gradient), 1e-12)
        feet = feet - (field.value / square)[:, None] * field.gradient
        if step < SLIDES:  # the last two only come back to the face
            along = gap - (np.einsum("ij,ij->i", gap, field.gradient) / square)[:, None] * field.gradient
            feet += along / (1 + reached / max(least_radius, spacing))[:, None]
    return distance


def _edge_points(solid: Solid, points: np.ndarray, spacing: float) -> Float[np.ndarray, "edge 3"]:
    """Returns where the cut's face meets the blend's, as densely as points lie around there."""
    if solid.cut is None:
        return points[:0]
    blend, cut = blend_field(solid, points), part_field(solid.cut, points)
    feet = points[(np.abs(blend.value) < 2 * spacing) & (np.abs(cut.value) < 2 * spacing)]
    for _ in range(5):
        blend, cut = blend_field(solid, feet), part_field(solid.cut, feet)
        jacobian = np.stack([blend.gradient, cut.gradient], axis=1)
        values = np.stack([blend.value, cut.value], axis=1)
        gram = jacobian @ jacobian.transpose(0, 2, 1)
        gram[:, [0, 1], [0, 1]] += 1e-9  # faces that touch without crossing
        feet = feet - (jacobian.transpose(0, 2, 1) @ np.linalg.solve(gram, values[..., None]))[..., 0]
    values = np.stack([blend_field(solid, feet).value, part_field(solid.cut, feet).value])
    return feet[(np.abs(values) <= ON_SURFACE * spacing).all(0)]


# Fields


def solid_field(solid: Solid, points: Float[np.ndarray, "points 3"]) -> Field:
    """Returns a 1-Lipschitz field with the solid's surface as its zeros, negative inside: a bound of the distance."""
    return _united(blend_field(solid, points), None if solid.cut is None else part_field(solid.cut, points))


def _united(blend: Field, cut: Field | None) -> Field:
    return blend if cut is None else _chosen(blend, cut, -cut.value > blend.value)


def _chosen(blend: Field, cut: Field, on_cut: Bool[np.ndarray, " points"]) -> Field:
    """Returns the field of the blend, or of all that is not cut away, as told for each point."""
    gradient = np.where(on_cut[:, None], -cut.gradient, blend.gradient)
    return Field(np.where(on_cut, -cut.value, blend.value), gradient)


def blend_field(solid: Solid, points: Float[np.ndarray, "points 3"]) -> Field:
    """Returns the smooth minimum of the parts' fields."""
    value, gradient = part_field(solid.parts[0], points)
    for part in solid.parts[1:]:
        other = part_field(part, points)
        near = np.maximum(solid.blend - np.abs(value - other.value), 0)
        share = near / max(solid.blend, 1e-12) / 2  # of the farther one
        of_other = np.where(other.value < value, 1 - share, share)[:, None]
        value = np.minimum(value, other.value) - near * share / 2
        gradient = (1 - of_other) * gradient + of_other * other.gradient
    return Field(value, gradient)


def part_field(part: Part, points: Float[np.ndarray, "points 3"]) -> Field:
    """Returns a part's signed distance."""
    own = np.einsum("ij,kj->ik", points - part.centre, part.axes)  # BLAS would spin on all cores for so little
    if part.kind == "half_space":
        return Field(own[:, 2], np.broadcast_to(part.axes[2], own.shape))
    if part.kind in ("box", "cylinder"):
        value, gradient = _box_field(own, part.size) if part.kind == "box" else _cylinder_field(own, part.size)
    else:
        offset = own.copy()
        if part.kind == "capsule":
            offset[:, 2] -= np.clip(own[:, 2], -part.size[0], part.size[0])
        elif part.kind == "ring":
            offset[:, :2] *= (1 - part.size[0] / np.maximum(_lengths(own[:, :2]), 1e-12))[:, None]
        value = _lengths(offset)
        gradient = offset / np.maximum(value, 1e-12)[:, None]
    return Field(value - part.radius, np.einsum("ij,jk->ik", gradient, part.axes))


def _box_field(own: np.ndarray, half: np.ndarray) -> Field:
    beyond = np.abs(own) - half
    outside = np.maximum(beyond, 0)
    norm = _lengths(outside)
    deepest = beyond.argmax(1)
    value = norm + np.minimum(beyond[np.arange(len(own)), deepest], 0)
    gradient = outside / np.maximum(norm, 1e-12)[:, None]
    within = np.flatnonzero(norm == 0)
    gradient[within, deepest[within]] = 1
    return Field(value, np.copysign(gradient, own))


def _cylinder_field(own: np.ndarray, size: np.ndarray) -> Field:
    radial = _lengths(own[:, :2])
    value, slope = _box_field(np.stack([radial, own[:, 2]], axis=1), size[:2])
    around = own[:, :2] * (slope[:, 0] / np.maximum(radial, 1e-12))[:, None]
    return Field(value, np.concatenate([around, slope[:, 1:]], axis=1))
