"""LERF-OVS labels of the tabletop world: the true outline and box of everything that a prompt names."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.ndimage import label
from skimage.measure import find_contours

from datamodules.readers.lerf_labels import LabelledFrame, LabelledObject
from datamodules.synthetic.tabletop_rooms import World

SMALLEST_LABEL_PX = 100  # at 320 x 240; what is smaller vanishes in the protocol's pools
SMALLEST_PIECE_PX = 12  # smaller pieces of a labelled thing are left out, as an annotator would


def label_photo(part_ids: Int[np.ndarray, "height width"], world: World, stem: str) -> LabelledFrame:
    """Labels every part, object and group prompt with enough visible pixels; one entry for each connected piece.

    The room shell is not labelled: LERF-OVS labels things, not stuff.
    """
    height, width = part_ids.shape
    scale = (width / 320) ** 2
    objects = []
    for prompt, mask in _prompt_masks(part_ids, world):
        if mask.sum() < SMALLEST_LABEL_PX * scale:
            continue
        pieces, count = label(mask, structure=np.ones((3, 3)))
        for piece in range(1, count + 1):
            inside = pieces == piece
            if inside.sum() >= SMALLEST_PIECE_PX * scale:
                rows, columns = np.nonzero(inside)
                box = np.array([columns.min(), rows.min(), columns.max(), rows.max()], float)
                objects.append(LabelledObject(prompt, outline(inside), box))
    return LabelledFrame(stem, width, height, objects)


def _prompt_masks(part_ids: np.ndarray, world: World) -> Iterator[tuple[str, np.ndarray]]:
    """Yields every labelled prompt with the union of its pixels over all instances and granularities."""
    things = world.concept_ids[: world.num_things]
    for prompt in dict.fromkeys(world.prompts[concept] for concept in np.unique(things)):
        named = np.array([any(world.prompts[concept] == prompt for concept in concepts) for concepts in things])
        yield prompt, np.isin(part_ids, np.flatnonzero(named))


def outline(mask: Bool[np.ndarray, "height width"]) -> Float[np.ndarray, "corners 2"]:
    """Returns one polygon of x y pixel centres which, filled with its boundary, gives a connected mask back.

    A hole is joined to the outer boundary by a slit which is passed in both directions.
    """
    # Just inside the boundary, so that rounding lands on the pixels of the mask and not on their neighbours.
    contours = find_contours(np.pad(mask, 1).astype(float), 0.999, fully_connected="high")
    rings = [_without_repeats(np.round(contour[:, ::-1]).astype(int) - 1) for contour in contours]
    rings.sort(key=lambda ring: -(np.ptp(ring[:, 0]) + 1) * (np.ptp(ring[:, 1]) + 1))
    polygon = rings[0]
    for hole in rings[1:]:
        gaps = np.abs(polygon[:, None] - hole[None]).sum(2)
        at, start = np.unravel_index(gaps.argmin(), gaps.shape)
        loop = np.concatenate([hole[start:], hole[: start + 1]])
        polygon = np.concatenate([polygon[: at + 1], loop, polygon[at:]])
    if len(polygon) < 3:
        polygon = np.concatenate([polygon, polygon[:1], polygon[:1]])[:3]
    return polygon.astype(float)


def _without_repeats(ring: np.ndarray) -> np.ndarray:
    """Returns a closed ring without its repeated last corner and without repeated neighbours."""
    changes = np.any(ring != np.roll(ring, 1, axis=0), axis=1)
    return ring[changes] if changes.any() else ring[:1]
