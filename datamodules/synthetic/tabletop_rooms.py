"""Furnished rooms: objects of the catalogue arranged on a table, with the numbers of all that a prompt can name.

World axes: z up, metres, the table top at z = 0.
"""

from functools import cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from datamodules.synthetic.tabletop_objects import CATALOGUE, ObjectKind, Part, capped, part
from datamodules.synthetic.tabletop_shapes import box, tube, turn

TABLE_SIZE = (1.16, 0.92, 0.035)
FLOOR_Z = -0.72
ROOM_HALF_SIZE = 1.9
WALL_TOP_Z = 1.3


class World(NamedTuple):
    """A furnished room.

    Concepts are numbered parts first, then objects, then groups: row p is part p, ``concept_ids[p]`` are the rows of
    part p, of its object and of its object's group, i.e. what each of the three granularities calls a pixel of part p.

    Attributes:
        parts: All placed parts; those of the room shell come last.
        concept_ids: [parts, 3] rows of the part, its object and its group.
        prompts: Prompt of each concept. Two mugs share the prompt of their handles, never the row.
        num_movable: Parts before this belong to objects on the table; then come furniture and room shell.
        num_things: Parts before this are labelled things; from here on they are the room shell (floor, walls, ...).
    """

    parts: tuple[Part, ...]
    concept_ids: Int[np.ndarray, "parts 3"]
    prompts: tuple[str, ...]
    num_movable: int
    num_things: int

    @property
    def num_parts(self) -> int:
        """Number of placed parts."""
        return len(self.parts)


def _wooden_table() -> tuple[Part, ...]:
    length, width, height = TABLE_SIZE
    leg = (0.06, 0.06, -FLOOR_Z - height)
    corners = [(sx * (length / 2 - 0.06), sy * (width / 2 - 0.06)) for sx in (-1, 1) for sy in (-1, 1)]
    legs = [box(leg, (x, y, (FLOOR_Z - height) / 2)) for x, y in corners]
    return (
        part("table top", (0.66, 0.46, 0.28), box(TABLE_SIZE, (0, 0, -height / 2)), texture="wood", gloss=0.2),
        part("table leg", (0.5, 0.33, 0.2), *legs, texture="wood", gloss=0.2),
    )


def _stool() -> tuple[Part, ...]:
    corners = [(sx, sy) for sx in (-1, 1) for sy in (-1, 1)]
    legs = [tube([(0.09 * x, 0.09 * y, 0.42), (0.14 * x, 0.14 * y, 0.012)], 0.014) for x, y in corners]
    seat = capped([(0.16, 0.42), (0.175, 0.44), (0.165, 0.465)], 8)
    return (
        part("stool seat", (0.75, 0.25, 0.2), seat, gloss=0.2),
        part("stool leg", (0.74, 0.6, 0.42), *legs, texture="wood", gloss=0.1),
    )


def _room_shell() -> tuple[Part, ...]:
    """Floor, walls and what hangs on them."""
    half, thick = ROOM_HALF_SIZE, 0.1
    middle = (FLOOR_Z + WALL_TOP_Z) / 2
    wall = box((2 * half + 2 * thick, thick, WALL_TOP_Z - FLOOR_Z), (0, half + thick / 2, middle))
    walls = [wall.moved(turn("z", 90 * number), np.zeros(3)) for number in range(4)]
    pictures = [
        box((0.8, 0.03, 0.6), (x, half - 0.015, 0.28)).moved(turn("z", turn_deg), np.zeros(3))
        for turn_deg, x in ((0, -0.5), (180, 0.6))
    ]
    window = box((1.2, 0.03, 1.0), (0.1, half - 0.015, 0.5)).moved(turn("z", 90), np.zeros(3))
    floor = box((2 * half, 2 * half, 0.1), (0, 0, FLOOR_Z - 0.05))
    return (
        part("floor", (0.58, 0.47, 0.37), floor, texture="planks", gloss=0.1),
        part("wall", (0.8, 0.8, 0.74), *walls, gloss=0.0),
        part("picture", (0.35, 0.45, 0.58), *pictures, texture="painting", gloss=0.05),
        part("window", (0.8, 0.88, 0.95), window, texture="panes", gloss=0.1, glow=0.25),
    )


TABLE = ObjectKind("wooden table", "furniture", _wooden_table)
STOOL = ObjectKind("stool", "furniture", _stool)
ROOM = ObjectKind("room", "background", _room_shell)
ALL_KINDS = (*CATALOGUE, TABLE, STOOL, ROOM)


@cache
def families() -> tuple[tuple[str, str, str], ...]:
    """Returns (part prompt, object prompt, group prompt) of every part that any world may hold."""
    return tuple((one.prompt, kind.prompt, kind.group) for kind in ALL_KINDS for one in kind.build())


