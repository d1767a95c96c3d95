"""The catalogue of the tabletop world: everyday objects made of named parts.

Each object stands on z = 0 about the vertical axis; metres. Colours are sRGB, 0 to 1.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

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

Color = tuple[float, float, float]
SIDES = (-1, 1)


class Material(NamedTuple):
    """How a part looks.

    Attributes:
        color: sRGB, 0 to 1.
        texture: Name of a pattern of ``tabletop_photos``.
        gloss: Strength of the highlight, 0 to 1.
        glow: Light the part gives off itself, 0 to 1 of white.
    """

    color: Color
    texture: str
    gloss: float
    glow: float


class Part(NamedTuple):
    """One named part of one object: the solids that form it, all of one material."""

    prompt: str
    material: Material
    solids: tuple[Solid, ...]


class ObjectKind(NamedTuple):
    """An entry of the catalogue: its prompt, the group it belongs to, and what builds its parts."""

    prompt: str
    group: str
    build: Callable[[], tuple[Part, ...]]


def part(
    prompt: str, color: Color, *solids: Solid, texture: str = "plain", gloss: float = 0.15, glow: float = 0.0
) -> Part:
    """Returns a part made of ``solids``."""
    return Part(prompt, Material(color, texture, gloss, glow), solids)


def disc(radius: float, low: float, high: float) -> Lathe:
    """Returns an upright cylinder between two heights."""
    return lathe([(0, low), (radius, low), (radius, high), (0, high)])


def capped(points: list[tuple[float, float]], num_points: int = 14) -> Lathe:
    """Returns a solid of revolution with a smooth outline (radius, z), closed towards the axis at both ends."""
    outline = smooth_outline(points, num_points)
    return lathe(np.concatenate([[(0, outline[0, 1])], outline, [(0, outline[-1, 1])]]))


def _ring(radius: float, thickness: float, z: float) -> Lathe:
    angle = np.linspace(0, 2 * np.pi, 12, endpoint=False)
    return lathe(np.stack([radius + thickness * np.cos(angle), z + thickness * np.sin(angle)], 1))


def _mug(color: Color) -> tuple[Part, ...]:
    outline = np.array([(0, 0), (0.042, 0), (0.047, 0.006), (0.049, 0.05), (0.05, 0.112)])
    handle = [(0.046, 0, 0.092), (0.083, 0, 0.096), (0.096, 0, 0.06), (0.08, 0, 0.026), (0.046, 0, 0.03)]
    return (
        part("mug body", color, lathe(shell(outline, 0.007)), gloss=0.5),
        part("mug handle", color, tube(handle, 0.0095), gloss=0.5),
        part("coffee", (0.24, 0.13, 0.07), disc(0.0435, 0.085, 0.092), gloss=0.06),
    )


def _red_mug() -> tuple[Part, ...]:
    return _mug((0.76, 0.12, 0.12))


def _blue_mug() -> tuple[Part, ...]:
    return _mug((0.16, 0.3, 0.65))


def _teapot() -> tuple[Part, ...]:
    white, teal = (0.86, 0.84, 0.76), (0.2, 0.42, 0.44)
    body = capped([(0.052, 0), (0.083, 0.03), (0.088, 0.065), (0.066, 0.108), (0.042, 0.12)])
    lid = capped([(0.045, 0.119), (0.042, 0.128), (0.02, 0.14), (0, 0.144)], 8)
    spout = [(0.075, 0, 0.045), (0.115, 0, 0.058), (0.13, 0, 0.1), (0.155, 0, 0.125)]
    handle = [(-0.07, 0, 0.105), (-0.125, 0, 0.118), (-0.14, 0, 0.07), (-0.084, 0, 0.035)]
    return (
        part("teapot body", white, body, gloss=0.6),
        part("teapot lid", teal, lid, ellipsoid(0.014, (0, 0, 0.155)), gloss=0.6),
        part("teapot spout", white, tube(spout, [0.024, 0.02, 0.014, 0.011]), gloss=0.6),
        part("teapot handle", teal, tube(handle, 0.011), gloss=0.5),
    )


def _soup_bowl() -> tuple[Part, ...]:
    outline = smooth_outline([(0, 0.0), (0.045, 0.0), (0.078, 0.03), (0.094, 0.068)], 10)
    return (
        part("bowl side", (0.93, 0.93, 0.9), lathe(shell(outline, 0.007)), gloss=0.5),
        part("bowl rim", (0.12, 0.25, 0.5), _ring(0.093, 0.0065, 0.068), gloss=0.5),
        part("tomato soup", (0.82, 0.26, 0.08), disc(0.079, 0.042, 0.05), gloss=0.5),
    )


def _wine_bottle() -> tuple[Part, ...]:
    glass = capped([(0.038, 0), (0.04, 0.02), (0.04, 0.13), (0.036, 0.155), (0.017, 0.185), (0.014, 0.225)], 18)
    return (
        part("bottle glass", (0.08, 0.22, 0.12), glass, gloss=0.9),
        part("bottle label", (0.93, 0.88, 0.74), disc(0.0412, 0.045, 0.115), texture="stripes", gloss=0.05),
        part("bottle cork", (0.75, 0.55, 0.34), disc(0.0145, 0.22, 0.25), texture="speckle", gloss=0.05),
    )


def _red_apple() -> tuple[Part, ...]:
    outline = [(0, 0.01), (0.024, 0), (0.052, 0.034), (0.054, 0.064), (0.034, 0.096), (0.014, 0.094), (0, 0.083)]
    stem = tube([(0, 0, 0.08), (0.002, 0, 0.105), (0.01, 0, 0.125)], 0.0042)
    leaf = ellipsoid((0.034, 0.015, 0.003)).moved(turn("z", 40) @ turn("y", -25), np.array([0.022, 0.018, 0.118]))
    return (
        part("apple skin", (0.75, 0.1, 0.09), capped(outline, 18), texture="speckle", gloss=0.45),
        part("apple stem", (0.33, 0.22, 0.1), stem),
        part("apple leaf", (0.2, 0.5, 0.13), leaf, gloss=0.3),
    )


def _banana() -> tuple[Part, ...]:
    angle = np.radians(np.linspace(-58, 58, 7))
    arc = np.stack([0.125 * np.sin(angle), 0.125 * (1 - np.cos(angle)) - 0.03, np.full(7, 0.022)], 1)
    ends = np.stack([arc[0] + 0.18 * (arc[0] - arc[1]), arc[-1] + 0.3 * (arc[-1] - arc[-2])])
    peel = tube(arc, [0.011, 0.019, 0.0225, 0.0235, 0.0225, 0.019, 0.011], 14)
    tips = [tube([inner, outer], [0.0105, 0.0085]) for inner, outer in zip(arc[[0, -1]], ends, strict=True)]
    return (
        part("banana peel", (0.93, 0.78, 0.16), peel, texture="speckle", gloss=0.2),
        part("banana tip", (0.36, 0.25, 0.1), *tips),
    )


def _pineapple() -> tuple[Part, ...]:
    leaves = []
    for number in range(10):
        lean, top = (0.052, 0.2) if number < 5 else (0.022, 0.23)  # an outer and an inner ring
        angle = np.radians(72 * number + 36 * (number // 5))
        out = np.array([np.cos(angle), np.sin(angle), 0])
        nodes = [0.012 * out + [0, 0, 0.12], 0.6 * lean * out + [0, 0, 0.17], 1.3 * lean * out + [0, 0, top]]
        leaves.append(tube(nodes, [0.014, 0.011, 0.003], 6))
    body = ellipsoid((0.052, 0.052, 0.068), (0, 0, 0.068))
    return (
        part("pineapple body", (0.76, 0.52, 0.15), body, texture="lattice"),
        part("pineapple crown", (0.2, 0.45, 0.2), *leaves, gloss=0.2),
    )


def _halved_orange() -> tuple[Part, ...]:
    place = (turn("y", 42), np.array([0, 0, 0.056]))
    peel = capped([(0, -0.056), (0.035, -0.045), (0.055, -0.012), (0.058, 0.0)], 10)
    return (
        part("orange peel", (0.95, 0.5, 0.06), peel.moved(*place), texture="speckle", gloss=0.3),
        part("orange pulp", (0.98, 0.72, 0.3), disc(0.051, -0.004, 0.003).moved(*place), texture="sectors", gloss=0.35),
    )


def _rubber_duck() -> tuple[Part, ...]:
    yellow = (0.97, 0.8, 0.13)
    body, tail = ellipsoid((0.073, 0.054, 0.043), (0, 0, 0.042)), ellipsoid((0.026, 0.02, 0.017), (-0.068, 0, 0.066))
    wing = ellipsoid((0.037, 0.012, 0.023))
    wings = [wing.moved(turn("z", -12 * side), np.array([-0.012, 0.05 * side, 0.052])) for side in SIDES]
    eyes = [ellipsoid(0.007, (0.069, 0.022 * side, 0.121)) for side in SIDES]
    return (
        part("duck body", yellow, body, tail, gloss=0.5),
        part("duck head", yellow, ellipsoid(0.039, (0.042, 0, 0.107)), gloss=0.5),
        part("duck beak", (0.93, 0.42, 0.08), ellipsoid((0.026, 0.021, 0.008), (0.084, 0, 0.1)), gloss=0.4),
        part("duck wing", (0.9, 0.66, 0.1), *wings, gloss=0.4),
        part("duck eye", (0.05, 0.05, 0.06), *eyes, gloss=0.9),
    )


def _toy_car() -> tuple[Part, ...]:
    body, roof = box((0.19, 0.086, 0.038), (0, 0, 0.04)), box((0.1, 0.078, 0.008), (-0.014, 0, 0.104))
    wheel = disc(0.026, -0.011, 0.011)
    wheels = [
        wheel.moved(turn("x", 90), np.array([0.055 * fore, 0.045 * side, 0.026])) for fore in SIDES for side in SIDES
    ]
    lights = [ellipsoid((0.008, 0.013, 0.011), (0.095, 0.028 * side, 0.045)) for side in SIDES]
    return (
        part("car body", (0.1, 0.4, 0.72), body, roof, gloss=0.7),
        part("car windows", (0.62, 0.77, 0.83), box((0.095, 0.074, 0.042), (-0.014, 0, 0.08)), gloss=0.9),
        part("car wheel", (0.09, 0.09, 0.1), *wheels, gloss=0.2),
        part("car headlight", (0.98, 0.95, 0.7), *lights, gloss=0.6, glow=0.2),
    )


def _teddy_bear() -> tuple[Part, ...]:
    brown, cream = (0.55, 0.34, 0.17), (0.84, 0.68, 0.46)
    arm, leg = ellipsoid((0.021, 0.019, 0.042)), ellipsoid((0.046, 0.024, 0.025))
    ears = [ellipsoid((0.012, 0.02, 0.02), (0, 0.037 * side, 0.19)) for side in SIDES]
    arms = [arm.moved(turn("x", 38 * side), np.array([0.012, 0.058 * side, 0.085])) for side in SIDES]
    legs = [leg.moved(turn("z", 22 * side), np.array([0.058, 0.036 * side, 0.025])) for side in SIDES]
    return (
        part("bear body", brown, ellipsoid((0.045, 0.05, 0.06), (0, 0, 0.058)), texture="fur", gloss=0.02),
        part("bear head", brown, ellipsoid((0.043, 0.046, 0.043), (0.004, 0, 0.152)), texture="fur", gloss=0.02),
        part("bear ear", cream, *ears, texture="fur", gloss=0.02),
        part("bear muzzle", cream, ellipsoid((0.022, 0.024, 0.019), (0.04, 0, 0.142)), texture="fur", gloss=0.02),
        part("bear nose", (0.08, 0.06, 0.06), ellipsoid((0.006, 0.009, 0.006), (0.061, 0, 0.15)), gloss=0.5),
        part("bear arm", brown, *arms, texture="fur", gloss=0.02),
        part("bear leg", cream, *legs, texture="fur", gloss=0.02),
    )


def _stacking_rings() -> tuple[Part, ...]:
    base, pole = disc(0.062, 0, 0.016), disc(0.01, 0.01, 0.14)
    return (
        part("ring base", (0.78, 0.6, 0.38), base, pole, texture="wood", gloss=0.1),
        part("red ring", (0.8, 0.13, 0.12), _ring(0.04, 0.019, 0.034), gloss=0.4),
        part("yellow ring", (0.95, 0.75, 0.12), _ring(0.034, 0.018, 0.07), gloss=0.4),
        part("green ring", (0.2, 0.6, 0.24), _ring(0.028, 0.017, 0.104), gloss=0.4),
        part("blue ball", (0.15, 0.32, 0.75), ellipsoid(0.026, (0, 0, 0.145)), gloss=0.5),
    )


def _desk_lamp() -> tuple[Part, ...]:
    metal = (0.3, 0.31, 0.34)
    head = (turn("y", -28), np.array([0.062, 0, 0.262]))
    base = capped([(0.066, 0), (0.066, 0.01), (0.05, 0.02), (0.012, 0.026)], 8)
    pole = tube([(0, 0, 0.02), (-0.035, 0, 0.13), (-0.02, 0, 0.24), (0.058, 0, 0.265)], 0.0085)
    cone = np.array([(0.07, -0.085), (0.03, -0.01), (0.022, 0.0)])
    shade = lathe(np.concatenate([cone, cone[::-1] - [0.008, 0.003]]))
    bulb = ellipsoid((0.026, 0.026, 0.032), (0, 0, -0.06)).moved(*head)
    return (
        part("lamp base", metal, base, gloss=0.6),
        part("lamp pole", metal, pole, gloss=0.6),
        part("lamp shade", (0.84, 0.62, 0.2), shade.moved(*head), disc(0.0225, -0.006, 0.004).moved(*head), gloss=0.4),
        part("light bulb", (1.0, 0.96, 0.82), bulb, gloss=0.3, glow=0.65),
    )


def _cactus() -> tuple[Part, ...]:
    green = (0.22, 0.5, 0.26)
    pot = np.array([(0, 0), (0.042, 0), (0.056, 0.066), (0.063, 0.068), (0.064, 0.084)])
    arms = [
        tube([(0, 0.03, 0.135), (0, 0.062, 0.14), (0, 0.068, 0.185)], [0.014, 0.016, 0.015], 8),
        tube([(0, -0.03, 0.115), (0, -0.058, 0.12), (0, -0.062, 0.155)], [0.013, 0.015, 0.014], 8),
    ]
    petal = ellipsoid((0.017, 0.009, 0.006), (0.014, 0, 0)).moved(turn("y", -30), np.array([0, 0, 0.228]))
    petals = [petal.moved(turn("z", 60 * number), np.zeros(3)) for number in range(6)]
    stem = ellipsoid((0.035, 0.035, 0.088), (0, 0, 0.14))
    return (
        part("flower pot", (0.72, 0.38, 0.25), lathe(shell(pot, 0.008)), texture="speckle", gloss=0.08),
        part("soil", (0.22, 0.16, 0.12), disc(0.054, 0.06, 0.07), texture="speckle", gloss=0.0),
        part("cactus stem", green, stem, texture="ribs", gloss=0.1),
        part("cactus arm", green, *arms, gloss=0.1),
        part("pink flower", (0.93, 0.4, 0.62), *petals, gloss=0.1),
    )


def _book_stack() -> tuple[Part, ...]:
    covers, pages = [], []
    for z, turn_deg, size in ((0.0, 0, (0.2, 0.145, 0.042)), (0.042, 17, (0.175, 0.13, 0.034))):
        length, width, height = size
        place = (turn("z", turn_deg), np.array([0, 0, z]))
        boards = [box((length, width, 0.005), (0, 0, side_z)) for side_z in (0.0025, height - 0.0025)]
        spine = box((length, 0.006, height), (0, -width / 2 + 0.003, height / 2))
        covers.append([board.moved(*place) for board in (*boards, spine)])
        pages.append(box((length - 0.012, width - 0.012, height - 0.01), (0, 0, height / 2)).moved(*place))
    return (
        part("red book cover", (0.62, 0.13, 0.16), *covers[0]),
        part("green book cover", (0.14, 0.42, 0.33), *covers[1]),
        part("book pages", (0.93, 0.9, 0.82), *pages, texture="pages", gloss=0.02),
    )


def _candle() -> tuple[Part, ...]:
    saucer = np.array([(0, 0), (0.058, 0), (0.062, 0.012), (0.062, 0.018)])
    wax = capped([(0.032, 0.004), (0.032, 0.13), (0.026, 0.138)], 10)
    flame = capped([(0, 0.148), (0.011, 0.162), (0.008, 0.178), (0, 0.198)], 10)
    return (
        part("candle holder", (0.72, 0.58, 0.28), lathe(shell(saucer, 0.006)), _ring(0.068, 0.009, 0.02), gloss=0.8),
        part("candle wax", (0.94, 0.9, 0.82), wax, gloss=0.25),
        part("candle flame", (1.0, 0.72, 0.22), flame, gloss=0.0, glow=0.7),
    )


def _alarm_clock() -> tuple[Part, ...]:
    stand = (turn("y", 90), np.array([0, 0, 0.075]))
    case = capped([(0.052, -0.026), (0.06, -0.022), (0.061, 0.02), (0.057, 0.026)], 8).moved(*stand)
    feet = [tube([(0, 0.035 * side, 0.035), (0, 0.045 * side, 0.007)], 0.007) for side in SIDES]
    bell = capped([(0.026, 0.0), (0.024, 0.012), (0.013, 0.022), (0, 0.025)], 8)
    bells = [bell.moved(turn("x", -24 * side), np.array([0, 0.032 * side, 0.135])) for side in SIDES]
    hand = box((0.003, 0.005, 0.034), (0.0285, 0, 0.09))
    other_hand = hand.moved(turn("x", 110), np.array([0, 0.069, 0.1004]))
    return (
        part("clock case", (0.17, 0.5, 0.52), case, *feet, gloss=0.6),
        part("clock face", (0.96, 0.95, 0.9), disc(0.051, 0.02, 0.027).moved(*stand), texture="dial", gloss=0.3),
        part("clock bell", (0.8, 0.65, 0.3), *bells, gloss=0.9),
        part("clock hand", (0.1, 0.1, 0.12), hand, other_hand),
    )


CATALOGUE = (
    ObjectKind("red mug", "tableware", _red_mug),
    ObjectKind("blue mug", "tableware", _blue_mug),
    ObjectKind("teapot", "tableware", _teapot),
    ObjectKind("soup bowl", "tableware", _soup_bowl),
    ObjectKind("wine bottle", "tableware", _wine_bottle),
    ObjectKind("red apple", "fruit", _red_apple),
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
