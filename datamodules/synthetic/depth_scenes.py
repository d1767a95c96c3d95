"""Depth maps of six kinds of scenes, cast ray by ray onto boxes, cylinders and spheres, seen by an imperfect sensor."""

import itertools
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from lightning.pytorch.utilities import rank_zero_info
from PIL import Image
from rich.progress import track
from typing_extensions import override

from datamodules.depth_maps import DepthMapsDataModule
from datamodules.synthetic.world_folder import write_folder_once
from lightning_modules.functional.depth_autoencoder.depth_range import DepthRange

SETTINGS_FILE = "depth_scenes.json"
IMAGE_SIZE = (120, 160)  # a quarter of a structured-light sensor's
FOCAL_PX = 144.5  # ScanNet's depth camera at that size
NEAREST_M, FARTHEST_M = 0.35, 8.0  # what the sensor reaches
SENSOR_RANGE = DepthRange(NEAREST_M, FARTHEST_M)


class Solids(NamedTuple):
    """Things that stop rays; z is up, metres.

    Attributes:
        boxes: [N, 7] centre, half size, and turn around z in radians. A ray's origin must lie outside.
        rooms: [N, 6] centre and half size of boxes seen from inside; a ray meets the farther wall.
        cylinders: [N, 5] upright: x, y, lowest z, radius, height.
        spheres: [N, 4] centre and radius.
    """

    boxes: Float[np.ndarray, "boxes 7"]
    rooms: Float[np.ndarray, "rooms 6"]
    cylinders: Float[np.ndarray, "cylinders 5"]
    spheres: Float[np.ndarray, "spheres 4"]


class Scene(NamedTuple):
    """What there is, and where a camera may stand.

    Attributes:
        solids: The things.
        eye: Draws where the camera is.
        target: Draws what it looks at.
    """

    solids: Solids
    eye: Callable[[np.random.Generator], np.ndarray]
    target: Callable[[np.random.Generator], np.ndarray]


class DepthScenesDataModule(DepthMapsDataModule):
    """Depth maps of rooms, corridors, tabletops, stairs, shelves and halls, written once as 16-bit PNG in millimetres.

    The files are ``<root>/<kind>/<scene>/depth/<frame>.png``: the layout in which ScanNet's frames are kept. See
    :class:`DepthMapsDataModule` for how they are read and split.

    Args:
        root: Folder to write the maps to, or which holds them already.
        scenes_per_kind: Scenes of each of the six kinds.
        frames_per_scene: Views of each scene.
        world_seed: Of the scenes and views.
        image_size: As in :class:`DepthMapsDataModule`.
        depth_range: As there.
        val_fraction: As there.
        test_fraction: As there.
        batch_size: As there.
        num_workers: As there.
        cache_mib: As there.
        seed: As there.
    """

    def __init__(
        self,
        root: str | Path = "data/depth_scenes",
        scenes_per_kind: int = 64,
        frames_per_scene: int = 4,
        world_seed: int = 0,
        image_size: tuple[int, int] = (128, 128),
        depth_range: DepthRange = SENSOR_RANGE,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        batch_size: int = 32,
        num_workers: int = 0,
        cache_mib: int = 1024,
        seed: int = 0,
    ) -> None:
        super().__init__(
            root,
            image_size,
            depth_range=depth_range,
            val_fraction=val_fraction,
            test_fraction=test_fraction,
            batch_size=batch_size,
            num_workers=num_workers,
            cache_mib=cache_mib,
            seed=seed,
        )
        if scenes_per_kind < 1 or frames_per_scene < 1:
            raise ValueError(
                f"scenes_per_kind is {scenes_per_kind} and frames_per_scene {frames_per_scene}; allowed: at least 1."
            )
        self.scenes_per_kind, self.frames_per_scene, self.world_seed = scenes_per_kind, frames_per_scene, world_seed

    @override
    def prepare_data(self) -> None:
        """Writes the maps unless ``root`` holds them.

        Raises:
            ValueError: If ``root`` holds something else.
        """
        settings = {"scenes_per_kind": self.scenes_per_kind, "frames_per_scene": self.frames_per_scene}
        settings["world_seed"] = self.world_seed
        write_folder_once(self.root, SETTINGS_FILE, settings, lambda folder: write_depth_scenes(folder, **settings))


