"""Solids of the tabletop world with closed-form ray intersections, inside tests and evenly spread surface points.

Three families make every object: bodies of revolution, tubes along a curve, boxes; and the ellipsoid. All reduce to
quadratics per ray, so a photograph is exact to rounding and needs no marching.
"""

import abc
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.interpolate import CubicSpline, PchipInterpolator

# Rays start on surfaces (shadows) and normals are unit: nothing nearer than this, metres, is a hit.
NEAREST_HIT = 1e-6
SHARP_CORNER_COSINE = 0.77  # profile corners turning by more than 40 degrees keep their edge in the shading


class SurfacePoints(NamedTuple):
    """Points on a surface in world coordinates, metres, with unit outward normals."""

    points: Float[np.ndarray, "points 3"]
    normals: Float[np.ndarray, "points 3"]


@dataclass(frozen=True, eq=False)
class Solid(abc.ABC):
    """A closed body with its place in the world: ``world = origin + scale * rotation @ local``."""

    rotation: np.ndarray
    origin: np.ndarray
    scale: float

    def moved(self, rotation: np.ndarray, origin: np.ndarray, scale: float = 1.0) -> "Solid":
        """Returns the body after a further similarity transform (rotation, then scale, then translation)."""
        return replace(
            self,
            rotation=rotation @ self.rotation,
            origin=origin + scale * rotation @ self.origin,
            scale=scale * self.scale,
        )

    def bounding_sphere(self) -> tuple[Float[np.ndarray, "3"], float]:
        """Returns centre and radius, in the world, of a sphere around the body."""
        low, high = self._local_bounds()
        centre = self.origin + self.scale * self.rotation @ ((low + high) / 2)
        return centre, self.scale * float(np.linalg.norm(high - low)) / 2

    def distances(
        self, origins: Float[np.ndarray, "rays 3"], directions: Float[np.ndarray, "rays 3"]
    ) -> Float[np.ndarray, " rays"]:
        """Finds where rays first meet the surface: the ray parameter (metres for unit directions), inf = nowhere."""
        return self._distances(
            (origins - self.origin) @ self.rotation / self.scale, directions @ self.rotation / self.scale
        )

    def normals(self, points: Float[np.ndarray, "points 3"]) -> Float[np.ndarray, "points 3"]:
        """Returns unit outward normals at points on the surface, smoothed over gentle corners for shading."""
        return self._normals(self.local(points)) @ self.rotation.T

    def contains(self, points: Float[np.ndarray, "points 3"]) -> Bool[np.ndarray, " points"]:
        """Tells which world points lie inside the body."""
        return self._contains(self.local(points))

    def surface_points(self, spacing: float, rng: np.random.Generator) -> SurfacePoints:
        """Spreads points over the surface about ``spacing`` metres apart, jittered so that no rows show."""
        points, normals = self._surface_points(spacing / self.scale, rng)
        return SurfacePoints(self.origin + self.scale * points @ self.rotation.T, normals @ self.rotation.T)

    def area(self) -> float:
        """Surface area in the world, square metres."""
        return self._local_area() * self.scale**2

    def local(self, points: Float[np.ndarray, "points 3"]) -> Float[np.ndarray, "points 3"]:
        """Returns world points in the body's own frame, so that a texture moves with the body."""
        return (points - self.origin) @ self.rotation / self.scale

    # In the body's own frame.

    @abc.abstractmethod
    def _local_bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the lowest and the highest corner of a box around the body, [3] each."""

    @abc.abstractmethod
    def _local_area(self) -> float:
        """Returns the surface area."""

    @abc.abstractmethod
    def _distances(self, origins: np.ndarray, directions: np.ndarray) -> np.ndarray:
        """Returns the distance along each ray to the surface, infinite where it is missed."""

    @abc.abstractmethod
    def _normals(self, points: np.ndarray) -> np.ndarray:
        """Returns unit outward normals at points on the surface."""

    @abc.abstractmethod
    def _contains(self, points: np.ndarray) -> np.ndarray:
        """Tells which points lie inside."""

    @abc.abstractmethod
    def _surface_points(self, spacing: float, rng: np.random.Generator) -> SurfacePoints:
        """Spreads points over the surface."""


@dataclass(frozen=True, eq=False)
class Lathe(Solid):
    """A body of revolution about its local z axis.

    ``profile`` [K, 2] is the closed outline of the material in the (radius, z) half plane, counter-clockwise with the
    radius to the right, so a thin-walled cup is an outline with an inner and an outer side.
    """

    profile: np.ndarray

    @cached_property
    def _edges(self) -> tuple[np.ndarray, np.ndarray]:
        """The outline's edges that sweep a surface ([S, 2] starts and ends); those on the axis do not."""
        starts, ends = self.profile, np.roll(self.profile, -1, axis=0)
        kept = (np.abs(ends - starts).max(1) > 1e-9) & (np.maximum(starts[:, 0], ends[:, 0]) > 1e-9)
        return starts[kept], ends[kept]

    @cached_property
    def _edge_normals(self) -> tuple[np.ndarray, np.ndarray]:
        """The normals in the half plane at both ends of each edge, [S, 2] each, averaged over gentle corners."""
        starts, ends = self._edges
        flat = _unit(np.stack([(ends - starts)[:, 1], -(ends - starts)[:, 0]], 1))
        previous, following = np.roll(flat, 1, axis=0), np.roll(flat, -1, axis=0)
        is_joined = np.abs(starts - np.roll(ends, 1, axis=0)).max(1) < 1e-9
        joined_before = is_joined & (_dots(flat, previous) > SHARP_CORNER_COSINE)
        joined_after = np.roll(joined_before, -1)
        at_start = np.where(joined_before[:, None], flat + previous, flat)
        at_end = np.where(joined_after[:, None], flat + following, flat)
        return _unit(at_start), _unit(at_end)

    def _local_bounds(self) -> tuple[np.ndarray, np.ndarray]:
        radius = self.profile[:, 0].max()
        low, high = self.profile[:, 1].min(), self.profile[:, 1].max()
        return np.array([-radius, -radius, low]), np.array([radius, radius, high])

    def _local_area(self) -> float:
        starts, ends = self._edges
        return float((np.pi * (starts[:, 0] + ends[:, 0]) * np.linalg.norm(ends - starts, axis=1)).sum())

    def _distances(self, origins: np.ndarray, directions: np.ndarray) -> np.ndarray:
        starts, ends = self._edges
        level = np.abs(ends[:, 1] - starts[:, 1]) < 1e-9
        distances = np.full((len(origins), len(starts)), np.inf)
        axis = np.zeros((2, int((~level).sum()), 3))
        axis[0, :, 2], axis[1, :, 2] = starts[~level, 1], ends[~level, 1]
        distances[:, ~level] = _frustum_distances(
            origins, directions, axis[0], axis[1], starts[~level, 0], ends[~level, 0]
        )
        with np.errstate(divide="ignore", invalid="ignore"):
            t = (starts[level, 1] - origins[:, 2:]) / directions[:, 2:]
            radius = np.hypot(
                origins[:, :1] + t * directions[:, :1],
                origins[:, 1:2] + t * directions[:, 1:2],
            )
            inner, outer = (pick(starts[level, 0], ends[level, 0]) for pick in (np.minimum, np.maximum))
            distances[:, level] = np.where((t > NEAREST_HIT) & (radius >= inner) & (radius <= outer), t, np.inf)
        return distances.min(1)

    def _normals(self, points: np.ndarray) -> np.ndarray:
        starts, ends = self._edges
        at_start, at_end = self._edge_normals
        radius = np.hypot(points[:, 0], points[:, 1])
        planar = np.stack([radius, points[:, 2]], 1)
        span = ends - starts
        along = np.clip((planar @ span.T - _dots(starts, span)) / _dots(span, span), 0, 1)
        offset = planar[:, None] - starts - along[..., None] * span
        edge = np.einsum("psk,psk->ps", offset, offset).argmin(1)
        along = along[np.arange(len(edge)), edge][:, None]
        normals = (1 - along) * at_start[edge] + along * at_end[edge]
        outwards = points[:, :2] / np.maximum(radius, 1e-12)[:, None]
        return _unit(np.concatenate([normals[:, :1] * outwards, normals[:, 1:]], 1))

    def _contains(self, points: np.ndarray) -> np.ndarray:
        radius, z = np.hypot(points[:, 0], points[:, 1])[:, None], points[:, 2:]
        starts, ends = self.profile, np.roll(self.profile, -1, axis=0)
        straddles = (starts[:, 1] > z) != (ends[:, 1] > z)
        with np.errstate(divide="ignore", invalid="ignore"):
            crossing = starts[:, 0] + (z - starts[:, 1]) * (ends[:, 0] - starts[:, 0]) / (ends[:, 1] - starts[:, 1])
        return (straddles & (radius < crossing)).sum(1) % 2 == 1

    def _surface_points(self, spacing: float, rng: np.random.Generator) -> SurfacePoints:
        starts, ends = self._edges
        at_start, at_end = self._edge_normals
        edge, along = _rows_along(np.linalg.norm(ends - starts, axis=1), spacing, rng)
        outline = starts[edge] + along[:, None] * (ends - starts)[edge]
        normals = (1 - along[:, None]) * at_start[edge] + along[:, None] * at_end[edge]
        row, angle = _angles_on_rings(outline[:, 0], spacing, rng)
        circle = np.stack([np.cos(angle), np.sin(angle)], 1)
        points = np.concatenate([outline[row, :1] * circle, outline[row, 1:]], 1)
        planar = np.concatenate([normals[row, :1] * circle, normals[row, 1:]], 1)
        return SurfacePoints(points, planar / np.linalg.norm(planar, axis=1, keepdims=True))


