"""Photos, depth and a scanned mesh of synthetic rooms: rays through the pixels of two cameras, patterns, soft light."""

import functools
from typing import NamedTuple, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8

from datamodules.synthetic.depth_scenes import sensed
from datamodules.synthetic.mini_scannet_rooms import Place, Room
from datamodules.synthetic.mini_scannet_shapes import Material, Texture
from lightning_modules.functional.cameras import Camera, pixel_rays
from lightning_modules.functional.ray_casting import cast_rays

SUN, SKY = np.array([0.35, 0.5, 0.79]), np.array([-0.6, -0.3, 0.74])  # where light comes from
TEXTURES: tuple[Texture, ...] = get_args(Texture)
VERTEX_SPACING = 0.06  # metres; of ScanNet's decimated meshes about half of that
MESH_NOISE = 0.003  # metres
SEEN_WITHIN = 0.05  # metres of a frame's depth: a vertex the scanner has


class RoomSurface(NamedTuple):
    """A room as triangles that know what they belong to.

    Attributes:
        room: The room.
        quads: [Q, 4, 3] patches in the world, metres.
        thing_ids: [Q] number of the thing in the room.
        part_ids: [Q] number of the part among all parts.
        materials: Of the parts.
        normals: [Q, 3] unit, of either side.
    """

    room: Room
    quads: Float[np.ndarray, "quads 4 3"]
    thing_ids: Int[np.ndarray, " quads"]
    part_ids: Int[np.ndarray, " quads"]
    materials: tuple[Material, ...]
    normals: Float[np.ndarray, "quads 3"]


class RoomFrame(NamedTuple):
    """One RGB-D frame, and what it truly shows.

    Attributes:
        image: [H, W, 3] uint8 RGB.
        depth: [h, w] metres, as an imperfect sensor sees it, 0 = none.
        exact_depth: [h, w] metres.
        thing_ids: [H, W] of each colour pixel.
    """

    image: UInt8[np.ndarray, "height width 3"]
    depth: Float[np.ndarray, "rows columns"]
    exact_depth: Float[np.ndarray, "rows columns"]
    thing_ids: Int[np.ndarray, "height width"]


class ScannedMesh(NamedTuple):
    """The surface as a scan holds it: what some frame saw, in triangles of a few centimetres.

    Attributes:
        vertices: [V, 3] metres.
        colours: [V, 3] uint8 RGB.
        faces: [F, 3].
        thing_ids: [V] what each vertex is part of.
        segment_ids: [V] patch, the superpoint of the vertex.
    """

    vertices: Float[np.ndarray, "vertices 3"]
    colours: UInt8[np.ndarray, "vertices 3"]
    faces: Int[np.ndarray, "faces 3"]
    thing_ids: Int[np.ndarray, " vertices"]
    segment_ids: Int[np.ndarray, " vertices"]


def surface_of(room: Room) -> RoomSurface:
    """Collects the patches of all things."""
    parts = [(number, part) for number, thing in enumerate(room.things) for part in thing.parts]
    quads = np.concatenate([thing.world_quads() for thing in room.things])
    counts = [len(part.quads) for _, part in parts]
    thing_ids = np.repeat([number for number, _ in parts], counts)
    diagonals = np.cross(quads[:, 2] - quads[:, 0], quads[:, 3] - quads[:, 1])
    lengths = np.linalg.norm(diagonals, axis=1, keepdims=True)
    return RoomSurface(
        room,
        quads,
        thing_ids,
        np.repeat(np.arange(len(parts)), counts),
        tuple(part.material for _, part in parts),
        diagonals / np.maximum(lengths, 1e-12),
    )


def camera_at(place: Place, size: tuple[int, int], focal: float, centre: tuple[float, float]) -> Camera:
    """Returns a level camera; width x height, pixels."""
    forward = (place.target - place.eye) / np.linalg.norm(place.target - place.eye)
    right = np.cross(forward, [0.0, 0.0, 1.0])
    right /= np.linalg.norm(right)
    rotation = np.stack([right, np.cross(forward, right), forward])
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = rotation, -rotation @ place.eye
    intrinsics = torch.tensor([[focal, 0, centre[0]], [0, focal, centre[1]], [0, 0, 1]], dtype=torch.float32)
    return Camera(torch.from_numpy(pose).float(), intrinsics, *size)


