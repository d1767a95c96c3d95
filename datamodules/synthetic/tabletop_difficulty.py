"""How hard a tabletop world is: every number that a difficulty decides, with its reason."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Difficulty:
    """The noise of one world. Fractions are of the masks of one view and granularity, chosen independently.

    Attributes:
        elevations_deg: Lowest and highest camera above the table; the lower, the more objects hide one another.
        dropped: Masks that the segmenter missed.
        stuff_dropped: The same for floor, walls and furniture: a segmenter's point prompts rarely agree on large plain
            surfaces. With what is dropped and cut off at borders it leaves a third of all pixels without a label.
        merged: Masks that swallowed a neighbour; the feature is the area-weighted mixture.
        split: Masks cut in two along a random line.
        border_jitter_px: Standard deviation, at 320 pixels width, of the smooth displacement of a mask's border.
        context_leak: Masks whose crop shows so much of a neighbour that its feature leaks in.
        leak_share: Lowest and highest share of the neighbour in such a feature.
        wrong_embedding: Masks of objects on the table whose feature is that of something else of the same granularity.
        noise_energies: Squared length of the isotropic noise added to a unit feature before it is made unit again: for
            the largest masks and for masks at the size limit, whose crops are blurred.
    """

    elevations_deg: tuple[float, float]
    dropped: float
    stuff_dropped: float
    merged: float
    split: float
    border_jitter_px: float
    context_leak: float
    leak_share: tuple[float, float]
    wrong_embedding: float
    noise_energies: tuple[float, float]


# The noise of the prototype that decided the defaults of the field, about what SAM and CLIP do on cluttered photos.
NORMAL = Difficulty(
    elevations_deg=(16.0, 40.0),
    dropped=0.10,
    stuff_dropped=0.40,
    merged=0.08,
    split=0.10,
    border_jitter_px=1.5,
    context_leak=0.20,
    leak_share=(0.15, 0.45),
    wrong_embedding=0.05,
    noise_energies=(0.20, 0.45),
)

# A third of each fault and cameras which see over most objects: for tests of the machinery and first looks.
EASY = Difficulty(
    elevations_deg=(24.0, 48.0),
    dropped=0.033,
    stuff_dropped=0.13,
    merged=0.027,
    split=0.033,
    border_jitter_px=0.5,
    context_leak=0.067,
    leak_share=(0.15, 0.45),
    wrong_embedding=0.017,
    noise_energies=(0.07, 0.15),
)

# Half as much again of each fault and cameras nearly level with the objects.
HARD = Difficulty(
    elevations_deg=(10.0, 32.0),
    dropped=0.15,
    stuff_dropped=0.60,
    merged=0.12,
    split=0.15,
    border_jitter_px=2.25,
    context_leak=0.30,
    leak_share=(0.15, 0.45),
    wrong_embedding=0.075,
    noise_energies=(0.30, 0.675),
)

DIFFICULTIES = {"easy": EASY, "normal": NORMAL, "hard": HARD}
