"""Photos of the tabletop world: exact ray casting, textures, soft light baked once, smooth edges; a camera path."""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from scipy.spatial import cKDTree

from datamodules.synthetic.tabletop_objects import Material
from datamodules.synthetic.tabletop_rooms import World
from datamodules.synthetic.tabletop_shapes import Solid, perpendicular_frame
from lightning_modules.functional.cameras import Camera, pixel_rays

RAYS_AT_ONCE = 16384
LIGHT_CENTRE = np.array([0.9, -1.1, 2.0])
LIGHT_RADIUS = 0.4
LIGHT_COLOR = np.array([1.0, 0.95, 0.86]) * 0.95
SKY_COLOR = np.array([0.80, 0.87, 1.0]) * 0.62
BOUNCE_COLOR = np.array([1.0, 0.86, 0.72]) * 0.2
OCCLUSION_REACH = 0.5  # metres; walls farther away than this do not darken what they stand around
NORMAL_WEIGHT = 0.02  # metres per unit of normal: keeps the two sides of a cup's wall apart in the light look-up


class Casts(NamedTuple):
    """What rays meet first.

    Attributes:
        distances: [rays] metres for unit directions, inf = nothing.
        solid_ids: [rays] number of the solid in :class:`RayCaster`, -1 = nothing.
    """

    distances: Float[np.ndarray, " rays"]
    solid_ids: Int[np.ndarray, " rays"]


class Photo(NamedTuple):
    """One photograph with the part each pixel shows (the one at its centre).

    Attributes:
        image: [H, W, 3] sRGB.
        part_ids: [H, W] row of ``World.parts``.
    """

    image: UInt8[np.ndarray, "height width 3"]
    part_ids: Int[np.ndarray, "height width"]


class BakedLight(NamedTuple):
    """Light arriving at points on the surfaces.

    Attributes:
        tree: Neighbour search over positions and weighted normals, six numbers each.
        irradiances: [points, 3] linear RGB.
    """

    tree: cKDTree
    irradiances: Float[np.ndarray, "points 3"]


class RayCaster:
    """All solids of a world behind one ``cast``.

    Args:
        world: The furnished room.
    """

    def __init__(self, world: World) -> None:
        self.solids: list[Solid] = [solid for part in world.parts for solid in part.solids]
        self.part_of_solid = np.repeat(np.arange(world.num_parts), [len(part.solids) for part in world.parts])
        spheres = [solid.bounding_sphere() for solid in self.solids]
        self._centres = np.array([centre for centre, _ in spheres])
        self._radii = np.array([radius for _, radius in spheres])
        self._num_things = int((self.part_of_solid < world.num_things).sum())

    def cast(self, origins: Float[np.ndarray, "rays 3"], directions: Float[np.ndarray, "rays 3"]) -> Casts:
        """Finds the first surface along each ray; directions are unit vectors."""
        distances = np.full(len(origins), np.inf)
        solid_ids = np.full(len(origins), -1)
        for start in range(0, len(origins), RAYS_AT_ONCE):
            rows = slice(start, start + RAYS_AT_ONCE)
            origin, direction = origins[rows], directions[rows]
            passes = self._passes(origin, direction)
            for solid_id, solid in enumerate(self.solids):
                if solid_id == self._num_things:  # the room shell is behind everything else
                    passes &= np.isinf(distances[rows])
                candidates = np.nonzero(passes[solid_id])[0]
                if not len(candidates):
                    continue
                reached = solid.distances(origin[candidates], direction[candidates])
                nearer = reached < distances[start + candidates]
                distances[start + candidates[nearer]] = reached[nearer]
                solid_ids[start + candidates[nearer]] = solid_id
        return Casts(distances, solid_ids)

    def normals(
        self, points: Float[np.ndarray, "points 3"], solid_ids: Int[np.ndarray, " points"]
    ) -> Float[np.ndarray, "points 3"]:
        """Returns outward unit normals at points on the surfaces of the given solids."""
        normals = np.empty_like(points)
        for solid_id in np.unique(solid_ids):
            rows = np.nonzero(solid_ids == solid_id)[0]
            normals[rows] = self.solids[solid_id].normals(points[rows])
        return normals

    def _passes(self, origins: np.ndarray, directions: np.ndarray) -> np.ndarray:
        """Tells which rays pass through the bounding sphere of each solid: [solids, rays] bool."""
        origin, direction, centres = (array.astype(np.float32) for array in (origins, directions, self._centres))
        towards = centres @ direction.T - np.einsum("rk,rk->r", origin, direction)
        square_distance = (-2 * centres) @ origin.T + np.einsum("rk,rk->r", origin, origin)
        square_distance += np.einsum("sk,sk->s", centres, centres)[:, None]
        # A hair wider than the spheres, for single precision.
        square_distance -= ((1.001 * self._radii + 1e-4) ** 2).astype(np.float32)[:, None]
        is_inside = square_distance < 0
        is_near = square_distance < towards**2
        return is_near & ((towards > 0) | is_inside)