def write_depth_scenes(folder: Path, scenes_per_kind: int, frames_per_scene: int, world_seed: int) -> None:
    """Writes the maps of all scenes of all kinds."""
    scenes = [(kind, number) for kind in KINDS for number in range(scenes_per_kind)]
    for kind, number in track(scenes, "Casting depth maps", transient=True):
        scene_folder = folder / kind / f"scene_{number:03}" / "depth"
        scene_folder.mkdir(parents=True)
        rng = np.random.default_rng([world_seed, zlib.crc32(kind.encode()), number])
        scene = KINDS[kind](rng)
        for frame in range(frames_per_scene):
            depth = sensed(view(scene, rng), rng)
            Image.fromarray((depth * 1000).round().astype(np.uint16)).save(scene_folder / f"{frame}.png")
    rank_zero_info(f"{len(scenes)} scenes of {len(KINDS)} kinds are {len(scenes) * frames_per_scene} depth maps.")


# Casting


def view(scene: Scene, rng: np.random.Generator, attempts: int = 20) -> Float[np.ndarray, "height width"]:
    """Returns exact depth from a place in the scene of which at least half is within reach and not too near."""
    depth = np.zeros(IMAGE_SIZE, np.float32)
    for _ in range(attempts):
        eye, target = scene.eye(rng), scene.target(rng)
        if _is_inside(scene.solids.boxes, eye):
            continue
        depth = cast(scene.solids, eye, target)
        if ((depth > NEAREST_M) & (depth < FARTHEST_M)).mean() > 0.5:
            break
    return depth


def cast(solids: Solids, eye: np.ndarray, target: np.ndarray) -> Float[np.ndarray, "height width"]:
    """Returns the depth along the optical axis (camera z) of what each pixel's ray meets first; infinite for nothing.

    A pinhole camera at ``eye`` that looks at ``target``, its rows level.
    """
    forward = (target - eye) / np.linalg.norm(target - eye)
    right = np.cross(forward, [0.0, 0.0, 1.0])
    right /= np.linalg.norm(right)
    down = np.cross(forward, right)
    height, width = IMAGE_SIZE
    x = (np.arange(width) + 0.5 - width / 2) / FOCAL_PX
    y = (np.arange(height) + 0.5 - height / 2) / FOCAL_PX
    # Of length one along the axis, so that a ray's parameter is depth. [3, rays], as fast to go through as can be.
    rays = forward[:, None, None] + x * right[:, None, None] + y[:, None] * down[:, None, None]
    rays = np.ascontiguousarray(rays.reshape(3, -1), np.float32)
    rays[rays == 0] = 1e-9
    depth = np.full(rays.shape[1], np.inf, np.float32)
    for part in (_box_depth, _room_depth, _cylinder_depth, _sphere_depth):
        part(solids, eye.astype(np.float32), rays, depth)
    return depth.reshape(height, width)


