"""Furniture and fittings of synthetic rooms, of ScanNet's categories, no two alike."""

import itertools
from collections.abc import Callable

import numpy as np

from datamodules.synthetic.mini_scannet_shapes import Colour, Material, Part, Thing, box, cylinder, hanging_cloth

WOODS: tuple[Colour, ...] = ((0.45, 0.29, 0.16), (0.62, 0.44, 0.27), (0.30, 0.19, 0.12), (0.72, 0.58, 0.42))
PAINTS: tuple[Colour, ...] = ((0.86, 0.86, 0.84), (0.75, 0.75, 0.73), (0.25, 0.25, 0.27), (0.70, 0.66, 0.58))
FABRICS: tuple[Colour, ...] = (
    (0.24, 0.27, 0.36),
    (0.45, 0.43, 0.40),
    (0.52, 0.22, 0.19),
    (0.28, 0.38, 0.30),
    (0.66, 0.60, 0.50),
    (0.16, 0.16, 0.18),
    (0.40, 0.31, 0.45),
)
CERAMIC: Colour = (0.90, 0.90, 0.88)
STEEL: Colour = (0.66, 0.67, 0.69)


# What they are made of


def _wood(rng: np.random.Generator) -> Material:
    return Material(_near(WOODS, rng), "wood", rng.uniform(0, 9))


def _paint(rng: np.random.Generator) -> Material:
    return Material(_near(PAINTS, rng), "plain", rng.uniform(0, 9))


def _fabric(rng: np.random.Generator) -> Material:
    return Material(_near(FABRICS, rng), "fabric", rng.uniform(0, 9))


def _wood_or_paint(rng: np.random.Generator) -> Material:
    return _wood(rng) if rng.random() < 0.6 else _paint(rng)


def _near(palette: tuple[Colour, ...], rng: np.random.Generator) -> Colour:
    red, green, blue = np.clip(np.array(palette[rng.integers(len(palette))]) + rng.normal(0, 0.04, 3), 0.05, 0.95)
    return float(red), float(green), float(blue)


def _legs(width: float, near: float, far: float, top: float, size: float, material: Material) -> list[Part]:
    return [
        box([x - size / 2, y, 0], [x + size / 2, y + size, top], material)
        for x in (-width / 2 + size / 2, width / 2 - size / 2)
        for y in (near, far - size)
    ]


# Seats and beds


def chair(rng: np.random.Generator) -> Thing:
    """A chair with four legs and a back that leans."""
    width, deep, seat, back = rng.uniform((0.38, 0.38, 0.42, 0.78), (0.50, 0.50, 0.48, 1.0))
    frame, cushion = _wood_or_paint(rng), _fabric(rng) if rng.random() < 0.5 else _wood(rng)
    parts = _legs(width, 0.02, deep, seat, 0.04, frame)
    parts.append(box([-width / 2, 0, seat - 0.04], [width / 2, deep, seat], cushion))
    parts.append(box([-width / 2, 0.02, seat], [width / 2, 0.06, back], cushion, tilt=rng.uniform(0.02, 0.2)))
    return Thing("chair", tuple(parts))


def office_chair(rng: np.random.Generator) -> Thing:
    """A swivel chair: a star of feet, a pole, a padded seat and back, armrests."""
    width, deep, seat, back = rng.uniform((0.46, 0.46, 0.44, 0.9), (0.56, 0.54, 0.54, 1.15))
    metal, cushion = Material((0.12, 0.12, 0.13)), _fabric(rng)
    middle = deep / 2
    parts = [
        box([-width / 2, middle - 0.03, 0.04], [width / 2, middle + 0.03, 0.1], metal),
        box([-0.03, 0, 0.04], [0.03, deep, 0.1], metal),
        cylinder(0, middle, 0.1, seat, 0.035, metal),
        box([-width / 2, 0.03, seat - 0.04], [width / 2, deep, seat + 0.04], cushion),
        box([-width / 2, 0, seat + 0.12], [width / 2, 0.07, back], cushion, tilt=0.12),
    ]
    for side in (-1, 1):
        x = side * width / 2
        parts.append(box([x - 0.03, 0.1, seat + 0.18], [x + 0.03, deep - 0.1, seat + 0.22], metal))
    return Thing("office chair", tuple(parts))