def camera_on_path(
    position: float, *, elevations_deg: tuple[float, float], width: int, height: int, phases: Float[np.ndarray, "4"]
) -> Camera:
    """Returns the camera at one position of a closed path around the table.

    Args:
        position: 0 to 1, once around.
        elevations_deg: Lowest and highest angle above the table; the path swings between them five times.
        width: Image width, pixels; the field of view is that of a focal length of 330 pixels at 320.
        height: Image height, pixels.
        phases: Where the swings of elevation, distance and target begin, radians; the world's own.
    """
    angle = 2 * np.pi * position
    low, high = np.radians(elevations_deg)
    elevation = (low + high) / 2 + (high - low) / 2 * np.sin(5 * angle + phases[0])
    distance = 0.98 + 0.08 * np.sin(3 * angle + phases[1])
    target = np.array([0.04 * np.sin(2 * angle + phases[2]), 0.04 * np.cos(3 * angle + phases[3]), 0.035])
    away = np.array([np.cos(elevation) * np.cos(angle), np.cos(elevation) * np.sin(angle), np.sin(elevation)])
    eye = target + distance * away
    right = np.cross(-away, [0.0, 0.0, 1.0])
    right /= np.linalg.norm(right)
    rotation = np.stack([right, np.cross(-away, right), -away])
    camera_from_world = np.eye(4)
    camera_from_world[:3, :3], camera_from_world[:3, 3] = rotation, -rotation @ eye
    focal = 330 * width / 320
    intrinsics = np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]])
    return Camera(
        torch.from_numpy(camera_from_world.astype(np.float32)),
        torch.from_numpy(intrinsics.astype(np.float32)),
        width,
        height,
    )


def bake_light(
    caster: RayCaster,
    points: Float[np.ndarray, "points 3"],
    normals: Float[np.ndarray, "points 3"],
    rng: np.random.Generator,
    num_rays: int = 12,
) -> BakedLight:
    """Gathers light at surface points: a round lamp with soft shadows, sky with occlusion, the floor's bounce."""
    start = points + 1e-4 * normals
    irradiance = np.zeros((len(points), 3))
    side, across = perpendicular_frame(normals)
    for ray in range(num_rays):
        # The golden angle spreads few samples evenly; a random turn per point trades banding for fine noise.
        turn = 2 * np.pi * rng.uniform(size=len(points)) + ray * 2.399963
        radius = LIGHT_RADIUS * np.sqrt((ray + rng.uniform(size=len(points))) / num_rays)
        lamp = LIGHT_CENTRE + np.stack([radius * np.cos(turn), radius * np.sin(turn), np.zeros(len(points))], 1)
        reach = np.linalg.norm(lamp - start, axis=1)
        towards = (lamp - start) / reach[:, None]
        facing = np.maximum((towards * normals).sum(1), 0)
        lit = np.zeros(len(points))
        rows = np.nonzero(facing > 0)[0]
        lit[rows] = caster.cast(start[rows], towards[rows]).distances > reach[rows]
        irradiance += (lit * facing * (2.4 / reach) ** 2)[:, None] * LIGHT_COLOR / num_rays

        radius = np.sqrt((ray + rng.uniform(size=len(points))) / num_rays)[:, None]  # cosine-distributed
        towards = radius * (np.cos(turn)[:, None] * side + np.sin(turn)[:, None] * across)
        towards += np.sqrt(1 - radius**2) * normals
        open_sky = caster.cast(start, towards).distances > OCCLUSION_REACH
        up = np.clip(towards[:, 2:] * 0.5 + 0.5, 0, 1)
        irradiance += open_sky[:, None] * (up * SKY_COLOR + (1 - up) * BOUNCE_COLOR) / num_rays
    # Averaging over near points of like normals removes the sampling noise; penumbras are wider than this.
    tree = cKDTree(np.concatenate([points, NORMAL_WEIGHT * normals], 1))
    _, neighbours = tree.query(tree.data, k=20, workers=-1)
    return BakedLight(tree, irradiance[neighbours].mean(1) + 0.05 * SKY_COLOR)