def all_prompts() -> tuple[str, ...]:
    """Returns every part, object and group prompt of the catalogue, also of objects absent from a given world."""
    return tuple(dict.fromkeys(prompt for family in families() for prompt in family))


def furnish(rng: np.random.Generator, objects_per_group: int) -> World:
    """Sets a table: ``objects_per_group`` random kinds of each of the four groups, group by group in its own quarter.

    Args:
        rng: Decides which kinds, where, how large (within a tenth) and which way round.
        objects_per_group: From 1 to 4, the size of the smallest group.
    """
    groups = list(dict.fromkeys(kind.group for kind in CATALOGUE))
    quarters = np.array([(1, 1), (1, -1), (-1, 1), (-1, -1)])[rng.permutation(4)] * [0.2, 0.15]
    chosen, footprints = [], []
    for group, quarter in zip(groups, quarters, strict=True):
        kinds = [kind for kind in CATALOGUE if kind.group == group]
        for index in rng.permutation(len(kinds))[:objects_per_group]:
            scale = rng.uniform(0.92, 1.08)
            parts = kinds[index].build()
            chosen.append((kinds[index], parts, scale, quarter))
            footprints.append(scale * _footprint(parts))
    positions = _spread(np.array([quarter for *_, quarter in chosen]), np.array(footprints), rng)
    placed = []
    for (kind, parts, scale, _), position in zip(chosen, positions, strict=True):
        rotation = turn("z", rng.uniform(0, 360))
        placed.append((kind, _move(parts, rotation, np.array([*position, 0.0]), scale)))
    num_movable = sum(len(parts) for _, parts in placed)
    angle = rng.uniform(0, 2 * np.pi)
    seat = np.array([1.15 * np.cos(angle), 1.15 * np.sin(angle), FLOOR_Z])
    placed.append((TABLE, TABLE.build()))
    placed.append((STOOL, _move(STOOL.build(), np.eye(3), seat, 1.0)))
    num_things = sum(len(parts) for _, parts in placed)
    placed.append((ROOM, ROOM.build()))
    return _number([(kind.prompt, kind.group, parts) for kind, parts in placed], num_movable, num_things)


def _move(parts: tuple[Part, ...], rotation: np.ndarray, origin: np.ndarray, scale: float) -> tuple[Part, ...]:
    return tuple(
        one._replace(solids=tuple(solid.moved(rotation, origin, scale) for solid in one.solids)) for one in parts
    )


def _footprint(parts: tuple[Part, ...]) -> float:
    """Returns the radius of the circle about the object's axis that it stands in, metres."""
    rng = np.random.default_rng(0)
    outlines = [solid.surface_points(0.01, rng).points for one in parts for solid in one.solids]
    return float(max(np.hypot(points[:, 0], points[:, 1]).max() for points in outlines))


def _spread(
    wishes: Float[np.ndarray, "objects 2"], radii: Float[np.ndarray, " objects"], rng: np.random.Generator
) -> Float[np.ndarray, "objects 2"]:
    """Places circles near their wished centres, apart from each other and on the table, by pushing overlaps apart."""
    gap, limit = 0.004, np.array(TABLE_SIZE[:2]) / 2 - 0.03
    centres = wishes + rng.normal(0, 0.06, wishes.shape)
    for _ in range(400):
        offset = centres[:, None] - centres[None]
        distance = np.linalg.norm(offset, axis=2) + 1e-9
        overlap = np.maximum(radii[:, None] + radii[None] + gap - distance, 0)
        np.fill_diagonal(overlap, 0)
        centres = (
            centres + 0.4 * (offset / distance[..., None] * overlap[..., None]).sum(1) - 0.004 * (centres - wishes)
        )
        centres = np.clip(centres, -limit + radii[:, None], limit - radii[:, None])
    return centres


def _number(objects: list[tuple[str, str, tuple[Part, ...]]], num_movable: int, num_things: int) -> World:
    """Numbers the concepts of (object prompt, group prompt, parts): parts, then objects, then groups."""
    groups = list(dict.fromkeys(group for _, group, _ in objects))
    parts = [one for *_, object_parts in objects for one in object_parts]
    concept_ids = [
        (0, len(parts) + object_id, len(parts) + len(objects) + groups.index(group))
        for object_id, (_, group, object_parts) in enumerate(objects)
        for _ in object_parts
    ]
    table = np.array(concept_ids)
    table[:, 0] = np.arange(len(parts))
    prompts = (*(one.prompt for one in parts), *(prompt for prompt, *_ in objects), *groups)
    return World(tuple(parts), table, prompts, num_movable, num_things)
