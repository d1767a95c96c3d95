"""Embeddings with the geometry of CLIP, and the masks and features a segmenter with CLIP would find in a photograph."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.linalg import hadamard
from scipy.ndimage import gaussian_filter

from datamodules.synthetic.tabletop_difficulty import Difficulty
from datamodules.synthetic.tabletop_rooms import World, all_prompts, families

NUM_CHANNELS = 512
NEGATIVES = ("object", "things", "stuff", "texture")  # LERF's canonical negatives

TEXT_SIMILARITY = 0.75  # cosine of two unrelated prompts: the text modality's shared direction
IMAGE_SIMILARITY = 0.64  # cosine of two unrelated clean image features; 0.5 once both carry their noise
OTHER_SIMILARITY = 0.222  # clean image to unrelated prompt; noise brings it to 0.2
OWN_SIMILARITY = 0.335  # clean image to its own prompt; noise brings it to 0.3
# Share of an object's meaning in its parts' prompts, and so on: "mug handle" is a little like "red mug".
PART_HAS_OBJECT, PART_HAS_GROUP, OBJECT_HAS_GROUP = 0.30, 0.12, 0.25
# Without these every wrong prompt would score exactly 0.5 in relevancy, which real CLIP never does.
CLASS_CONFUSION = 0.05
NEGATIVE_CONFUSION = 0.2
# Parts of one object look alike beyond what any prompt says.
SHARED_APPEARANCE = 0.5

SMALLEST_MASK_PX = 30  # at 320 x 240
LARGE_MASK_PX = 3000
LARGEST_MERGE_RATIO = 8  # a handle is swallowed by its mug, never by the table
JITTER_LENGTH_PX = 5  # at 320 pixels width; displacements nearer than this agree


class Embeddings(NamedTuple):
    """CLIP's view of a world.

    Attributes:
        phrases: All prompts of the catalogue and the canonical negatives.
        texts: [phrases, C] unit text embeddings.
        concepts: [concepts, C] unit image features, free of noise, of the rows of ``World.prompts``.
    """

    phrases: tuple[str, ...]
    texts: Float[np.ndarray, "phrases channels"]
    concepts: Float[np.ndarray, "concepts channels"]


class ViewMasks(NamedTuple):
    """The segmentation of one photograph at the granularities default, s, m, l.

    Attributes:
        features: Four arrays [masks of the level, C] of unit features.
        maps: [4, H, W] row of the level's own features, -1 = no mask. Every row occurs.
    """

    features: tuple[Float[np.ndarray, "_ channels"], ...]
    maps: Int[np.ndarray, "4 height width"]


def embed(world: World, rng: np.random.Generator) -> Embeddings:
    """Draws text embeddings for all prompts and clean image features for the concepts of a world.

    A text embedding is the text modality's direction plus its meaning; an image feature is the image modality's
    direction, its meaning seen through a class-dependent confusion matrix, and an appearance of its own.
    """
    phrases = (*all_prompts(), *NEGATIVES)
    num_phrases, num_concepts = len(phrases), len(world.prompts)
    # Rows of a Hadamard matrix with random signs: orthonormal to the last bit on every machine, unlike a QR of noise.
    rows = rng.permutation(NUM_CHANNELS)[: 2 + num_phrases + num_concepts]
    directions = hadamard(NUM_CHANNELS)[rows] * rng.choice([-1.0, 1.0], NUM_CHANNELS) / np.sqrt(NUM_CHANNELS)
    text_modality, off_text = directions[:2]
    meanings, appearances = directions[2 : 2 + num_phrases], directions[2 + num_phrases :]

    row_of = {phrase: row for row, phrase in enumerate(phrases)}
    kinship = np.eye(num_phrases)
    for part, whole, group in families():
        kinship[row_of[part], row_of[whole]] = PART_HAS_OBJECT
        kinship[row_of[part], row_of[group]] = PART_HAS_GROUP
        kinship[row_of[whole], row_of[group]] = OBJECT_HAS_GROUP
    kinship /= np.linalg.norm(kinship, axis=1, keepdims=True)
    text_meaning = np.sqrt(1 - TEXT_SIMILARITY)
    texts = np.sqrt(TEXT_SIMILARITY) * text_modality + text_meaning * kinship @ meanings

    confusion = np.eye(num_phrases) + CLASS_CONFUSION * rng.normal(size=(num_phrases, num_phrases))
    confusion[:, -len(NEGATIVES) :] = rng.uniform(
        -NEGATIVE_CONFUSION, NEGATIVE_CONFUSION, (num_phrases, len(NEGATIVES))
    )
    own = np.array([row_of[prompt] for prompt in world.prompts])
    image_meaning = (OWN_SIMILARITY - OTHER_SIMILARITY) / text_meaning * (kinship @ confusion)[own] @ meanings

    overlap = OTHER_SIMILARITY / np.sqrt(IMAGE_SIMILARITY * TEXT_SIMILARITY)
    image_modality = overlap * text_modality + np.sqrt(1 - overlap**2) * off_text
    looks = appearances.copy()
    for part, whole, _ in world.concept_ids:
        looks[part] += SHARED_APPEARANCE * appearances[whole]
    looks /= np.linalg.norm(looks, axis=1, keepdims=True)
    rest = 1 - IMAGE_SIMILARITY - (image_meaning**2).sum(1, keepdims=True)
    concepts = np.sqrt(IMAGE_SIMILARITY) * image_modality + image_meaning + np.sqrt(rest) * looks
    return Embeddings(phrases, texts.astype(np.float32), _unit(concepts).astype(np.float32))


def segment_photo(
    part_ids: Int[np.ndarray, "height width"],
    world: World,
    concepts: Float[np.ndarray, "concepts channels"],
    difficulty: Difficulty,
    rng: np.random.Generator,
) -> ViewMasks:
    """Finds the masks of a photograph, with a segmenter's faults, and their features, with an image encoder's noise.

    Levels s, m, l hold parts, objects and groups; a group's mask may consist of several pieces. ``default`` holds the
    masks of all three, small ones over large ones.
    """
    levels = [_segment_level(part_ids, level, world, concepts, difficulty, rng) for level in range(3)]
    everything = [mask for masks, _ in levels for mask in masks], np.concatenate([features for _, features in levels])
    painted = [_paint(masks, features, part_ids.shape) for masks, features in (everything, *levels)]
    return ViewMasks(tuple(features for features, _ in painted), np.stack([ids for _, ids in painted]))


class _Mask(NamedTuple):
    """A mask within its crop; ``top`` and ``left`` are the crop's place in the photograph."""

    top: int
    left: int
    inside: np.ndarray