def armchair(rng: np.random.Generator) -> Thing:
    """A padded chair with arms, of a sofa's make."""
    return _padded("armchair", rng.uniform(0.7, 0.9), 1, rng)


def sofa(rng: np.random.Generator) -> Thing:
    """A sofa for two or three."""
    seats = int(rng.integers(2, 4))
    return _padded("couch", seats * rng.uniform(0.6, 0.72) + 0.3, seats, rng)


def _padded(category: str, width: float, seats: int, rng: np.random.Generator) -> Thing:
    deep, seat, back, arm = rng.uniform((0.78, 0.38, 0.72, 0.54), (0.95, 0.46, 0.92, 0.66))
    cloth, cushion = _fabric(rng), _fabric(rng) if rng.random() < 0.3 else None
    side, rear = rng.uniform(0.12, 0.2), rng.uniform(0.18, 0.26)
    parts = [
        box([-width / 2, 0, 0.06], [width / 2, deep, seat - 0.12], cloth),
        box([-width / 2, 0, 0.06], [width / 2, rear, back], cloth, tilt=0.05),
    ]
    parts += [box([x, 0, 0.06], [x + side, deep, arm], cloth) for x in (-width / 2, width / 2 - side)]
    inner = (width - 2 * side) / seats
    for number in range(seats):
        x = -width / 2 + side + number * inner
        parts.append(box([x + 0.01, rear, seat - 0.12], [x + inner - 0.01, deep + 0.02, seat], cushion or cloth))
    return Thing(category, tuple(parts))


def bed(rng: np.random.Generator) -> Thing:
    """A bed with a board at its head, a mattress, a cover."""
    width, length, top, head = rng.uniform((0.95, 1.9, 0.42, 0.75), (1.7, 2.1, 0.62, 1.2))
    frame, cover, sheet = _wood_or_paint(rng), _fabric(rng), Material((0.85, 0.84, 0.82), "fabric")
    return Thing(
        "bed",
        (
            box([-width / 2, 0, 0], [width / 2, 0.07, head], frame),
            box([-width / 2, 0.07, 0.1], [width / 2, length, top - 0.2], frame),
            box([-width / 2 + 0.02, 0.07, top - 0.2], [width / 2 - 0.02, length - 0.02, top - 0.02], sheet),
            box([-width / 2, 0.6, top - 0.22], [width / 2, length, top], cover),
        ),
    )


def pillow(rng: np.random.Generator) -> Thing:
    """A pillow."""
    width, deep, thick = rng.uniform((0.45, 0.3, 0.1), (0.7, 0.42, 0.16))
    return Thing("pillow", (box([-width / 2, 0, 0], [width / 2, deep, thick], _fabric(rng)),))


# Surfaces


def table(rng: np.random.Generator) -> Thing:
    """A table to sit at: four legs, or one foot."""
    width, deep, top = rng.uniform((1.0, 0.75, 0.7), (1.7, 1.0, 0.78))
    return Thing("table", tuple(_table_parts(width, deep, top, rng)))


def coffee_table(rng: np.random.Generator) -> Thing:
    """A low table."""
    width, deep, top = rng.uniform((0.8, 0.5, 0.34), (1.2, 0.7, 0.48))
    return Thing("coffee table", tuple(_table_parts(width, deep, top, rng)))


def _table_parts(width: float, deep: float, top: float, rng: np.random.Generator) -> list[Part]:
    material = _wood_or_paint(rng)
    if rng.random() < 0.25:
        return [
            cylinder(0, deep / 2, top - 0.04, top, deep / 2, material),
            cylinder(0, deep / 2, 0.03, top - 0.04, 0.05, material),
            cylinder(0, deep / 2, 0, 0.03, deep / 4, material),
        ]
    board = box([-width / 2, 0, top - 0.04], [width / 2, deep, top], material)
    return [board, *_legs(width - 0.06, 0.03, deep - 0.03, top - 0.04, 0.06, material)]