def _slabs(origin: np.ndarray, inverse_rays: np.ndarray, half: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns where rays enter and leave a box around zero."""
    through_centre = -origin[:, None] * inverse_rays
    reach = half[:, None] * np.abs(inverse_rays)
    return (through_centre - reach).max(0), (through_centre + reach).min(0)


def _box_depth(solids: Solids, eye: np.ndarray, rays: np.ndarray, depth: np.ndarray) -> None:
    for turn in np.unique(solids.boxes[:, 6]):
        turned = _turned(turn)
        inverse = 1 / (turned @ rays)
        for box in solids.boxes[solids.boxes[:, 6] == turn].astype(np.float32):
            enter, leave = _slabs(turned @ (eye - box[:3]), inverse, box[3:6])
            np.minimum(depth, enter, out=depth, where=(enter < leave) & (enter > 0))


def _room_depth(solids: Solids, eye: np.ndarray, rays: np.ndarray, depth: np.ndarray) -> None:
    for room in solids.rooms.astype(np.float32):
        np.minimum(depth, _slabs(eye - room[:3], 1 / rays, room[3:])[1], out=depth)


def _cylinder_depth(solids: Solids, eye: np.ndarray, rays: np.ndarray, depth: np.ndarray) -> None:
    for x, y, bottom, radius, height in solids.cylinders.astype(np.float32):
        origin = eye[:2] - np.array([x, y], np.float32)
        side = _nearest_root(origin, rays[:2], float(radius))
        with np.errstate(invalid="ignore"):
            z = eye[2] + side * rays[2]
            np.minimum(depth, side, out=depth, where=(z >= bottom) & (z <= bottom + height))
        lid = (bottom + height - eye[2]) / rays[2]
        over = np.square(origin[:, None] + lid * rays[:2]).sum(0) <= radius**2
        np.minimum(depth, lid, out=depth, where=over & (lid > 0))


def _sphere_depth(solids: Solids, eye: np.ndarray, rays: np.ndarray, depth: np.ndarray) -> None:
    for sphere in solids.spheres.astype(np.float32):
        np.minimum(depth, _nearest_root(eye - sphere[:3], rays, float(sphere[3])), out=depth)


def _nearest_root(origin: np.ndarray, rays: np.ndarray, radius: float) -> np.ndarray:
    """Returns where rays first come within a radius of zero, in as many dimensions as they have; infinite for never."""
    a, b, c = np.square(rays).sum(0), origin @ rays, origin @ origin - radius**2
    root = b**2 - a * c
    with np.errstate(invalid="ignore"):
        t = (-b - np.sqrt(root)) / a
    return np.where((root > 0) & (t > 0), t, np.float32(np.inf))


def _turned(angle: float) -> np.ndarray:
    cos, sin = np.cos(angle), np.sin(angle)
    return np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]], np.float32)


def _is_inside(boxes: np.ndarray, point: np.ndarray, margin: float = 0.3) -> bool:
    return any((np.abs(_turned(box[6]) @ (point - box[:3])) < box[3:6] + margin).all() for box in boxes)


# The sensor


def sensed(depth: Float[np.ndarray, "height width"], rng: np.random.Generator) -> Float[np.ndarray, "height width"]:
    """Returns what a structured-light sensor makes of exact depth: noise that grows with it, and pixels without, 0.

    Axial noise is Kinect's, 1.2 mm + 1.9 mm/m^2 (z - 0.4 m)^2 (Nguyen, Izadi, Lovell 2012). Without depth is what lies
    out of reach, most pixels beside a jump (the shadow of the projector), surfaces seen at a grazing angle, single
    pixels, and in some maps a patch that does not reflect.
    """
    finite = np.where(np.isfinite(depth), depth, 2 * FARTHEST_M)
    noisy = finite + rng.standard_normal(depth.shape) * (0.0012 + 0.0019 * np.square(finite - 0.4))
    steps = [np.abs(np.diff(finite, axis=axis, append=np.take(finite, [-1], axis))) for axis in (0, 1)]
    jump = np.maximum(*steps) > 0.06 + 0.03 * finite
    jump = jump | np.roll(jump, 1, axis=1)
    grazing = np.maximum(*steps) * FOCAL_PX > 6 * finite  # steeper than 80 degrees against the ray
    lost = (jump & (rng.random(depth.shape) < 0.7)) | (grazing & (rng.random(depth.shape) < 0.5))
    lost |= rng.random(depth.shape) < 0.003
    if rng.random() < 0.3:
        lost |= _patch(depth.shape, rng)
    lost |= (noisy < NEAREST_M) | (noisy > FARTHEST_M)
    return np.where(lost, 0, noisy).astype(np.float32)


def _patch(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    y, x = rng.random(2) * shape
    tall, wide = rng.uniform(4, 16, 2)
    return np.square((rows - y) / tall) + np.square((columns - x) / wide) < 1


# The kinds


def _solids(
    boxes: list[list[float]] | None = None,
    rooms: list[list[float]] | None = None,
    cylinders: list[list[float]] | None = None,
    spheres: list[list[float]] | None = None,
) -> Solids:
    parts = zip((boxes, rooms, cylinders, spheres), (7, 6, 5, 4), strict=True)
    return Solids(*(np.array(part or [], np.float64).reshape(-1, columns) for part, columns in parts))


def _standing(
    x: float, y: float, size: tuple[float, float, float], turn: float = 0.0, floor: float = 0.0
) -> list[float]:
    """Returns a box that stands on a floor."""
    return [x, y, floor + size[2] / 2, size[0] / 2, size[1] / 2, size[2] / 2, turn]


def _within(low: tuple[float, float, float], high: tuple[float, float, float]) -> Callable[..., np.ndarray]:
    return lambda rng: rng.uniform(low, high)


def _room(rng: np.random.Generator) -> Scene:
    """A room of 3 to 6 m with furniture along its walls, tables and a lamp or two."""
    length, width, height = rng.uniform((3.2, 3.0, 2.4), (6.0, 5.0, 3.0))
    boxes, cylinders = [], []
    for _ in range(rng.integers(4, 9)):
        size = tuple(rng.uniform((0.4, 0.4, 0.35), (1.8, 0.9, 1.9)))
        along = rng.uniform(-length / 2 + 0.5, length / 2 - 0.5)
        side = rng.choice([-1, 1]) * (width / 2 - size[1] / 2)
        boxes.append(_standing(along, side, size))
    for _ in range(rng.integers(0, 3)):
        x, y = rng.uniform((-length / 2 + 1, -0.6), (length / 2 - 1, 0.6))
        top = rng.uniform(0.4, 0.8)
        boxes.append([x, y, top, rng.uniform(0.3, 0.7), rng.uniform(0.25, 0.4), 0.03, rng.uniform(0, np.pi)])
        cylinders.append([x, y, 0.0, 0.05, top])
    low, high = (-length / 2 + 0.4, -width / 2 + 0.6, 1.1), (-length / 2 + 1.2, width / 2 - 0.6, 1.8)
    room = [0, 0, height / 2, length / 2, width / 2, height / 2]
    return Scene(
        _solids(boxes, [room], cylinders),
        _within(low, high),
        _within((length / 2 - 1, -width / 2, 0.2), (length / 2, width / 2, 1.2)),
    )


def _corridor(rng: np.random.Generator) -> Scene:
    """A corridor of 1.3 to 2.4 m across and up to 16 m, with door frames and things along the walls."""
    length, width, height = rng.uniform((7, 1.3, 2.2), (16, 2.4, 3.0))
    boxes = []
    for x in np.arange(1.5, length - 1, rng.uniform(1.6, 3.0)):
        side = rng.choice([-1, 1])
        boxes += [[x + shift, side * width / 2, 1.05, 0.05, 0.08, 1.05, 0.0] for shift in (0.0, 0.9)]
        boxes.append([x + 0.45, side * width / 2, 2.12, 0.5, 0.08, 0.05, 0.0])
    for _ in range(rng.integers(0, 4)):
        size = tuple(rng.uniform((0.3, 0.2, 0.3), (0.9, 0.4, 1.5)))
        boxes.append(_standing(rng.uniform(2, length - 1), rng.choice([-1, 1]) * (width - size[1]) / 2, size))
    room = [length / 2, 0, height / 2, length / 2, width / 2, height / 2]
    return Scene(
        _solids(boxes, [room]),
        _within((0.3, -width / 6, 1.2), (1.2, width / 6, 1.8)),
        _within((length * 0.6, -width / 2, 0.6), (length, width / 2, 1.5)),
    )


def _tabletop(rng: np.random.Generator) -> Scene:
    """A table with 5 to 12 boxes, cans, balls on it, seen from above and aside; a wall behind."""
    length, depth, top = rng.uniform((0.9, 0.6, 0.7), (1.6, 1.0, 0.8))
    boxes = [[0, 0, top - 0.02, length / 2, depth / 2, 0.02, 0.0]]
    cylinders, spheres = [], []
    for _ in range(rng.integers(5, 13)):
        x, y = rng.uniform((-length / 2 + 0.1, -depth / 2 + 0.1), (length / 2 - 0.1, depth / 2 - 0.1))
        shape = rng.integers(3)
        if shape == 0:
            size = tuple(rng.uniform(0.06, 0.25, 3))
            boxes.append(_standing(x, y, size, rng.uniform(0, np.pi), top))
        elif shape == 1:
            cylinders.append([x, y, top, rng.uniform(0.03, 0.08), rng.uniform(0.06, 0.3)])
        else:
            radius = rng.uniform(0.04, 0.12)
            spheres.append([x, y, top + radius, radius])
    far = rng.uniform(0.8, 3.0)
    room = [0, far - 3, 1.3, 3, 3 + depth / 2, 1.3]
    return Scene(
        _solids(boxes, [room], cylinders, spheres),
        _within((-0.6, -depth / 2 - 0.9, top + 0.35), (0.6, -depth / 2 - 0.3, top + 0.9)),
        _within((-length / 4, -depth / 4, top), (length / 4, depth / 4, top + 0.1)),
    )


def _stairs(rng: np.random.Generator) -> Scene:
    """A flight of 9 to 15 steps between walls, from its foot or from above."""
    rise, going, width = rng.uniform((0.15, 0.24, 1.0), (0.2, 0.34, 2.4))
    count = int(rng.integers(9, 16))
    boxes = [
        [1.5 + step * going + 2, 0, (step + 1) * rise / 2, 2, width / 2, (step + 1) * rise / 2, 0.0]
        for step in range(count)
    ]
    length, height = 1.5 + count * going + 1.5, count * rise + 2.4
    room = [length / 2 - 1, 0, height / 2, length / 2 + 1, width / 2, height / 2]
    if rng.random() < 0.7:
        eye = _within((-0.8, -width / 4, 1.2), (0.6, width / 4, 1.8))
        target = _within((2.5, -width / 4, 0.6), (1.5 + count * going, width / 4, count * rise))
    else:
        top = count * rise
        eye = _within((length - 1.6, -width / 4, top + 1.2), (length - 0.6, width / 4, top + 1.8))
        target = _within((0.5, -width / 4, 0.0), (2.5, width / 4, 0.8))
    return Scene(_solids(boxes, [room]), eye, target)


def _shelves(rng: np.random.Generator) -> Scene:
    """A wall of boards with boxes, cans and balls on them, from 1 to 2.2 m away."""
    width, height, deep = rng.uniform((1.6, 1.6, 0.25), (3.2, 2.3, 0.45))
    boards = np.linspace(0.1, height, int(rng.integers(4, 7)))
    uprights = np.linspace(-width / 2, width / 2, int(rng.integers(2, 5)))
    boxes = [[0, deep / 2, z, width / 2, deep / 2, 0.012, 0.0] for z in boards]
    boxes += [[x, deep / 2, height / 2, 0.012, deep / 2, height / 2, 0.0] for x in uprights]
    cylinders, spheres = [], []
    for board, above in itertools.pairwise(boards):
        x, room_above = -width / 2 + 0.08, above - board - 0.03
        while x < width / 2 - 0.1:
            wide, tall = rng.uniform(0.04, 0.22), rng.uniform(0.4, 0.95) * room_above
            y, shape = rng.uniform(0.1, deep - 0.08), rng.random()
            if shape < 0.6:
                boxes.append(_standing(x + wide / 2, y, (wide, 0.15, tall), floor=board + 0.012))
            elif shape < 0.8:
                cylinders.append([x + wide / 2, y, board + 0.012, wide / 2, tall])
            else:
                spheres.append([x + wide / 2, y, board + 0.012 + wide / 2, min(wide, room_above) / 2])
            x += wide + rng.exponential(0.06)
    room = [0, deep - 2.5, 1.35, 3, 2.5, 1.35]
    return Scene(
        _solids(boxes, [room], cylinders, spheres),
        _within((-width / 3, -2.2, 1.0), (width / 3, -1.0, 1.7)),
        _within((-width / 4, 0, 0.7), (width / 4, 0, 1.4)),
    )


def _hall(rng: np.random.Generator) -> Scene:
    """A hall of 12 to 20 m with two or more rows of columns, far walls out of the sensor's reach."""
    length, width, height = rng.uniform((12, 8, 3.5), (20, 14, 6))
    spacing, radius = rng.uniform(2.2, 3.6), rng.uniform(0.15, 0.4)
    rows = np.arange(-width / 2 + spacing / 2, width / 2, spacing)
    columns = np.arange(2.5, length, spacing)
    is_round = rng.random() < 0.6
    boxes = [] if is_round else [_standing(x, y, (2 * radius, 2 * radius, height)) for x in columns for y in rows]
    cylinders = [[x, y, 0.0, radius, height] for x in columns for y in rows] if is_round else []
    boxes += [
        _standing(rng.uniform(2, 8), rng.uniform(-width / 3, width / 3), (1.4, 0.5, 0.45), rng.uniform(0, np.pi))
        for _ in range(rng.integers(0, 4))
    ]
    room = [length / 2, 0, height / 2, length / 2, width / 2, height / 2]
    return Scene(
        _solids(boxes, [room], cylinders),
        _within((0.3, -width / 5, 1.3), (1.6, width / 5, 1.9)),
        _within((6, -width / 4, 0.2), (10, width / 4, 1.3)),
    )


KINDS: dict[str, Callable[[np.random.Generator], Scene]] = {
    "corridor": _corridor,
    "hall": _hall,
    "room": _room,
    "shelves": _shelves,
    "stairs": _stairs,
    "tabletop": _tabletop,
}