def _segment_level(
    part_ids: np.ndarray,
    level: int,
    world: World,
    concepts: np.ndarray,
    difficulty: Difficulty,
    rng: np.random.Generator,
) -> tuple[list[_Mask], np.ndarray]:
    ids = world.concept_ids[part_ids, level]
    scale = ids.shape[1] / 320
    stuff = set(world.concept_ids[world.num_movable :].ravel().tolist())
    same_level = np.unique(world.concept_ids[:, level]).tolist()
    areas = dict(zip(*(array.tolist() for array in np.unique(ids, return_counts=True)), strict=True))
    visible = [concept for concept, area in areas.items() if area >= SMALLEST_MASK_PX * scale**2]
    borders = _border_lengths(ids)
    masks: list[_Mask] = []
    features: list[np.ndarray] = []
    merged: set[int] = set()
    for concept in rng.permutation(visible).tolist():
        if concept in merged:
            continue
        members = [concept]
        neighbours = [other for other in visible if borders.get((concept, other), 0) > 3 * scale]
        mergeable = [
            other
            for other in neighbours
            if other not in merged
            and {concept, other}.isdisjoint(stuff)
            and 1 / LARGEST_MERGE_RATIO < areas[concept] / areas[other] < LARGEST_MERGE_RATIO
        ]
        if rng.uniform() < difficulty.merged and mergeable:
            members.append(int(rng.choice(mergeable)))
            merged.add(members[1])
        # One draw each, used or not: a fault of one mask does not change the luck of the next.
        lost, halved, leaking, mistaken = rng.uniform(size=4)
        if lost < (difficulty.stuff_dropped if concept in stuff else difficulty.dropped):
            continue
        weights = np.array([areas[member] for member in members], float)
        clean = (weights[:, None] * concepts[members]).sum(0) / weights.sum()
        if leaking < difficulty.context_leak and neighbours:
            length = np.array([borders[concept, other] for other in neighbours], float)
            share = rng.uniform(*difficulty.leak_share)
            clean = (1 - share) * clean + share * concepts[rng.choice(neighbours, p=length / length.sum())]
        if mistaken < difficulty.wrong_embedding and concept not in stuff:  # nobody takes a bare wall for a mug
            clean = concepts[rng.choice([other for other in same_level if other != concept])]
        whole = _crop(np.isin(ids, members), round(4 * difficulty.border_jitter_px * scale) + 1)
        for piece in _halves(whole, rng) if halved < difficulty.split else [whole]:
            masks.append(_jitter(piece, ids.shape, difficulty.border_jitter_px * scale, JITTER_LENGTH_PX * scale, rng))
            features.append(_noisy(clean, piece.inside.sum() / scale**2, difficulty, rng))
    return masks, np.array(features, np.float32).reshape(-1, concepts.shape[1])