def desk(rng: np.random.Generator) -> Thing:
    """A desk: a board, a back panel, drawers on one side and a panel on the other."""
    width, deep, top = rng.uniform((1.1, 0.58, 0.70), (1.6, 0.76, 0.78))
    material, side = _wood_or_paint(rng), rng.choice([-1, 1])
    inner = side * (width / 2 - rng.uniform(0.36, 0.45))
    low, high = sorted((inner, side * width / 2))
    other = -side * width / 2
    parts = [
        box([-width / 2, 0, top - 0.035], [width / 2, deep, top], material),
        box([low, 0.05, 0.04], [high, deep - 0.04, top - 0.035], material),
        box([min(other, other + side * 0.03), 0.03, 0], [max(other, other + side * 0.03), deep - 0.03, top], material),
        box([-width / 2, 0.08, 0.3], [width / 2, 0.1, top - 0.035], material),
    ]
    handle = Material(STEEL)
    for height in np.linspace(0.15, top - 0.15, 3):
        middle = (low + high) / 2
        parts.append(box([middle - 0.06, deep - 0.04, height], [middle + 0.06, deep - 0.02, height + 0.02], handle))
    return Thing("desk", tuple(parts))


def counter(rng: np.random.Generator) -> Thing:
    """A kitchen counter: cupboards below a board, with a hole for a sink on one side."""
    width, deep, top = rng.uniform((1.8, 0.58, 0.86), (2.6, 0.68, 0.95))
    front, board = _wood_or_paint(rng), Material(_near(PAINTS, rng), "tiles")
    parts = [
        box([-width / 2, 0, 0.08], [width / 2, deep - 0.03, top - 0.2], front),
        box([-width / 2, 0, top - 0.2], [-0.02, deep - 0.03, top - 0.04], front),
        box([-width / 2, 0, top - 0.04], [-0.02, deep, top], board),
        box([width / 2 - 0.1, 0, top - 0.2], [width / 2, deep, top], board),
        box([-0.02, 0, top - 0.2], [width / 2, 0.1, top], board),
        box([-0.02, deep - 0.1, top - 0.2], [width / 2, deep, top], board),
    ]
    parts += _doors(-width / 2, width / 2, deep - 0.03, 0.12, top - 0.24, front)
    return Thing("counter", tuple(parts))


def sink_of(basin: Thing) -> Thing:
    """Returns the sink that fills the hole of a counter: a steel bowl with a rim and a tap."""
    low, high = basin.parts[5].quads.reshape(-1, 3).min(0), basin.parts[5].quads.reshape(-1, 3).max(0)
    left, right, front, top = low[0] + 0.02, high[0] - 0.1, low[1], high[2]
    steel = Material(STEEL)
    parts = (
        box([left, 0.1, top - 0.17], [right, front, top - 0.16], steel),
        *_rim(left, right, 0.1, front, top - 0.17, top + 0.01, 0.02, steel),
        cylinder((left + right) / 2, 0.07, top, top + 0.25, 0.015, steel),
        box([(left + right) / 2 - 0.015, 0.07, top + 0.22], [(left + right) / 2 + 0.015, 0.25, top + 0.25], steel),
    )
    return Thing("sink", parts)


# Storage


def _doors(left: float, right: float, front: float, low: float, high: float, material: Material) -> list[Part]:
    """Returns panels and handles of cupboard doors on a front."""
    count = max(round((right - left) / 0.5), 1)
    edges = np.linspace(left, right, count + 1)
    darker = material._replace(colour=tuple(0.88 * value for value in material.colour))  # type: ignore[arg-type]
    parts = []
    for start, stop in itertools.pairwise(edges):
        parts.append(box([start + 0.015, front, low], [stop - 0.015, front + 0.02, high], darker))
        parts.append(
            box(
                [stop - 0.07, front + 0.02, (low + high) / 2],
                [stop - 0.05, front + 0.04, (low + high) / 2 + 0.12],
                Material(STEEL),
            )
        )
    return parts


def cabinet(rng: np.random.Generator) -> Thing:
    """A closed cabinet, low as a sideboard to high as a wardrobe."""
    width, deep, tall = rng.uniform((0.6, 0.38, 0.75), (1.3, 0.6, 2.0))
    material = _wood_or_paint(rng)
    body = box([-width / 2, 0, 0], [width / 2, deep - 0.02, tall], material)
    return Thing("cabinet", (body, *_doors(-width / 2, width / 2, deep - 0.02, 0.06, tall - 0.04, material)))