def take_frame(surface: RoomSurface, colour: Camera, depth: Camera, rng: np.random.Generator) -> RoomFrame:
    """Renders what the two cameras see; exposure, white balance and noise differ from frame to frame."""
    points, quad_ids, _ = _cast(surface, colour)
    colours = surface_colours(surface, points, quad_ids)
    exposure = rng.uniform(0.85, 1.15) * (1 + rng.normal(0, 0.02, 3))
    noisy = np.clip(colours * exposure, 0, 1) ** (1 / 2.2) + rng.normal(0, 0.01, colours.shape)
    image = (noisy.clip(0, 1) * 255).round().astype(np.uint8)
    _, _, exact = _cast(surface, depth)
    exact = exact.reshape(depth.height, depth.width)
    return RoomFrame(
        image.reshape(colour.height, colour.width, 3),
        sensed(exact, rng),
        exact,
        surface.thing_ids[quad_ids].reshape(colour.height, colour.width),
    )


def _cast(surface: RoomSurface, camera: Camera) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns points [R, 3], patches [R] and depths [R] of all pixels; rooms are closed, so every ray ends."""
    origin, directions = pixel_rays(camera)
    rays = directions.reshape(-1, 3)
    corners = torch.from_numpy(surface.quads).float().reshape(-1, 3)
    first = 4 * torch.arange(len(surface.quads), dtype=torch.int32)[:, None]
    faces = torch.cat([first + torch.tensor([0, 1, 2]), first + torch.tensor([0, 2, 3])]).int()
    hits = cast_rays(corners, faces, origin.expand_as(rays), rays)
    points = origin + hits.distances[:, None] * rays
    return points.numpy(), (hits.face_ids % len(surface.quads)).long().numpy(), hits.distances.numpy()


# Colours


def surface_colours(
    surface: RoomSurface, points: Float[np.ndarray, "points 3"], quad_ids: Int[np.ndarray, " points"]
) -> Float[np.ndarray, "points 3"]:
    """Returns linear RGB of points on patches: material, pattern and light."""
    things, parts = surface.room.things, surface.part_ids[quad_ids]
    rotations = np.stack([thing.rotation for thing in things])[surface.thing_ids[quad_ids]]
    positions = np.stack([thing.position for thing in things])[surface.thing_ids[quad_ids]]
    own = np.einsum("pji,pj->pi", rotations, points - positions)  # in the axes of the thing
    colours = np.array([material.colour for material in surface.materials])[parts]
    phases = np.array([material.phase for material in surface.materials])[parts]
    textures = np.array([TEXTURES.index(material.texture) for material in surface.materials])[parts]
    for number in np.flatnonzero(np.bincount(textures)):
        rows = np.flatnonzero(textures == number)
        colours[rows] = _patterned(TEXTURES[number], colours[rows], own[rows], phases[rows])
    normals = surface.normals[quad_ids]
    light = 0.45 + 0.4 * np.abs(normals @ SUN) + 0.2 * np.abs(normals @ SKY)
    is_glass = textures == TEXTURES.index("glass")
    return np.clip(colours * np.where(is_glass, 1.15, light)[:, None], 0, 1)


def _patterned(texture: Texture, colours: np.ndarray, own: np.ndarray, phases: np.ndarray) -> np.ndarray:
    """Applies a pattern in the axes of the thing, metres."""
    x, y, z = (own + phases[:, None]).T
    if texture == "wood":
        grain = np.sin(55 * y + 40 * z + 3 * np.sin(4 * x + 2 * z)) + 0.6 * np.sin(130 * z + 90 * y + 5 * np.sin(3 * x))
        return colours * (1 + 0.09 * grain)[:, None]
    if texture == "fabric":
        return colours * (1 + 0.14 * (_hashed(x, 0.015) + _hashed(y + 0.37 * z, 0.015) - 1))[:, None]
    if texture == "tiles":
        joint = np.minimum(x % 0.3, (y + z) % 0.3) < 0.012
        return (
            colours
            * np.where(joint, 0.6, 0.95 + 0.1 * _hashed(np.floor(x / 0.3) + 7 * np.floor((y + z) / 0.3), 1))[:, None]
        )
    if texture == "books":
        spine = np.stack([_hashed(x + shift, 0.035) for shift in (0.0, 17.3, 41.7)], 1)
        return np.where((x % 0.035 < 0.004)[:, None], 0.08, 0.3 * colours + 0.65 * spine)
    if texture == "picture":
        waves = [np.sin(k * 3.1 * x + (k + 1) * 2.7 * z + k) for k in (1, 2, 3)]
        return np.clip(colours + 0.35 * np.stack(waves, 1), 0.05, 0.95)
    if texture == "glass":
        return colours * (0.8 + 0.25 * np.sin(2.2 * x + 1.4 * z))[:, None]
    return colours


def _hashed(values: np.ndarray, step: float) -> np.ndarray:
    """Returns a fixed number in 0 to 1 for each interval of a length."""
    return np.abs(np.sin(np.floor(values / step) * 12.9898) * 43758.5453) % 1


# The mesh


def scan(
    surface: RoomSurface, cameras: list[Camera], exact_depths: list[np.ndarray], rng: np.random.Generator
) -> ScannedMesh:
    """Cuts the patches into small triangles and keeps those of which frames saw all three corners."""
    vertices, faces, quad_ids = _cut(surface.quads)
    is_seen = np.zeros(len(vertices), bool)
    for camera, depth in zip(cameras, exact_depths, strict=True):
        is_seen |= _seen(vertices, camera, depth)
    faces = faces[is_seen[faces].all(1)]
    kept, renumbered = np.unique(faces, return_inverse=True)
    colours = surface_colours(surface, vertices[kept], quad_ids[kept])
    noisy = vertices[kept] + rng.normal(0, MESH_NOISE, (len(kept), 3))
    return ScannedMesh(
        noisy.astype(np.float32),
        (np.clip(colours, 0, 1) ** (1 / 2.2) * 255).round().astype(np.uint8),
        renumbered.reshape(-1, 3),
        surface.thing_ids[quad_ids[kept]],
        quad_ids[kept],
    )


def _cut(quads: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns vertices, faces and the patch of each vertex; patches share no vertices."""
    sides = np.linalg.norm(np.roll(quads, -1, axis=1) - quads, axis=2)
    counts = np.ceil(np.stack([sides[:, [0, 2]].max(1), sides[:, [1, 3]].max(1)], 1) / VERTEX_SPACING).astype(int)
    vertices, faces, owners, first = [], [], [], 0
    for quad, (across, along) in zip(quads, np.maximum(counts, 1), strict=True):
        weights, triangles = _grid(int(across), int(along))
        vertices.append(weights @ quad)
        faces.append(first + triangles)
        owners.append(len(weights))
        first += len(weights)
    return np.concatenate(vertices), np.concatenate(faces), np.repeat(np.arange(len(quads)), owners)