@dataclass(frozen=True, eq=False)
class Tube(Solid):
    """A rope of varying thickness: spheres of ``radii`` [K] at ``nodes`` [K, 3], joined by cone frusta."""

    nodes: np.ndarray
    radii: np.ndarray

    def _local_bounds(self) -> tuple[np.ndarray, np.ndarray]:
        radii = self.radii[:, None]
        return (self.nodes - radii).min(0), (self.nodes + radii).max(0)

    def _local_area(self) -> float:
        lengths = np.linalg.norm(np.diff(self.nodes, axis=0), axis=1)
        sides = np.pi * (self.radii[1:] + self.radii[:-1]) * lengths
        return float(sides.sum() + 2 * np.pi * (self.radii[0] ** 2 + self.radii[-1] ** 2))

    def _distances(self, origins: np.ndarray, directions: np.ndarray) -> np.ndarray:
        starts, ends = self.nodes[:-1], self.nodes[1:]
        sides = _frustum_distances(origins, directions, starts, ends, self.radii[:-1], self.radii[1:])
        distances = np.concatenate([sides, _sphere_distances(origins, directions, self.nodes, self.radii)], 1)
        # Inside the rope, pieces have walls in one another; from outside, where rays start, the skin comes first.
        return distances.min(1)

    def _normals(self, points: np.ndarray) -> np.ndarray:
        return _unit(points - self._nearest_centres(points)[0])

    def _nearest_centres(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the points of the centre line nearest relative to the radius there, and these radii."""
        starts, span = self.nodes[:-1], self.nodes[1:] - self.nodes[:-1]
        along = np.clip((points @ span.T - (starts * span).sum(1)) / (span**2).sum(1), 0, 1)
        away = points[:, None] - starts - along[..., None] * span
        radius = self.radii[:-1] + along * np.diff(self.radii)
        segment = (np.einsum("psk,psk->ps", away, away) / radius**2).argmin(1)
        rows = np.arange(len(points))
        return starts[segment] + along[rows, segment][:, None] * span[segment], radius[rows, segment]

    def _contains(self, points: np.ndarray) -> np.ndarray:
        centres, radii = self._nearest_centres(points)
        return np.linalg.norm(points - centres, axis=1) < radii

    def _surface_points(self, spacing: float, rng: np.random.Generator) -> SurfacePoints:
        span = np.diff(self.nodes, axis=0)
        lengths = np.linalg.norm(span, axis=1)
        segment, along = _rows_along(lengths, spacing, rng)
        tangents = span / lengths[:, None]
        centres = self.nodes[segment] + along[:, None] * span[segment]
        radii = self.radii[segment] + along * np.diff(self.radii)[segment]
        row, angle = _angles_on_rings(radii, spacing, rng)
        side, up = perpendicular_frame(tangents[segment[row]])
        normals = np.cos(angle)[:, None] * side + np.sin(angle)[:, None] * up
        caps = []
        for node, tangent, radius in (
            (self.nodes[0], -tangents[0], self.radii[0]),
            (self.nodes[-1], tangents[-1], self.radii[-1]),
        ):
            count = max(1, round(2 * np.pi * radius**2 / spacing**2))
            sphere = _even_directions(2 * count, rng)
            caps.append((node, radius, sphere[sphere @ tangent > 0]))
        points = np.concatenate(
            [centres[row] + radii[row, None] * normals, *(node + radius * cap for node, radius, cap in caps)]
        )
        # On the inside of a bend the rings of one piece dip into the next: back to the skin.
        nearest, thickness = self._nearest_centres(points)
        normals = _unit(points - nearest)
        return SurfacePoints(nearest + thickness[:, None] * normals, normals)


@dataclass(frozen=True, eq=False)
class Ellipsoid(Solid):
    """An ellipsoid about its local origin with semi-axes ``radii`` [3]."""

    radii: np.ndarray

    def _local_bounds(self) -> tuple[np.ndarray, np.ndarray]:
        return -self.radii, self.radii

    def _local_area(self) -> float:
        a, b, c = self.radii**1.6075  # Thomsen's formula, within 1.1 %
        return float(4 * np.pi * ((a * b + a * c + b * c) / 3) ** (1 / 1.6075))

    def _distances(self, origins: np.ndarray, directions: np.ndarray) -> np.ndarray:
        centre, unit = np.zeros((1, 3)), np.ones(1)
        return _sphere_distances(origins / self.radii, directions / self.radii, centre, unit)[:, 0]

    def _normals(self, points: np.ndarray) -> np.ndarray:
        return _unit(points / self.radii**2)

    def _contains(self, points: np.ndarray) -> np.ndarray:
        return ((points / self.radii) ** 2).sum(1) < 1

    def _surface_points(self, spacing: float, rng: np.random.Generator) -> SurfacePoints:
        points = _even_directions(max(4, round(self._local_area() / spacing**2)), rng) * self.radii
        return SurfacePoints(points, _unit(points / self.radii**2))


@dataclass(frozen=True, eq=False)
class Box(Solid):
    """A box about its local origin with half edges ``half_sizes`` [3]."""

    half_sizes: np.ndarray

    def _local_bounds(self) -> tuple[np.ndarray, np.ndarray]:
        return -self.half_sizes, self.half_sizes

    def _local_area(self) -> float:
        a, b, c = self.half_sizes
        return float(8 * (a * b + b * c + a * c))

    def _distances(self, origins: np.ndarray, directions: np.ndarray) -> np.ndarray:
        enter, leave = np.full(len(origins), -np.inf), np.full(len(origins), np.inf)
        for axis in range(3):
            # A ray parallel to a slab gives infinities of the right sign; a tiny slope avoids 0 * inf.
            slope = np.where(np.abs(directions[:, axis]) < 1e-12, 1e-12, directions[:, axis])
            middle, half = -origins[:, axis] / slope, self.half_sizes[axis] / np.abs(slope)
            enter, leave = np.maximum(enter, middle - half), np.minimum(leave, middle + half)
        nearest = np.where(enter > NEAREST_HIT, enter, leave)
        return np.where((enter <= leave) & (leave > NEAREST_HIT), nearest, np.inf)

    def _normals(self, points: np.ndarray) -> np.ndarray:
        face = (np.abs(points) - self.half_sizes).argmax(1)
        rows = np.arange(len(points))
        normals = np.zeros_like(points)
        normals[rows, face] = np.sign(points[rows, face])
        return normals

    def _contains(self, points: np.ndarray) -> np.ndarray:
        return (np.abs(points) < self.half_sizes).all(1)

    def _surface_points(self, spacing: float, rng: np.random.Generator) -> SurfacePoints:
        points, normals = [], []
        for axis in range(3):
            u, v = (axis + 1) % 3, (axis + 2) % 3
            counts = [max(1, round(2 * self.half_sizes[side] / spacing)) for side in (u, v)]
            for sign in (-1.0, 1.0):
                grid = np.stack(np.meshgrid(*(np.arange(count) + 0.5 for count in counts), indexing="ij"), -1)
                grid = grid.reshape(-1, 2) + rng.uniform(-0.2, 0.2, (counts[0] * counts[1], 2))
                face = np.zeros((len(grid), 3))
                face[:, axis] = sign * self.half_sizes[axis]
                face[:, [u, v]] = (2 * grid / counts - 1) * self.half_sizes[[u, v]]
                points.append(face)
                normals.append(np.eye(3)[[axis] * len(grid)] * sign)
        return SurfacePoints(np.concatenate(points), np.concatenate(normals))


def lathe(profile: Sequence[tuple[float, float]] | np.ndarray, at: Sequence[float] = (0, 0, 0)) -> Lathe:
    """Returns a body of revolution about the vertical through ``at``; ``profile`` is its closed outline (radius, z)."""
    outline = np.asarray(profile, float)
    radius, z = outline.T
    is_clockwise = (radius * np.roll(z, -1) - np.roll(radius, -1) * z).sum() < 0
    return Lathe(np.eye(3), np.asarray(at, float), 1.0, outline[::-1].copy() if is_clockwise else outline)


def tube(
    nodes: Sequence[Sequence[float] | np.ndarray] | np.ndarray, radii: float | Sequence[float], num_nodes: int = 12
) -> Tube:
    """Returns a rope along a cubic spline through ``nodes``; ``radii`` are interpolated along it."""
    control = np.asarray(nodes, float)
    thickness = np.broadcast_to(np.asarray(radii, float), len(control))
    if len(control) > 2:
        knots = np.linspace(0, 1, len(control))
        fine = np.linspace(0, 1, num_nodes)
        control, thickness = CubicSpline(knots, control)(fine), np.interp(fine, knots, thickness)
    return Tube(np.eye(3), np.zeros(3), 1.0, control, np.array(thickness))


def ellipsoid(radii: Sequence[float] | float, at: Sequence[float] = (0, 0, 0)) -> Ellipsoid:
    """Returns an ellipsoid with semi-axes ``radii`` about ``at``."""
    return Ellipsoid(np.eye(3), np.asarray(at, float), 1.0, np.broadcast_to(np.asarray(radii, float), 3).copy())


def box(sizes: Sequence[float], at: Sequence[float] = (0, 0, 0)) -> Box:
    """Returns a box of full edge lengths ``sizes`` about ``at``."""
    return Box(np.eye(3), np.asarray(at, float), 1.0, np.asarray(sizes, float) / 2)


def smooth_outline(points: Sequence[tuple[float, float]], num_points: int = 14) -> np.ndarray:
    """Returns ``num_points`` (radius, z) pairs on a smooth curve through ``points``."""
    control = np.asarray(points, float)
    steps = np.linalg.norm(np.diff(control, axis=0), axis=1)
    knots = np.concatenate([[0], np.cumsum(steps)])
    # Monotone pieces never bulge beyond the control points, as a plain cubic spline would at a bottle's shoulder.
    return PchipInterpolator(knots, control)(np.linspace(0, knots[-1], num_points))


def shell(outer: np.ndarray, thickness: float) -> np.ndarray:
    """Returns the outline of a thin wall: ``outer`` (from the bottom on the axis to the rim) and its inside.

    The inner side is the outer one moved inwards by ``thickness``, metres, along the outline's normals.
    """
    tangent = np.gradient(outer, axis=0)
    tangent /= np.linalg.norm(tangent, axis=1, keepdims=True)
    inner = outer - thickness * np.stack([tangent[:, 1], -tangent[:, 0]], 1)
    inner[:, 0] = np.maximum(inner[:, 0], 0)
    inner[0, 0] = outer[0, 0]
    inner[-1] = outer[-1] - [thickness, 0]
    return np.concatenate([outer, inner[::-1]])


def turn(axis: str, degrees: float) -> Float[np.ndarray, "3 3"]:
    """Returns the right-handed rotation about the ``x``, ``y`` or ``z`` axis."""
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    a, b = {"x": (1, 2), "y": (2, 0), "z": (0, 1)}[axis]
    matrix = np.eye(3)
    matrix[a, a], matrix[a, b], matrix[b, a], matrix[b, b] = c, -s, s, c
    return matrix


def _dots(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return np.einsum("pk,pk->p", one, other)  # several times faster than a sum over an axis of three


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.sqrt(_dots(vectors, vectors)), 1e-12)[:, None]


def _frustum_distances(
    origins: np.ndarray,
    directions: np.ndarray,
    starts: np.ndarray,
    ends: np.ndarray,
    start_radii: np.ndarray,
    end_radii: np.ndarray,
) -> np.ndarray:
    """Intersects R rays with the sides of S cone frusta: [R, S] nearest distances, inf = miss.

    With m + n t the fraction along the axis, a point is on the cone where its squared distance from the axis equals the
    squared radius at that fraction: a quadratic A t^2 + 2 B t + C.
    """
    axis = ends - starts
    square_length = (axis**2).sum(1)
    growth = end_radii - start_radii
    m = (origins @ axis.T - (starts * axis).sum(1)) / square_length
    n = directions @ axis.T / square_length
    square_offset = _dots(origins, origins)[:, None] - 2 * origins @ starts.T + (starts**2).sum(1)
    advance = _dots(origins, directions)[:, None] - directions @ starts.T
    radius = start_radii + growth * m
    a = _dots(directions, directions)[:, None] - n * n * square_length - (growth * n) ** 2
    b = advance - m * n * square_length - growth * n * radius
    c = square_offset - m * m * square_length - radius * radius
    discriminant = b * b - a * c
    with np.errstate(divide="ignore", invalid="ignore"):
        root = np.sqrt(discriminant)  # NaN where the ray misses: every comparison below is then false
        q = -(b + np.copysign(root, b))
        best = np.full(q.shape, np.inf)
        for t in (q / a, c / q):
            fraction = m + n * t
            valid = (t > NEAREST_HIT) & (fraction >= 0) & (fraction <= 1) & (t < best)
            best = np.where(valid, t, best)
    return best


def _sphere_distances(
    origins: np.ndarray, directions: np.ndarray, centres: np.ndarray, radii: np.ndarray
) -> np.ndarray:
    """Intersects R rays with S spheres: [R, S] nearest distances, inf = miss."""
    a = _dots(directions, directions)[:, None]
    b = _dots(origins, directions)[:, None] - directions @ centres.T
    c = _dots(origins, origins)[:, None] - 2 * origins @ centres.T + (centres**2).sum(1) - radii**2
    with np.errstate(invalid="ignore"):
        root = np.sqrt(b * b - a * c)
        near, far = (-b - root) / a, (-b + root) / a
        return np.where(near > NEAREST_HIT, near, np.where(far > NEAREST_HIT, far, np.inf))


def _rows_along(
    lengths: np.ndarray, spacing: float, rng: np.random.Generator
) -> tuple[Int[np.ndarray, " rows"], Float[np.ndarray, " rows"]]:
    """Places rows ``spacing`` apart along a polyline: the edge of each row and the fraction along that edge."""
    total = lengths.sum()
    count = max(1, round(total / spacing))
    position = (np.arange(count) + 0.5 + rng.uniform(-0.15, 0.15, count)) * total / count
    reached = np.cumsum(lengths)
    edge = np.minimum(np.searchsorted(reached, position), len(lengths) - 1)
    return edge, np.clip((position - (reached - lengths)[edge]) / lengths[edge], 0, 1)


def _angles_on_rings(radii: np.ndarray, spacing: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Spreads angles ``spacing`` apart over rings of ``radii``: the ring of each point and its angle, radians."""
    counts = np.maximum(1, np.round(2 * np.pi * radii / spacing)).astype(int)
    ring = np.repeat(np.arange(len(radii)), counts)
    position = np.arange(len(ring)) - np.repeat(np.cumsum(counts) - counts, counts)
    phase = rng.uniform(0, 1, len(radii))[ring] + rng.uniform(-0.2, 0.2, len(ring))
    return ring, 2 * np.pi * (position + phase) / counts[ring]


def _even_directions(count: int, rng: np.random.Generator) -> np.ndarray:
    """Returns ``count`` unit vectors on a Fibonacci spiral, jittered and turned at random."""
    steps = np.arange(count) + 0.5
    z = np.clip(1 - 2 * (steps + rng.uniform(-0.3, 0.3, count)) / count, -1, 1)
    angle = np.pi * (1 + 5**0.5) * steps + rng.uniform(0, 2 * np.pi)
    radius = np.sqrt(1 - z * z)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle), z], 1)


def perpendicular_frame(directions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns two unit vectors perpendicular to each direction and to each other."""
    reference = np.where(np.abs(directions[:, 2:]) < 0.9, [[0.0, 0.0, 1.0]], [[1.0, 0.0, 0.0]])
    side = _unit(np.cross(reference, directions))
    return side, np.cross(directions, side)