def kitchen_cabinet(rng: np.random.Generator) -> Thing:
    """Cupboards to hang on a wall."""
    width, deep, tall = rng.uniform((1.0, 0.3, 0.55), (2.0, 0.38, 0.75))
    material = _wood_or_paint(rng)
    body = box([-width / 2, 0, 0], [width / 2, deep - 0.02, tall], material)
    return Thing("kitchen cabinet", (body, *_doors(-width / 2, width / 2, deep - 0.02, 0.02, tall - 0.02, material)))


def bookshelf(rng: np.random.Generator) -> Thing:
    """Open shelves with rows of books, some gaps."""
    width, deep, tall = rng.uniform((0.7, 0.24, 1.2), (1.3, 0.34, 2.1))
    material = _wood_or_paint(rng)
    boards = np.linspace(0.05, tall, int(rng.integers(4, 7)))
    parts = [box([-width / 2, 0, 0], [width / 2, 0.015, tall], material)]
    parts += [box([x, 0, 0], [x + 0.025, deep, tall], material) for x in (-width / 2, width / 2 - 0.025)]
    parts += [box([-width / 2, 0, z - 0.025], [width / 2, deep, z], material) for z in boards]
    for low, high in itertools.pairwise(boards):
        start = -width / 2 + 0.03
        while start < width / 2 - 0.15:
            stop = min(start + rng.uniform(0.2, 0.6), width / 2 - 0.03)
            tops = low + rng.uniform(0.6, 0.9) * (high - low)
            books = Material(_near(FABRICS, rng), "books", rng.uniform(0, 9))
            parts.append(box([start, 0.03, low], [stop, deep * rng.uniform(0.6, 0.9), tops], books))
            start = stop + rng.exponential(0.12)
    return Thing("bookshelf", tuple(parts))


def refrigerator(rng: np.random.Generator) -> Thing:
    """A refrigerator with a freezer door above or below."""
    width, deep, tall = rng.uniform((0.58, 0.58, 1.5), (0.85, 0.72, 1.85))
    material = Material(CERAMIC if rng.random() < 0.5 else STEEL, "plain")
    split, handle = tall * rng.choice([0.35, 0.68]), Material((0.3, 0.3, 0.32))
    parts = [box([-width / 2, 0, 0.02], [width / 2, deep - 0.05, tall], material)]
    for low, high in ((0.05, split), (split + 0.02, tall)):
        parts.append(box([-width / 2, deep - 0.045, low], [width / 2, deep, high], material))
        parts.append(box([width / 2 - 0.08, deep, low + 0.1], [width / 2 - 0.05, deep + 0.04, high - 0.1], handle))
    return Thing("refrigerator", tuple(parts))


def nightstand(rng: np.random.Generator) -> Thing:
    """A small chest beside a bed."""
    width, deep, tall = rng.uniform((0.38, 0.35, 0.45), (0.55, 0.45, 0.65))
    material = _wood_or_paint(rng)
    body = box([-width / 2, 0, 0], [width / 2, deep - 0.02, tall], material)
    return Thing("nightstand", (body, *_doors(-width / 2, width / 2, deep - 0.02, 0.06, tall - 0.04, material)))


def tv_stand(rng: np.random.Generator) -> Thing:
    """A low stand with a gap for devices."""
    width, deep, tall = rng.uniform((1.1, 0.35, 0.42), (1.7, 0.45, 0.6))
    material = _wood_or_paint(rng)
    parts = [box([-width / 2, 0, z], [width / 2, deep, z + 0.04], material) for z in (0.06, tall - 0.04)]
    parts += [box([x - 0.02, 0, 0], [x + 0.02, deep, tall], material) for x in (-width / 2 + 0.02, 0, width / 2 - 0.02)]
    return Thing("tv stand", (*parts, box([-width / 2, 0, 0.06], [width / 2, 0.02, tall], material)))


# Fittings