def surface_colors(
    world: World,
    caster: RayCaster,
    points: Float[np.ndarray, "points 3"],
    solid_ids: Int[np.ndarray, " points"],
    irradiances: Float[np.ndarray, "points 3"],
) -> Float[np.ndarray, "points 3"]:
    """Returns the linear RGB that matt surfaces send back at ``points``."""
    colors = np.empty((len(points), 3))
    for solid_id in np.unique(solid_ids):
        rows = np.nonzero(solid_ids == solid_id)[0]
        material = world.parts[caster.part_of_solid[solid_id]].material
        albedo = _albedo(material, caster.solids[solid_id].local(points[rows]))
        colors[rows] = albedo * irradiances[rows] + material.glow * np.asarray(material.color) ** 2.2
    return colors


def take_photo(world: World, caster: RayCaster, light: BakedLight, camera: Camera) -> Photo:
    """Takes the photograph of one camera; pixels on edges are averaged over four rays."""
    origin, rays = (tensor.double().numpy() for tensor in pixel_rays(camera))
    size = rays.shape[:2]
    lengths = np.linalg.norm(rays, axis=2)
    distances, parts, normals, colors = _look(world, caster, light, origin, (rays / lengths[..., None]).reshape(-1, 3))
    parts, depths = parts.reshape(size), distances.reshape(size) / lengths
    edges = np.nonzero(_is_edge(parts, depths, normals.reshape(*size, 3)).ravel())[0]
    across, down = rays[0, 1] - rays[0, 0], rays[1, 0] - rays[0, 0]
    shifts = np.array([(-0.375, -0.125), (0.125, -0.375), (0.375, 0.125), (-0.125, 0.375)]) @ np.stack([across, down])
    directions = (rays.reshape(-1, 3)[edges] + shifts[:, None]).reshape(-1, 3)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    *_, subcolors = _look(world, caster, light, origin, directions)
    image = to_srgb(colors)
    image[edges] = to_srgb(subcolors).reshape(len(shifts), -1, 3).mean(0)
    image = np.round(255 * image).astype(np.uint8).reshape(*size, 3)
    return Photo(image, parts)


def to_srgb(linear: Float[np.ndarray, "points 3"]) -> Float[np.ndarray, "points 3"]:
    """Maps linear light to display values 0 to 1, with a soft shoulder instead of burnt highlights."""
    exposed = 1.15 * np.maximum(linear, 0)
    return np.clip(exposed * (1 + exposed / 9) / (1 + 0.45 * exposed), 0, 1) ** (1 / 2.2)


def _is_edge(parts: np.ndarray, depths: np.ndarray, normals: np.ndarray) -> np.ndarray:
    """Tells which pixels show another part, a jump in depth, or a crease beside them."""
    edge = np.zeros(parts.shape, bool)
    for one, other in ((np.s_[:-1], np.s_[1:]), (np.s_[:, :-1], np.s_[:, 1:])):
        jump = np.abs(depths[one] - depths[other]) > 0.03 * depths[one]
        crease = (normals[one] * normals[other]).sum(-1) < 0.8
        differs = (parts[one] != parts[other]) | jump | crease
        edge[one] |= differs
        edge[other] |= differs
    return edge