@functools.lru_cache(maxsize=4096)
def _grid(across: int, along: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the weights of a patch's four corners at the points of a grid on it, and the grid's triangles."""
    u, v = np.meshgrid(np.linspace(0, 1, across + 1), np.linspace(0, 1, along + 1), indexing="ij")
    weights = np.stack([(1 - u) * (1 - v), u * (1 - v), u * v, (1 - u) * v], -1).reshape(-1, 4)
    ids = np.arange(u.size).reshape(u.shape)
    corners = np.stack([ids[:-1, :-1], ids[1:, :-1], ids[1:, 1:], ids[:-1, 1:]], -1).reshape(-1, 4)
    return weights, np.concatenate([corners[:, [0, 1, 2]], corners[:, [0, 2, 3]]])


def _seen(vertices: np.ndarray, camera: Camera, depth: np.ndarray) -> Bool[np.ndarray, " vertices"]:
    pose, intrinsics = camera.camera_from_world.double(), camera.intrinsics.double().numpy()
    local = torch.addmm(pose[:3, 3], torch.from_numpy(vertices), pose[:3, :3].T).numpy()
    z = np.maximum(local[:, 2], 0.05)
    u = local[:, 0] / z * intrinsics[0, 0] + intrinsics[0, 2]
    v = local[:, 1] / z * intrinsics[1, 1] + intrinsics[1, 2]
    inside = (local[:, 2] > 0.05) & (u >= 0) & (v >= 0) & (u < camera.width) & (v < camera.height)
    columns, rows = (values.clip(0, size - 1).astype(int) for values, size in ((u, camera.width), (v, camera.height)))
    return inside & (np.abs(depth[rows, columns] - local[:, 2]) < SEEN_WITHIN + 0.03 * local[:, 2])