def door(rng: np.random.Generator) -> Thing:
    """A door in its frame, shut; stands out from the wall by a few centimetres."""
    width, tall = rng.uniform((0.8, 1.98), (0.98, 2.12))
    leaf, frame = _wood_or_paint(rng), _paint(rng)
    panel = leaf._replace(colour=tuple(0.9 * value for value in leaf.colour))  # type: ignore[arg-type]
    parts = [
        box([-width / 2, 0, 0], [width / 2, 0.03, tall], leaf),
        box([-width / 2 - 0.08, 0, 0], [-width / 2, 0.05, tall + 0.08], frame),
        box([width / 2, 0, 0], [width / 2 + 0.08, 0.05, tall + 0.08], frame),
        box([-width / 2, 0, tall], [width / 2, 0.05, tall + 0.08], frame),
        box([width / 2 - 0.14, 0.03, 0.98], [width / 2 - 0.04, 0.08, 1.02], Material(STEEL)),
    ]
    for low, high in ((0.15, 0.9), (1.15, tall - 0.15)):
        parts.append(box([-width / 2 + 0.12, 0.03, low], [width / 2 - 0.12, 0.036, high], panel))
    return Thing("door", tuple(parts))


def window(rng: np.random.Generator) -> Thing:
    """A window: bright glass behind a frame with a bar."""
    width, tall = rng.uniform((0.8, 0.9), (1.7, 1.35))
    frame, glass = _paint(rng), Material((0.78, 0.86, 0.95), "glass", rng.uniform(0, 9))
    parts = [box([-width / 2, 0, 0], [width / 2, 0.01, tall], glass), *_frame(width, tall, 0.06, 0.05, frame)]
    parts.append(box([-0.025, 0, 0], [0.025, 0.04, tall], frame))
    parts.append(box([-width / 2 - 0.05, 0, -0.05], [width / 2 + 0.05, 0.14, 0], frame))
    return Thing("window", tuple(parts))


def picture(rng: np.random.Generator) -> Thing:
    """A framed picture."""
    width, tall = rng.uniform((0.45, 0.4), (1.0, 0.8))
    content = Material(_near(FABRICS, rng), "picture", rng.uniform(0, 99))
    frame = _wood_or_paint(rng)
    return Thing(
        "picture", (box([-width / 2, 0, 0], [width / 2, 0.02, tall], content), *_frame(width, tall, 0.03, 0.03, frame))
    )


def whiteboard(rng: np.random.Generator) -> Thing:
    """A whiteboard."""
    width, tall = rng.uniform((1.0, 0.8), (1.8, 1.1))
    board = box([-width / 2, 0, 0], [width / 2, 0.02, tall], Material((0.93, 0.93, 0.93)))
    return Thing("whiteboard", (board, *_frame(width, tall, 0.02, 0.03, Material(STEEL))))


def _frame(width: float, tall: float, wide: float, deep: float, material: Material) -> list[Part]:
    return [
        box([-width / 2 - wide, 0, -wide], [-width / 2, deep, tall + wide], material),
        box([width / 2, 0, -wide], [width / 2 + wide, deep, tall + wide], material),
        box([-width / 2, 0, tall], [width / 2, deep, tall + wide], material),
        box([-width / 2, 0, -wide], [width / 2, deep, 0], material),
    ]


def curtain(rng: np.random.Generator) -> Thing:
    """A curtain from a rod to near the floor."""
    width, tall = rng.uniform((0.5, 1.7), (1.0, 2.1))
    cloth = hanging_cloth([-width / 2, 0.08, 0.0], width, tall, int(rng.integers(4, 8)), _fabric(rng))
    rod = box([-width / 2, 0.06, tall], [width / 2, 0.09, tall + 0.03], Material(STEEL))
    return Thing("curtain", (cloth, rod))


def shower_curtain(rng: np.random.Generator) -> Thing:
    """A curtain to hang over the edge of a bathtub."""
    width, tall = rng.uniform((0.7, 1.4), (1.1, 1.7))
    cloth = hanging_cloth([-width / 2, 0.0, 0.0], width, tall, int(rng.integers(5, 9)), _fabric(rng))
    rod = box([-width / 2, -0.015, tall], [width / 2, 0.015, tall + 0.03], Material(STEEL))
    return Thing("shower curtain", (cloth, rod))


# Bathroom


def toilet(rng: np.random.Generator) -> Thing:
    """A toilet with its tank."""
    width, deep, seat, tank = rng.uniform((0.36, 0.62, 0.38, 0.72), (0.42, 0.72, 0.44, 0.85))
    white = Material(CERAMIC)
    return Thing(
        "toilet",
        (
            box([-width / 2, 0, seat - 0.05], [width / 2, 0.2, tank], white),
            cylinder(0, deep - width / 2, 0, seat, 0.6 * width / 2, white, flare=1.6),
            box([-width / 2, 0.15, seat - 0.1], [width / 2, deep - width / 2, seat], white),
            cylinder(0, deep - width / 2, seat, seat + 0.03, width / 2, white),
        ),
    )