def _look(
    world: World, caster: RayCaster, light: BakedLight, origin: np.ndarray, directions: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns distances, parts, normals and linear RGB along rays: matt light of the baked points and a highlight."""
    distances, solid_ids = caster.cast(np.broadcast_to(origin, directions.shape), directions)
    assert (solid_ids >= 0).all(), "the room is closed: every ray meets a surface"
    points = origin + distances[:, None] * directions
    normals = caster.normals(points, solid_ids)
    parts = caster.part_of_solid[solid_ids]
    gap, neighbours = light.tree.query(np.concatenate([points, NORMAL_WEIGHT * normals], 1), k=3, workers=-1)
    weights = 1 / (gap + 1e-4)
    weights /= weights.sum(1, keepdims=True)
    irradiances = (light.irradiances[neighbours] * weights[..., None]).sum(1)
    colors = surface_colors(world, caster, points, solid_ids, irradiances)
    gloss = np.array([part.material.gloss for part in world.parts])[parts]
    towards_lamp = LIGHT_CENTRE - points
    halfway = towards_lamp / np.linalg.norm(towards_lamp, axis=1, keepdims=True) - directions
    halfway /= np.linalg.norm(halfway, axis=1, keepdims=True)
    shine = gloss * np.maximum((halfway * normals).sum(1), 0) ** (20 + 80 * gloss)
    brightness = irradiances.mean(1) / LIGHT_COLOR.mean()  # no highlight in the shadow
    return distances, parts, normals, colors + (0.7 * shine * np.minimum(brightness, 1) ** 2)[:, None]


def _albedo(material: Material, local: np.ndarray) -> np.ndarray:
    """Returns the linear albedo of a material at points in the solid's own frame, metres."""
    return np.asarray(material.color) ** 2.2 * _pattern(material.texture, local)


def _hash(*cells: np.ndarray) -> np.ndarray:
    """Returns a fixed pseudo-random number, 0 to 1, for each integer cell."""
    mixed = sum(np.sin(cell * scale) for cell, scale in zip(cells, (12.9898, 78.233, 37.719), strict=False))
    return np.modf(np.abs(mixed * 43758.5453))[0]


def _pattern(texture: str, p: np.ndarray) -> np.ndarray:
    """Returns the factor on the base colour, [points, 1] or [points, 3]."""
    x, y, z = p.T
    angle = np.arctan2(y, x)
    if texture == "plain":
        factor = np.ones(len(p))
    elif texture == "wood":
        grain = np.sin(55 * y + 30 * z + 2.2 * np.sin(6 * x + 3 * np.sin(9 * y)) + 0.7 * np.sin(31 * x + 17 * y))
        factor = 1 + 0.16 * grain + 0.05 * np.sin(400 * y + 14 * np.sin(5 * x))
    elif texture == "planks":
        board = np.floor(y / 0.13)
        seam = np.minimum(np.abs(y / 0.13 - board), np.abs(y / 0.13 - board - 1)) < 0.025
        joint = np.abs(np.modf((x + 8) / 0.9 + _hash(board))[0] - 0.5) < 0.004
        factor = (0.82 + 0.36 * _hash(board, np.floor((x + 8) / 0.9 + _hash(board) - 0.5))) * np.where(
            seam | joint, 0.55, 1
        )
        factor = factor * (1 + 0.06 * np.sin(60 * y + 3 * np.sin(7 * x)))
    elif texture == "speckle":
        factor = 1 + 0.22 * (_hash(*np.floor(p.T / 0.0035)) - 0.5)
    elif texture == "fur":
        factor = 1 + 0.5 * (_hash(*np.floor(p.T / 0.003)) - 0.5)
    elif texture == "stripes":
        printed = (
            (np.abs(angle) < 1.1)
            & (np.modf(z / 0.014)[0] < 0.4)
            & (_hash(np.floor(angle * 14), np.floor(z / 0.014)) > 0.3)
        )
        factor = np.where(printed, 0.25, 1.0)
    elif texture == "lattice":
        factor = 0.62 + 0.5 * np.abs(np.sin(7 * angle + 75 * z) * np.sin(7 * angle - 75 * z))
    elif texture == "sectors":
        radius = np.hypot(x, y)
        skin = (np.abs(np.modf(np.abs(angle) / np.pi * 5)[0] - 0.5) > 0.44) | (radius > 0.047) | (radius < 0.006)
        factor = np.where(skin, 1.25, 0.85)
    elif texture == "ribs":
        factor = 0.85 + 0.3 * np.abs(np.cos(6 * angle))
    elif texture == "pages":
        factor = 0.92 + 0.1 * np.sin(2500 * z)
    elif texture == "dial":
        radius = np.hypot(x, y)
        tick = (radius > 0.038) & (radius < 0.047) & (np.abs(np.modf(np.abs(angle) / np.pi * 6 + 0.5)[0] - 0.5) < 0.12)
        factor = np.where(tick, 0.1, 1.0)
    elif texture == "painting":
        hill = z < 0.06 * np.sin(9 * x) - 0.05
        frame = (np.abs(x) > 0.345) | (np.abs(z) > 0.22)
        land = np.where(hill[:, None], [[0.9, 1.5, 0.4]], [[1.6, 1.5, 1.6]])
        return np.where(frame[:, None], [[0.25, 0.12, 0.05]], land)
    elif texture == "panes":
        bar = (np.abs(x) < 0.02) | (np.abs(z) < 0.02) | (np.abs(x) > 0.52) | (np.abs(z) > 0.42)
        factor = np.where(bar, 0.35, 1.0 + 0.3 * z)
    else:
        raise AssertionError(f"no texture is called {texture!r}")
    return factor[:, None]
