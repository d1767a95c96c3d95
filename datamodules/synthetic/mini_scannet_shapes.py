"""What synthetic rooms are made of: four-cornered patches with materials, boxes, cylinders and cloths of them."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float

Texture = Literal["plain", "wood", "fabric", "tiles", "books", "picture", "glass"]
Colour = tuple[float, float, float]


class Material(NamedTuple):
    """How a surface looks.

    Attributes:
        colour: Linear RGB.
        texture: Pattern over it.
        phase: Shifts the pattern.
    """

    colour: Colour
    texture: Texture = "plain"
    phase: float = 0.0


class Part(NamedTuple):
    """A piece of one material: four-cornered patches, in metres; two corners may coincide."""

    quads: Float[np.ndarray, "quads 4 3"]
    material: Material


class Thing(NamedTuple):
    """An object as ScanNet's annotators would name it.

    On its own, x runs along its width with zero in the middle, y from its back (at a wall) to its front, z is up.

    Attributes:
        category: ``raw_category`` of ScanNet's label table.
        parts: What it is made of.
        rotation: World from own axes.
        position: Of its own origin in the world, metres.
    """

    category: str
    parts: tuple[Part, ...]
    rotation: Float[np.ndarray, "3 3"] = np.eye(3)
    position: Float[np.ndarray, "3"] = np.zeros(3)

    def placed(self, position: Sequence[float] | np.ndarray, turn: float) -> "Thing":
        """Returns it turned around z, in radians, then moved."""
        cos, sin = np.cos(turn), np.sin(turn)
        return self._replace(
            rotation=np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]]), position=np.asarray(position, float)
        )

    def world_quads(self) -> Float[np.ndarray, "quads 4 3"]:
        """Returns all patches in world coordinates."""
        return np.concatenate([part.quads for part in self.parts]) @ self.rotation.T + self.position

    def bounds(self) -> Float[np.ndarray, "2 3"]:
        """Returns the lowest and highest corner in world coordinates."""
        quads = self.world_quads().reshape(-1, 3)
        return np.stack([quads.min(0), quads.max(0)])


_FACES = ((0, 1, 3, 2), (4, 6, 7, 5), (0, 4, 5, 1), (2, 3, 7, 6), (0, 2, 6, 4), (1, 5, 7, 3))


def box(
    low: Sequence[float] | np.ndarray, high: Sequence[float] | np.ndarray, material: Material, tilt: float = 0.0
) -> Part:
    """Returns a box between two corners; ``tilt`` leans its top back, metres of y per metre of z."""
    corners = np.array([[x, y, z] for x in (low[0], high[0]) for y in (low[1], high[1]) for z in (low[2], high[2])])
    corners[:, 1] -= tilt * (corners[:, 2] - low[2])
    return Part(corners[np.array(_FACES)], material)


def cylinder(
    x: float, y: float, bottom: float, top: float, radius: float, material: Material, flare: float = 1.0
) -> Part:
    """Returns an upright cylinder; its top has ``flare`` times the radius."""
    angles = np.linspace(0, 2 * np.pi, 13)
    ring = np.stack([np.cos(angles), np.sin(angles), 0 * angles], 1) * radius
    low, high = ring + np.array([x, y, bottom]), ring * flare + np.array([x, y, top])
    side = np.stack([low[:-1], low[1:], high[1:], high[:-1]], 1)
    lids = [
        np.stack([edge[:-1], edge[1:], 0 * edge[1:] + centre, 0 * edge[1:] + centre], 1)
        for edge, centre in ((low, [x, y, bottom]), (high, [x, y, top]))
    ]
    return Part(np.concatenate([side, *lids]), material)


def hanging_cloth(
    low: Sequence[float] | np.ndarray, width: float, height: float, folds: int, material: Material
) -> Part:
    """Returns a cloth whose folds run down, from its lowest left corner."""
    x = np.linspace(0, width, 4 * folds + 1)
    line = np.stack([x + low[0], low[1] + 0.04 * np.sin(x / width * folds * 2 * np.pi), 0 * x + low[2]], 1)
    up = line + np.array([0, 0, height])
    return Part(np.stack([line[:-1], line[1:], up[1:], up[:-1]], 1), material)