def _border_lengths(ids: np.ndarray) -> dict[tuple[int, int], int]:
    """Counts the pixel pairs on the border of each two neighbouring ids, in both orders."""
    pairs = np.concatenate(
        [np.stack([ids[:, :-1], ids[:, 1:]], -1).reshape(-1, 2), np.stack([ids[:-1], ids[1:]], -1).reshape(-1, 2)]
    )
    pairs, counts = np.unique(pairs[pairs[:, 0] != pairs[:, 1]], axis=0, return_counts=True)
    lengths: dict[tuple[int, int], int] = {}
    for (one, other), count in zip(pairs.tolist(), counts.tolist(), strict=True):
        for pair in ((one, other), (other, one)):
            lengths[pair] = lengths.get(pair, 0) + count
    return lengths


def _crop(mask: np.ndarray, margin: int) -> _Mask:
    rows, columns = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
    top, left = max(rows[0] - margin, 0), max(columns[0] - margin, 0)
    return _Mask(top, left, mask[top : rows[-1] + margin + 1, left : columns[-1] + margin + 1])


def _halves(mask: _Mask, rng: np.random.Generator) -> list[_Mask]:
    """Cuts a mask along a line through one of its own pixels."""
    y, x = np.nonzero(mask.inside)
    pick, angle = rng.integers(len(y)), rng.uniform(0, np.pi)
    rows, columns = np.indices(mask.inside.shape)
    side = (rows - y[pick]) * np.cos(angle) + (columns - x[pick]) * np.sin(angle) > 0
    return [mask._replace(inside=mask.inside & half) for half in (side, ~side) if (mask.inside & half).any()]


def _jitter(mask: _Mask, shape: tuple[int, ...], sigma: float, length: float, rng: np.random.Generator) -> _Mask:
    """Displaces a mask by a smooth random field; pixels past the photograph's edge repeat the edge."""
    noise = rng.normal(size=(2, *mask.inside.shape)) * sigma * 2 * length * np.sqrt(np.pi)
    shift = np.stack([gaussian_filter(component, length, mode="wrap", truncate=3) for component in noise])
    source = np.indices(mask.inside.shape) + np.round(shift).astype(int)
    height, width = mask.inside.shape
    return mask._replace(inside=mask.inside[source[0].clip(0, height - 1), source[1].clip(0, width - 1)])


def _noisy(clean: np.ndarray, area: float, difficulty: Difficulty, rng: np.random.Generator) -> np.ndarray:
    """Adds isotropic noise, more to small masks, and returns a unit feature."""
    low, high = difficulty.noise_energies
    size = np.clip(np.log(max(area, 1) / SMALLEST_MASK_PX) / np.log(LARGE_MASK_PX / SMALLEST_MASK_PX), 0, 1)
    noise = rng.normal(size=clean.shape) * np.sqrt((high - (high - low) * size) / len(clean))
    return _unit(_unit(clean) + noise)


def _paint(masks: Sequence[_Mask], features: np.ndarray, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Paints masks over one another, the smallest on top, and leaves out those that end up wholly covered."""
    ids = np.full(shape, -1)
    for row in np.argsort([-int(mask.inside.sum()) for mask in masks], kind="stable").tolist():
        top, left, inside = masks[row]
        ids[top : top + inside.shape[0], left : left + inside.shape[1]][inside] = row
    kept, compact = np.unique(ids[ids >= 0], return_inverse=True)
    ids[ids >= 0] = compact
    return features[kept], ids


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
