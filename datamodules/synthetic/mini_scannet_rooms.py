"""Furnished rooms and the places a camera visits in them."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from datamodules.synthetic.mini_scannet_furniture import FABRICS, FURNITURE, PAINTS, WOODS, sink_of
from datamodules.synthetic.mini_scannet_shapes import Material, Part, Texture, Thing

_ATTEMPTS = 60
_GAP = 0.03  # metres between things
_IN_FRONT_OF_DOOR = 0.75  # metres kept free


class Room(NamedTuple):
    """A furnished room; the floor's lowest corner is the world's origin, z is up.

    Attributes:
        size: Length, width and height, metres.
        things: Floor, four walls, ceiling, then what stands and hangs there.
    """

    size: Float[np.ndarray, "3"]
    things: tuple[Thing, ...]


class Place(NamedTuple):
    """Where a camera is and what it looks at, metres."""

    eye: Float[np.ndarray, "3"]
    target: Float[np.ndarray, "3"]


def furnish(kind: str, rng: np.random.Generator) -> Room:
    """Builds a room of one of :data:`KINDS`; what finds no place after many attempts is left out."""
    low, high, recipe = KINDS[kind]
    layout = _Layout(rng.uniform(low, high), rng)
    recipe(layout)
    return Room(layout.size, (*_shell(layout.size, rng), *layout.things))


def camera_places(room: Room, num_places: int, rng: np.random.Generator) -> list[Place]:
    """Goes once around the room: two of three times it looks across, the third at one thing nearby."""
    bounds = [thing.bounds() for thing in room.things[6:]]
    centre, half = room.size[:2] / 2, room.size[:2] / 2
    places = []
    for number in range(num_places):
        for _ in range(_ATTEMPTS):
            angle = 2 * np.pi * (number + rng.uniform(-0.3, 0.3)) / num_places
            around = np.array([np.cos(angle), np.sin(angle)])
            eye = np.append(centre + rng.uniform(0.35, 0.75) * half * around, rng.uniform(1.25, 1.75))
            if not any(((eye > low - 0.3) & (eye < high + 0.3)).all() for low, high in bounds):
                break
        if number % 3 == 2:
            middles = np.array([(low + high) / 2 for low, high in bounds])
            distances = np.linalg.norm(middles[:, :2] - eye[:2], axis=1)
            near = np.nonzero((distances > 0.9) & (distances < 2.8))[0]
            target = middles[rng.choice(near)] if len(near) else np.append(centre, 0.8)
        else:
            target = np.append(centre - rng.uniform(0.3, 0.8) * half * around, rng.uniform(0.25, 1.1))
            target[:2] += rng.normal(0, 0.25, 2)
        places.append(Place(eye, target))
    return places


def _shell(size: np.ndarray, rng: np.random.Generator) -> list[Thing]:
    """Returns floor, walls and ceiling."""
    length, width, height = size
    corners = np.array([[0, 0, 0], [length, 0, 0], [length, width, 0], [0, width, 0]])
    up = corners + np.array([0, 0, height])
    texture: Texture = rng.choice(["wood", "fabric", "tiles"])
    palette = {"wood": WOODS, "fabric": FABRICS, "tiles": PAINTS}[texture]
    ground = np.clip(np.array(palette[rng.integers(len(palette))]) + rng.normal(0, 0.04, 3), 0.08, 0.9)
    paint = np.clip(rng.uniform(0.62, 0.88) + rng.normal(0, 0.05, 3), 0.3, 0.95)
    floor = Part(corners[None], Material(tuple(ground), texture, rng.uniform(0, 9)))
    wall, lid = Material(tuple(paint)), Material((0.85, 0.85, 0.84))
    sides = [np.stack([corners[i], corners[(i + 1) % 4], up[(i + 1) % 4], up[i]])[None] for i in range(4)]
    return [
        Thing("floor", (floor,)),
        *(Thing("wall", (Part(side, wall),)) for side in sides),
        Thing("ceiling", (Part(up[None], lid),)),
    ]


class _Layout:
    """Places things one after the other where nothing else is."""

    def __init__(self, size: np.ndarray, rng: np.random.Generator) -> None:
        self.size, self.rng = size, rng
        self.things: list[Thing] = []
        self._taken: list[np.ndarray] = []

    def along_wall(self, name: str, height: float = 0.0, in_front: float = 0.0) -> Thing | None:
        """Puts a thing with its back at a random place of a wall; keeps some metres in front of it free."""
        thing = FURNITURE[name](self.rng)
        low, high = thing.bounds()
        for _ in range(_ATTEMPTS):
            wall = int(self.rng.integers(4))
            span = self.size[wall % 2]
            if span < high[0] - low[0] + 0.1:
                continue
            along = self.rng.uniform(-low[0] + 0.05, span - high[0] - 0.05)
            back = max(-low[1], 0.0)  # backs that lean
            ends = (back, self.size[0] - back, self.size[1] - back, back)
            x, y = (along, ends[wall]) if wall % 2 == 0 else (ends[wall], along)
            placed = thing.placed([x, y, height], (0, np.pi / 2, np.pi, -np.pi / 2)[wall])
            if self._add(placed, in_front):
                return placed
        return None

    def beside(
        self,
        other: Thing | None,
        name: str,
        offset: Sequence[float] | np.ndarray,
        turn: float = 0.0,
        *,
        touches: bool = False,
    ) -> Thing | None:
        """Puts a thing at a place in another one's own axes.

        Args:
            other: The other one; with None nothing happens.
            name: Of :data:`FURNITURE`.
            offset: Metres.
            turn: Radians.
            touches: It may overlap others, as a pillow does a bed.
        """
        if other is None:
            return None
        placed = self._relative(other, FURNITURE[name](self.rng), offset, turn)
        return placed if self._add(placed, touches=touches) else None

    def inset(self, other: Thing | None) -> None:
        """Puts a sink into a counter."""
        if other is not None:
            self._add(self._relative(other, sink_of(other), (0, 0, 0), 0.0), touches=True)

    def in_the_middle(self, name: str) -> Thing | None:
        """Puts a thing somewhere away from the walls, turned anyhow."""
        thing = FURNITURE[name](self.rng)
        for _ in range(_ATTEMPTS):
            x, y = self.rng.uniform(0.3, 0.7, 2) * self.size[:2]
            turn = self.rng.integers(4) * np.pi / 2 + self.rng.normal(0, 0.15)
            placed = thing.placed([x, y, 0.0], turn)
            if self._add(placed):
                return placed
        return None

    def with_seats(self, table: Thing | None, name: str, most: int) -> None:
        """Puts chairs around a table, facing it."""
        if table is None:
            return
        low, high = table._replace(rotation=np.eye(3), position=np.zeros(3)).bounds()
        for number in range(int(self.rng.integers(2, most + 1))):
            x = (
                self.rng.uniform(0.5 * low[0], 0.5 * high[0])
                if number % 2
                else 0.6 * (low[0] if number < 2 else high[0])
            )
            out = 0.55 + self.rng.uniform(-0.1, 0.2)
            is_front = number % 2 == 0
            y = high[1] + out if is_front else -out
            self.beside(table, name, (x, y, 0), (np.pi if is_front else 0.0) + self.rng.normal(0, 0.25))

    def hang(self) -> None:
        """Hangs a window with curtains, pictures, and puts in a door, before the furniture takes the walls."""
        self.along_wall("door", in_front=_IN_FRONT_OF_DOOR)
        window = self.along_wall("window", height=self.rng.uniform(0.85, 1.0))
        if window is not None:
            half = float(np.ptp(window._replace(rotation=np.eye(3)).bounds()[:, 0]) / 2)
            for side in self.rng.permutation([-1, 1])[: self.rng.integers(1, 3)]:
                drop = -window.position[2] + self.rng.uniform(0.1, 0.4)
                self.beside(window, "curtain", (side * (half + 0.15), 0.0, drop), touches=True)

    def decorate(self, num_pictures: int) -> None:
        """Hangs pictures where the walls are still free."""
        for _ in range(num_pictures):
            self.along_wall("picture", height=self.rng.uniform(1.2, 1.5))

    def _relative(self, other: Thing, thing: Thing, offset: Sequence[float] | np.ndarray, turn: float) -> Thing:
        own_turn = np.arctan2(other.rotation[1, 0], other.rotation[0, 0])
        return thing.placed(other.position + other.rotation @ np.asarray(offset, float), own_turn + turn)

    def _add(self, thing: Thing, in_front: float = 0.0, *, touches: bool = False) -> bool:
        low, high = thing.bounds()
        if (low[:2] < -0.01).any() or (high[:2] > self.size[:2] + 0.01).any() or high[2] > self.size[2]:
            return False
        front = thing.rotation @ np.array([0, in_front, 0])
        taken = np.stack([np.minimum(low, low + front), np.maximum(high, high + front)])
        overlaps = (np.minimum(taken[1], other[1]) - np.maximum(taken[0], other[0]) > -_GAP for other in self._taken)
        if not touches and any(overlap.all() for overlap in overlaps):
            return False
        self.things.append(thing)
        self._taken.append(taken)
        return True


# The kinds


def _bedroom(layout: _Layout) -> None:
    layout.hang()
    bed = layout.along_wall("bed")
    if bed is not None:
        low, high = bed._replace(rotation=np.eye(3), position=np.zeros(3)).bounds()
        for x in (low[0] / 2, high[0] / 2):
            layout.beside(bed, "pillow", (x, 0.1, 0.5), touches=True)
        layout.beside(bed, "nightstand", (high[0] + 0.35, 0, 0))
    layout.along_wall("cabinet")
    desk = layout.along_wall("desk", in_front=0.75)
    layout.beside(desk, "office_chair", (layout.rng.uniform(-0.2, 0.2), 1.25, 0), np.pi, touches=True)
    layout.beside(desk, "monitor", (0.0, 0.05, 0.76), touches=True)
    layout.along_wall("bookshelf")
    layout.along_wall("armchair")
    layout.along_wall("lamp")
    layout.along_wall("trash_can")
    layout.decorate(2)


def _living_room(layout: _Layout) -> None:
    layout.hang()
    sofa = layout.along_wall("sofa", in_front=0.4)
    layout.beside(sofa, "coffee_table", (layout.rng.uniform(-0.2, 0.2), 1.35, 0))
    layout.along_wall("tv_stand")
    layout.along_wall("bookshelf")
    layout.along_wall("armchair")
    layout.with_seats(layout.in_the_middle("table"), "chair", 3)
    layout.along_wall("cabinet")
    desk = layout.along_wall("desk", in_front=0.6)
    layout.beside(desk, "chair", (0.0, 1.15, 0), np.pi, touches=True)
    layout.along_wall("lamp")
    layout.along_wall("cardboard_box")
    layout.decorate(3)


def _kitchen(layout: _Layout) -> None:
    layout.hang()
    counter = layout.along_wall("counter", in_front=0.4)
    layout.inset(counter)
    layout.along_wall("refrigerator", in_front=0.3)
    layout.beside(counter, "kitchen_cabinet", (0.0, 0.0, 1.5))
    layout.with_seats(layout.in_the_middle("table"), "chair", 4)
    layout.along_wall("cabinet")
    layout.along_wall("bookshelf")
    layout.along_wall("trash_can")
    layout.decorate(2)


def _bathroom(layout: _Layout) -> None:
    layout.hang()
    tub = layout.along_wall("bathtub")
    layout.beside(tub, "shower_curtain", (layout.rng.uniform(-0.3, 0.3), 0.78, 0.35), touches=True)
    layout.along_wall("toilet", in_front=0.4)
    layout.along_wall("washbasin", in_front=0.4)
    layout.along_wall("cabinet")
    layout.along_wall("chair")
    layout.along_wall("trash_can")
    layout.along_wall("cardboard_box")
    layout.decorate(1)


def _office(layout: _Layout) -> None:
    layout.hang()
    layout.along_wall("whiteboard", height=0.95)
    for _ in range(2):
        desk = layout.along_wall("desk", in_front=0.75)
        layout.beside(desk, "office_chair", (layout.rng.uniform(-0.2, 0.2), 1.25, 0), np.pi, touches=True)
        layout.beside(desk, "monitor", (layout.rng.uniform(-0.3, 0.2), 0.05, 0.76), touches=True)
    layout.along_wall("bookshelf")
    layout.along_wall("cabinet")
    layout.along_wall("sofa")
    layout.with_seats(layout.in_the_middle("table"), "chair", 3)
    layout.along_wall("trash_can")
    layout.decorate(1)


_Size = tuple[float, float, float]
KINDS: dict[str, tuple[_Size, _Size, Callable[[_Layout], None]]] = {
    "bedroom": ((3.6, 3.3, 2.4), (4.8, 4.4, 2.8), _bedroom),
    "living room": ((4.4, 3.8, 2.4), (5.6, 5.0, 2.9), _living_room),
    "kitchen": ((3.6, 3.4, 2.4), (4.6, 4.4, 2.8), _kitchen),
    "bathroom": ((3.0, 2.6, 2.4), (3.8, 3.4, 2.7), _bathroom),
    "office": ((4.4, 3.8, 2.4), (5.6, 5.0, 2.9), _office),
}