def washbasin(rng: np.random.Generator) -> Thing:
    """A washbasin on a pedestal, with a tap."""
    width, deep, top = rng.uniform((0.5, 0.4, 0.8), (0.75, 0.5, 0.9))
    white, steel = Material(CERAMIC), Material(STEEL)
    return Thing(
        "sink",
        (
            cylinder(0, deep / 2, 0, top - 0.16, 0.09, white),
            box([-width / 2, 0, top - 0.16], [width / 2, deep, top - 0.12], white),
            *_rim(-width / 2, width / 2, 0, deep, top - 0.16, top, 0.05, white),
            cylinder(0, 0.06, top, top + 0.15, 0.02, steel),
            box([-0.02, 0.05, top + 0.12], [0.02, 0.2, top + 0.15], steel),
        ),
    )


def bathtub(rng: np.random.Generator) -> Thing:
    """A bathtub, open above."""
    width, deep, top = rng.uniform((1.45, 0.68, 0.48), (1.75, 0.8, 0.6))
    white = Material(CERAMIC)
    return Thing(
        "bathtub",
        (
            box([-width / 2, 0, 0.1], [width / 2, deep, 0.14], white),
            *_rim(-width / 2, width / 2, 0, deep, 0, top, 0.07, white),
        ),
    )


def _rim(
    left: float, right: float, back: float, front: float, low: float, high: float, thick: float, material: Material
) -> list[Part]:
    """Returns four walls around a basin."""
    return [
        box([left, back, low], [left + thick, front, high], material),
        box([right - thick, back, low], [right, front, high], material),
        box([left, back, low], [right, back + thick, high], material),
        box([left, front - thick, low], [right, front, high], material),
    ]


# Small things


def trash_can(rng: np.random.Generator) -> Thing:
    """A trash can."""
    radius, tall = rng.uniform((0.12, 0.28), (0.18, 0.5))
    return Thing("trash can", (cylinder(0, radius, 0, tall, 0.85 * radius, _paint(rng), flare=1.15),))


def lamp(rng: np.random.Generator) -> Thing:
    """A standing lamp."""
    tall, metal = rng.uniform(1.3, 1.7), Material((0.2, 0.2, 0.2))
    parts = (
        cylinder(0, 0.16, 0, 0.03, 0.14, metal),
        cylinder(0, 0.16, 0.03, tall, 0.015, metal),
        cylinder(0, 0.16, tall - 0.12, tall + 0.14, 0.17, Material((0.93, 0.87, 0.72)), flare=0.7),
    )
    return Thing("lamp", parts)


def monitor(rng: np.random.Generator) -> Thing:
    """A screen on its foot."""
    width, tall = rng.uniform((0.45, 0.3), (0.62, 0.38))
    black = Material((0.07, 0.07, 0.08))
    screen = box([-width / 2, 0.08, 0.1], [width / 2, 0.11, 0.1 + tall], black)
    return Thing(
        "monitor",
        (screen, box([-0.1, 0.02, 0], [0.1, 0.18, 0.02], black), box([-0.02, 0.07, 0], [0.02, 0.09, 0.2], black)),
    )


def cardboard_box(rng: np.random.Generator) -> Thing:
    """A cardboard box."""
    width, deep, tall = rng.uniform((0.3, 0.25, 0.2), (0.55, 0.4, 0.45))
    return Thing("box", (box([-width / 2, 0, 0], [width / 2, deep, tall], Material((0.6, 0.47, 0.32), "fabric")),))


FURNITURE: dict[str, Callable[[np.random.Generator], Thing]] = {
    maker.__name__: maker
    for maker in (
        chair, office_chair, armchair, sofa, bed, pillow, table, coffee_table, desk, counter, cabinet, kitchen_cabinet,
        bookshelf, refrigerator, nightstand, tv_stand, door, window, picture, whiteboard, curtain, shower_curtain,
        toilet, washbasin, bathtub, trash_can, lamp, monitor, cardboard_box,
    )
}  # fmt: skip
