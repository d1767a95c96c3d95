"""The things of the tabletop world: a catalogue of objects made of named parts, and their arrangement in a room.

World axes: z up, metres, the table top at z = 0. Colours are sRGB, 0 to 1.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from datamodules.synthetic.tabletop_shapes import (
    Lathe,
    Solid,
    box,
    ellipsoid,
    lathe,
    shell,
    smooth_outline,
    tube,
    turn,
)

TABLE_SIZE = (1.16, 0.92, 0.035)
FLOOR_Z = -0.72
ROOM_HALF_SIZE = 1.9
WALL_TOP_Z = 1.3


class Material(NamedTuple):
    """How a part looks.

    Attributes:
        color: sRGB, 0 to 1.
        texture: Name of a pattern of ``tabletop_photos``.
        gloss: Strength of the highlight, 0 to 1.
        glow: Light the part gives off itself, 0 to 1 of white.
    """

    color: tuple[float, float, float]
    texture: str = "plain"
    gloss: float = 0.15
    glow: float = 0.0


class Part(NamedTuple):
    """One named part of one object: the solids that form it, all of one material."""

    prompt: str
    material: Material
    solids: tuple[Solid, ...]


class ObjectKind(NamedTuple):
    """An entry of the catalogue: its prompt, the group it belongs to, and what builds its parts, standing on z = 0."""

    prompt: str
    group: str
    build: Callable[[], tuple[Part, ...]]


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


def _disc(radius: float, low: float, high: float) -> Lathe:
    return lathe([(0, low), (radius, low), (radius, high), (0, high)])


def _ring(radius: float, thickness: float, z: float) -> Lathe:
    angle = np.linspace(0, 2 * np.pi, 12, endpoint=False)
    return lathe(np.stack([radius + thickness * np.cos(angle), z + thickness * np.sin(angle)], 1))


def _capped(points: list[tuple[float, float]], num_points: int = 14) -> Lathe:
    """A solid of revolution with a smooth outline from the axis or the foot up to the axis or the top."""
    outline = smooth_outline(points, num_points)
    ends = [(0.0, outline[-1, 1])] if outline[-1, 0] > 0 else []
    start = [(0.0, outline[0, 1])] if outline[0, 0] > 0 else []
    return lathe(np.concatenate([np.reshape(start, (-1, 2)), outline, np.reshape(ends, (-1, 2))]))


def _mug(color: tuple[float, float, float]) -> Callable[[], tuple[Part, ...]]:
    def build() -> tuple[Part, ...]:
        outline = np.array([(0, 0), (0.042, 0), (0.047, 0.006), (0.049, 0.05), (0.05, 0.112)])
        handle = [(0.046, 0, 0.092), (0.083, 0, 0.096), (0.096, 0, 0.06), (0.08, 0, 0.026), (0.046, 0, 0.03)]
        return (
            Part("mug body", Material(color, gloss=0.5), (lathe(shell(outline, 0.007)),)),
            Part("mug handle", Material(color, gloss=0.5), (tube(handle, 0.0095),)),
            Part("coffee", Material((0.24, 0.13, 0.07), gloss=0.2), (_disc(0.0435, 0.085, 0.092),)),
        )

    return build


def _teapot() -> tuple[Part, ...]:
    glaze = Material((0.86, 0.84, 0.76), gloss=0.6)
    body = _capped([(0.052, 0), (0.083, 0.03), (0.088, 0.065), (0.066, 0.108), (0.042, 0.12)])
    lid = _capped([(0.045, 0.119), (0.042, 0.128), (0.02, 0.14), (0, 0.144)], 8)
    spout = [(0.075, 0, 0.045), (0.115, 0, 0.058), (0.13, 0, 0.1), (0.155, 0, 0.125)]
    handle = [(-0.07, 0, 0.105), (-0.125, 0, 0.118), (-0.14, 0, 0.07), (-0.084, 0, 0.035)]
    return (
        Part("teapot body", glaze, (body,)),
        Part("teapot lid", Material((0.2, 0.42, 0.44), gloss=0.6), (lid, ellipsoid(0.014, (0, 0, 0.155)))),
        Part("teapot spout", glaze, (tube(spout, [0.024, 0.02, 0.014, 0.011]),)),
        Part("teapot handle", Material((0.2, 0.42, 0.44), gloss=0.5), (tube(handle, 0.011),)),
    )


def _soup_bowl() -> tuple[Part, ...]:
    outline = smooth_outline([(0, 0.0), (0.045, 0.0), (0.078, 0.03), (0.094, 0.068)], 10)
    return (
        Part("bowl side", Material((0.93, 0.93, 0.9), gloss=0.5), (lathe(shell(outline, 0.007)),)),
        Part("bowl rim", Material((0.12, 0.25, 0.5), gloss=0.5), (_ring(0.093, 0.0065, 0.068),)),
        Part("tomato soup", Material((0.82, 0.26, 0.08), gloss=0.5), (_disc(0.079, 0.042, 0.05),)),
    )


def _wine_bottle() -> tuple[Part, ...]:
    glass = _capped([(0.038, 0), (0.04, 0.02), (0.04, 0.13), (0.036, 0.155), (0.017, 0.185), (0.014, 0.225)], 18)
    return (
        Part("bottle glass", Material((0.08, 0.22, 0.12), gloss=0.9), (glass,)),
        Part("bottle label", Material((0.93, 0.88, 0.74), "stripes", 0.05), (_disc(0.0412, 0.045, 0.115),)),
        Part("bottle cork", Material((0.75, 0.55, 0.34), "speckle", 0.05), (_disc(0.0145, 0.22, 0.25),)),
    )


def _apple() -> tuple[Part, ...]:
    skin = _capped(
        [(0, 0.01), (0.024, 0), (0.052, 0.034), (0.054, 0.064), (0.034, 0.096), (0.014, 0.094), (0, 0.083)], 18
    )
    leaf = ellipsoid((0.034, 0.015, 0.003)).moved(turn("z", 40) @ turn("y", -25), np.array([0.022, 0.018, 0.118]))
    return (
        Part("apple skin", Material((0.75, 0.1, 0.09), "speckle", 0.45), (skin,)),
        Part("apple stem", Material((0.33, 0.22, 0.1)), (tube([(0, 0, 0.08), (0.002, 0, 0.105), (0.01, 0, 0.125)], 0.0042),)),
        Part("apple leaf", Material((0.2, 0.5, 0.13), gloss=0.3), (leaf,)),
    )  # fmt: skip


def _banana() -> tuple[Part, ...]:
    angle = np.radians(np.linspace(-58, 58, 7))
    arc = np.stack([0.125 * np.sin(angle), 0.125 * (1 - np.cos(angle)) - 0.03, np.full(7, 0.022)], 1)
    ends = np.stack([arc[0] + 0.18 * (arc[0] - arc[1]), arc[-1] + 0.3 * (arc[-1] - arc[-2])])
    tips = tuple(
        tube([inner + 0.02 * (outer - inner), outer], [0.0105, 0.0085])
        for inner, outer in zip(arc[[0, -1]], ends, strict=True)
    )
    peel = tube(arc, [0.011, 0.019, 0.0225, 0.0235, 0.0225, 0.019, 0.011], 14)
    return (
        Part("banana peel", Material((0.93, 0.78, 0.16), "speckle", 0.2), (peel,)),
        Part("banana tip", Material((0.36, 0.25, 0.1)), tips),
    )


def _pineapple() -> tuple[Part, ...]:
    leaves = []
    for turn_deg, lean in [(72 * k + 36 * (k // 5), 0.052 if k < 5 else 0.022) for k in range(10)]:
        c, s = np.cos(np.radians(turn_deg)), np.sin(np.radians(turn_deg))
        high = 0.23 - 1.0 * (lean - 0.022)
        nodes = [
            (0.012 * c, 0.012 * s, 0.12),
            (lean * 0.6 * c, lean * 0.6 * s, 0.17),
            (lean * 1.3 * c, lean * 1.3 * s, high),
        ]
        leaves.append(tube(nodes, [0.014, 0.011, 0.003], 6))  # fmt: skip
    return (
        Part("pineapple body", Material((0.76, 0.52, 0.15), "lattice", 0.15), (ellipsoid((0.052, 0.052, 0.068), (0, 0, 0.068)),)),
        Part("pineapple crown", Material((0.2, 0.45, 0.2), gloss=0.2), tuple(leaves)),
    )  # fmt: skip


def _halved_orange() -> tuple[Part, ...]:
    tilt = turn("y", 42)
    peel = _capped([(0, -0.056), (0.035, -0.045), (0.055, -0.012), (0.058, 0.0)], 10)
    return (
        Part("orange peel", Material((0.95, 0.5, 0.06), "speckle", 0.3), (peel.moved(tilt, np.array([0, 0, 0.056])),)),
        Part("orange pulp", Material((0.98, 0.72, 0.3), "sectors", 0.35), (_disc(0.051, -0.004, 0.003).moved(tilt, np.array([0, 0, 0.056])),)),
    )  # fmt: skip


def _rubber_duck() -> tuple[Part, ...]:
    yellow = Material((0.97, 0.8, 0.13), gloss=0.5)
    wings = tuple(
        ellipsoid((0.037, 0.012, 0.023)).moved(turn("z", -12 * side), np.array([-0.012, 0.05 * side, 0.052]))
        for side in (-1, 1)
    )
    return (
        Part("duck body", yellow, (ellipsoid((0.073, 0.054, 0.043), (0, 0, 0.042)), ellipsoid((0.026, 0.02, 0.017), (-0.068, 0, 0.066)))),
        Part("duck head", yellow, (ellipsoid(0.039, (0.042, 0, 0.107)),)),
        Part("duck beak", Material((0.93, 0.42, 0.08), gloss=0.4), (ellipsoid((0.026, 0.021, 0.008), (0.084, 0, 0.1)),)),
        Part("duck wing", Material((0.9, 0.66, 0.1), gloss=0.4), wings),
        Part("duck eye", Material((0.05, 0.05, 0.06), gloss=0.9), tuple(ellipsoid(0.007, (0.069, 0.022 * side, 0.121)) for side in (-1, 1))),
    )  # fmt: skip


def _toy_car() -> tuple[Part, ...]:
    paint = Material((0.1, 0.4, 0.72), gloss=0.7)
    wheels = tuple(
        _disc(0.026, -0.011, 0.011).moved(turn("x", 90), np.array([0.055 * fore, 0.045 * side, 0.026]))
        for fore in (-1, 1)
        for side in (-1, 1)
    )
    lights = tuple(ellipsoid((0.008, 0.013, 0.011), (0.095, 0.028 * side, 0.045)) for side in (-1, 1))
    return (
        Part("car body", paint, (box((0.19, 0.086, 0.038), (0, 0, 0.04)), box((0.1, 0.078, 0.008), (-0.014, 0, 0.104)))),
        Part("car windows", Material((0.62, 0.77, 0.83), gloss=0.9), (box((0.095, 0.074, 0.042), (-0.014, 0, 0.08)),)),
        Part("car wheel", Material((0.09, 0.09, 0.1), gloss=0.2), wheels),
        Part("car headlight", Material((0.98, 0.95, 0.7), gloss=0.6, glow=0.2), lights),
    )  # fmt: skip


def _teddy_bear() -> tuple[Part, ...]:
    fur, light_fur = Material((0.55, 0.34, 0.17), "fur", 0.02), Material((0.84, 0.68, 0.46), "fur", 0.02)
    sides = (-1, 1)
    arms = tuple(
        ellipsoid((0.021, 0.019, 0.042)).moved(turn("x", 38 * side), np.array([0.012, 0.058 * side, 0.085]))
        for side in sides
    )
    legs = tuple(
        ellipsoid((0.046, 0.024, 0.025)).moved(turn("z", 22 * side), np.array([0.058, 0.036 * side, 0.025]))
        for side in sides
    )
    return (
        Part("bear body", fur, (ellipsoid((0.045, 0.05, 0.06), (0, 0, 0.058)),)),
        Part("bear head", fur, (ellipsoid((0.043, 0.046, 0.043), (0.004, 0, 0.152)),)),
        Part("bear ear", light_fur, tuple(ellipsoid((0.012, 0.02, 0.02), (0, 0.037 * side, 0.19)) for side in sides)),
        Part("bear muzzle", light_fur, (ellipsoid((0.022, 0.024, 0.019), (0.04, 0, 0.142)),)),
        Part("bear nose", Material((0.08, 0.06, 0.06), gloss=0.5), (ellipsoid((0.006, 0.009, 0.006), (0.061, 0, 0.15)),)),
        Part("bear arm", fur, arms),
        Part("bear leg", light_fur, legs),
    )  # fmt: skip


def _stacking_rings() -> tuple[Part, ...]:
    return (
        Part("ring base", Material((0.78, 0.6, 0.38), "wood", 0.1), (_disc(0.062, 0, 0.016), _disc(0.01, 0.01, 0.14))),
        Part("red ring", Material((0.8, 0.13, 0.12), gloss=0.4), (_ring(0.04, 0.019, 0.034),)),
        Part("yellow ring", Material((0.95, 0.75, 0.12), gloss=0.4), (_ring(0.034, 0.018, 0.07),)),
        Part("green ring", Material((0.2, 0.6, 0.24), gloss=0.4), (_ring(0.028, 0.017, 0.104),)),
        Part("blue ball", Material((0.15, 0.32, 0.75), gloss=0.5), (ellipsoid(0.026, (0, 0, 0.145)),)),
    )


def _desk_lamp() -> tuple[Part, ...]:
    metal = Material((0.3, 0.31, 0.34), gloss=0.6)
    head = turn("y", -28)
    tip = np.array([0.062, 0, 0.262])
    shade = np.array([(0.022, 0.0), (0.03, -0.01), (0.07, -0.085)])[::-1]
    outline = np.concatenate([shade, shade[::-1] - [0.008, 0.003]])
    return (
        Part("lamp base", metal, (_capped([(0.066, 0), (0.066, 0.01), (0.05, 0.02), (0.012, 0.026)], 8),)),
        Part("lamp pole", metal, (tube([(0, 0, 0.02), (-0.035, 0, 0.13), (-0.02, 0, 0.24), (0.058, 0, 0.265)], 0.0085),)),
        Part("lamp shade", Material((0.84, 0.62, 0.2), gloss=0.4), (lathe(outline).moved(head, tip), _disc(0.0225, -0.006, 0.004).moved(head, tip))),
        Part("light bulb", Material((1.0, 0.96, 0.82), gloss=0.3, glow=0.65), (ellipsoid((0.026, 0.026, 0.032), (0, 0, -0.06)).moved(head, tip),)),
    )  # fmt: skip


def _cactus() -> tuple[Part, ...]:
    green = Material((0.22, 0.5, 0.26), "ribs", 0.1)
    pot = np.array([(0, 0), (0.042, 0), (0.056, 0.066), (0.063, 0.068), (0.064, 0.084)])
    arms = (
        tube([(0, 0.03, 0.135), (0, 0.062, 0.14), (0, 0.068, 0.185)], [0.014, 0.016, 0.015], 8),
        tube([(0, -0.03, 0.115), (0, -0.058, 0.12), (0, -0.062, 0.155)], [0.013, 0.015, 0.014], 8),
    )
    petals = tuple(
        ellipsoid((0.017, 0.009, 0.006)).moved(turn("z", 60 * k) @ turn("y", -30), np.array([0.014 * np.cos(k * np.pi / 3), 0.014 * np.sin(k * np.pi / 3), 0.228]))
        for k in range(6)
    )  # fmt: skip
    return (
        Part("flower pot", Material((0.72, 0.38, 0.25), "speckle", 0.08), (lathe(shell(pot, 0.008)),)),
        Part("soil", Material((0.22, 0.16, 0.12), "speckle", 0.0), (_disc(0.054, 0.06, 0.07),)),
        Part("cactus stem", green, (ellipsoid((0.035, 0.035, 0.088), (0, 0, 0.14)),)),
        Part("cactus arm", green, arms),
        Part("pink flower", Material((0.93, 0.4, 0.62), gloss=0.1), petals),
    )


def _book_stack() -> tuple[Part, ...]:
    covers, pages = [], []
    for z, turn_deg, size in ((0.0, 0, (0.2, 0.145, 0.042)), (0.042, 17, (0.175, 0.13, 0.034))):
        length, width, height = size
        place = (turn("z", turn_deg), np.array([0, 0, z]))
        boards = [box((length, width, 0.005), (0, 0, 0.0025)), box((length, width, 0.005), (0, 0, height - 0.0025))]
        spine = box((length, 0.006, height), (0, -width / 2 + 0.003, height / 2))
        covers.append(tuple(board.moved(*place) for board in (*boards, spine)))
        pages.append(box((length - 0.012, width - 0.012, height - 0.01), (0, 0, height / 2)).moved(*place))
    return (
        Part("red book cover", Material((0.62, 0.13, 0.16), gloss=0.15), covers[0]),
        Part("green book cover", Material((0.14, 0.42, 0.33), gloss=0.15), covers[1]),
        Part("book pages", Material((0.93, 0.9, 0.82), "pages", 0.02), tuple(pages)),
    )


def _candle() -> tuple[Part, ...]:
    holder = np.array([(0, 0), (0.058, 0), (0.062, 0.012), (0.062, 0.018)])
    flame = _capped([(0, 0.148), (0.011, 0.162), (0.008, 0.178), (0, 0.198)], 10)
    return (
        Part("candle holder", Material((0.72, 0.58, 0.28), gloss=0.8), (lathe(shell(holder, 0.006)), _ring(0.068, 0.009, 0.02))),
        Part("candle wax", Material((0.94, 0.9, 0.82), gloss=0.25), (_capped([(0.032, 0.004), (0.032, 0.13), (0.026, 0.138)], 10),)),
        Part("candle flame", Material((1.0, 0.72, 0.22), gloss=0.0, glow=0.7), (flame,)),
    )  # fmt: skip


def _alarm_clock() -> tuple[Part, ...]:
    stand = (turn("y", 90), np.array([0, 0, 0.075]))
    body = _capped([(0.052, -0.026), (0.06, -0.022), (0.061, 0.02), (0.057, 0.026)], 8)
    bells = tuple(
        _capped([(0.026, 0.0), (0.024, 0.012), (0.013, 0.022), (0, 0.025)], 8).moved(turn("x", -24 * side), np.array([0, 0.032 * side, 0.135]))
        for side in (-1, 1)
    )  # fmt: skip
    feet = tuple(tube([(0, 0.035 * side, 0.035), (0, 0.045 * side, 0.007)], 0.007) for side in (-1, 1))
    hand = box((0.003, 0.005, 0.034), (0.0285, 0, 0.09))
    return (
        Part("clock case", Material((0.17, 0.5, 0.52), gloss=0.6), (body.moved(*stand), *feet)),
        Part("clock face", Material((0.96, 0.95, 0.9), "dial", 0.3), (_disc(0.051, 0.02, 0.027).moved(*stand),)),
        Part("clock bell", Material((0.8, 0.65, 0.3), gloss=0.9), bells),
        Part("clock hand", Material((0.1, 0.1, 0.12)), (hand, hand.moved(turn("x", 110), np.array([0, 0.069, 0.1004])))),
    )  # fmt: skip


CATALOGUE = (
    ObjectKind("red mug", "tableware", _mug((0.76, 0.12, 0.12))),
    ObjectKind("blue mug", "tableware", _mug((0.16, 0.3, 0.65))),
    ObjectKind("teapot", "tableware", _teapot),
    ObjectKind("soup bowl", "tableware", _soup_bowl),
    ObjectKind("wine bottle", "tableware", _wine_bottle),
    ObjectKind("red apple", "fruit", _apple),
    ObjectKind("banana", "fruit", _banana),
    ObjectKind("pineapple", "fruit", _pineapple),
    ObjectKind("halved orange", "fruit", _halved_orange),
    ObjectKind("rubber duck", "toys", _rubber_duck),
    ObjectKind("toy car", "toys", _toy_car),
    ObjectKind("teddy bear", "toys", _teddy_bear),
    ObjectKind("stacking rings", "toys", _stacking_rings),
    ObjectKind("desk lamp", "home decor", _desk_lamp),
    ObjectKind("cactus", "home decor", _cactus),
    ObjectKind("book stack", "home decor", _book_stack),
    ObjectKind("candle", "home decor", _candle),
    ObjectKind("alarm clock", "home decor", _alarm_clock),
)


def _wooden_table() -> tuple[Part, ...]:
    wood = Material((0.66, 0.46, 0.28), "wood", 0.2)
    length, width, height = TABLE_SIZE
    legs = tuple(
        box(
            (0.06, 0.06, -FLOOR_Z - height), (sx * (length / 2 - 0.06), sy * (width / 2 - 0.06), (FLOOR_Z - height) / 2)
        )
        for sx in (-1, 1)
        for sy in (-1, 1)
    )
    return (
        Part("table top", wood, (box(TABLE_SIZE, (0, 0, -height / 2)),)),
        Part("table leg", wood._replace(color=(0.5, 0.33, 0.2)), legs),
    )


def _stool() -> tuple[Part, ...]:
    legs = tuple(
        tube([(0.09 * c, 0.09 * s, 0.42), (0.14 * c, 0.14 * s, 0.012)], 0.014)
        for c, s in ((1, 1), (1, -1), (-1, 1), (-1, -1))
    )
    return (
        Part("stool seat", Material((0.75, 0.25, 0.2), gloss=0.2), (_capped([(0.16, 0.42), (0.175, 0.44), (0.165, 0.465)], 8),)),
        Part("stool leg", Material((0.74, 0.6, 0.42), "wood", 0.1), legs),
    )  # fmt: skip


FURNITURE = (
    ObjectKind("wooden table", "furniture", _wooden_table),
    ObjectKind("stool", "furniture", _stool),
)


def _room_shell() -> tuple[Part, ...]:
    """Floor, walls and what hangs on them; far from the cameras, and never labelled: LERF-OVS labels things alone."""
    half, thick = ROOM_HALF_SIZE, 0.1
    height = WALL_TOP_Z - FLOOR_Z
    walls = tuple(
        box((2 * half + 2 * thick, thick, height), (0, half + thick / 2, (FLOOR_Z + WALL_TOP_Z) / 2)).moved(
            turn("z", 90 * k), np.zeros(3)
        )
        for k in range(4)
    )
    pictures = tuple(
        box((0.8, 0.03, 0.6), (x, half - 0.015, 0.28)).moved(turn("z", 90 * k), np.zeros(3))
        for k, x in ((0, -0.5), (2, 0.6))
    )
    windows = tuple(box((1.2, 0.03, 1.0), (0.1, half - 0.015, 0.5)).moved(turn("z", 90), np.zeros(3)) for _ in range(1))
    return (
        Part("floor", Material((0.58, 0.47, 0.37), "planks", 0.1), (box((2 * half, 2 * half, 0.1), (0, 0, FLOOR_Z - 0.05)),)),
        Part("wall", Material((0.8, 0.8, 0.74), gloss=0.0), walls),
        Part("picture", Material((0.35, 0.45, 0.58), "painting", 0.05), pictures),
        Part("window", Material((0.8, 0.88, 0.95), "panes", 0.1, glow=0.25), windows),
    )  # fmt: skip


ROOM = ObjectKind("room", "background", _room_shell)


def all_prompts() -> tuple[str, ...]:
    """Returns every part, object and group prompt of the catalogue, also of objects absent from a given world."""
    prompts: dict[str, None] = {}
    for kind in (*CATALOGUE, *FURNITURE, ROOM):
        prompts.update(dict.fromkeys([*(part.prompt for part in kind.build()), kind.prompt, kind.group]))
    return tuple(prompts)


def families() -> Iterator[tuple[str, str, str]]:
    """Yields (part prompt, object prompt, group prompt) of every part in the catalogue."""
    for kind in (*CATALOGUE, *FURNITURE, ROOM):
        for part in kind.build():
            yield part.prompt, kind.prompt, kind.group


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
    placed.append((FURNITURE[0], FURNITURE[0].build()))
    placed.append((FURNITURE[1], _move(FURNITURE[1].build(), np.eye(3), seat, 1.0)))
    num_things = sum(len(parts) for _, parts in placed)
    placed.append((ROOM, ROOM.build()))
    return _number([(kind.prompt, kind.group, parts) for kind, parts in placed], num_movable, num_things)


def _move(parts: tuple[Part, ...], rotation: np.ndarray, origin: np.ndarray, scale: float) -> tuple[Part, ...]:
    return tuple(
        part._replace(solids=tuple(solid.moved(rotation, origin, scale) for solid in part.solids)) for part in parts
    )


def _footprint(parts: tuple[Part, ...]) -> float:
    """Returns the radius of the circle about the object's axis that it stands in, metres."""
    rng = np.random.default_rng(0)
    outlines = [solid.surface_points(0.01, rng).points for part in parts for solid in part.solids]
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
    parts = [part for *_, object_parts in objects for part in object_parts]
    concept_ids = [
        (0, len(parts) + object_id, len(parts) + len(objects) + groups.index(group))
        for object_id, (_, group, object_parts) in enumerate(objects)
        for _ in object_parts
    ]
    table = np.array(concept_ids)
    table[:, 0] = np.arange(len(parts))
    prompts = (*(part.prompt for part in parts), *(prompt for prompt, *_ in objects), *groups)
    return World(tuple(parts), table, prompts, num_movable, num_things)
