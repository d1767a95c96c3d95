"""What stands in for a frozen CLIP on synthetic rooms: text embeddings, and tokens with the faults of CLIP's grid.

No weights are needed, and nothing here is CLIP: tokens are drawn from what the grid's cells truly show. Their faults
are those by which dense CLIP features fail on real rooms: neighbours and the whole image leak in, objects look like
their relatives, some always and some in some views, blank walls look like anything, some prompts attract everything.
The numbers were set so that the teacher fused over views has an mIoU of about 0.4 on ScanNet20's classes, a little
above published CLIP-only pipelines on real scans (CNS 0.335, OVO-mapping 0.373; synthetic rooms have less clutter).
They were not tuned on what a trained model gains over it.
"""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from scipy.linalg import hadamard
from scipy.ndimage import gaussian_filter

from datamodules.readers.scannet.class_tables import SCANNET20, SCANNET200

NUM_TEXT, NUM_CHANNELS, GRID = 512, 768, 14

# Cosines of CLIP ViT-B/16 as measured on photos and prompts; the same as in the tabletop world.
TEXT_SIMILARITY = 0.75  # of two unrelated prompts: the text modality's shared direction
IMAGE_SIMILARITY = 0.64  # of two unrelated image features
OTHER_SIMILARITY, OWN_SIMILARITY = 0.222, 0.335  # of an image feature to another prompt, and to its own
TEMPLATE, TEMPLATE_SHIFT = "a {} in a scene", 0.2  # OpenScene's, and how far it moves a prompt
KINSHIP = 0.7  # share of the family's direction in a name's meaning: "chair" and "sofa" have a cosine of 0.33

BLUR_CELLS = 0.8  # attention of the last block mixes neighbours: FeatUp and JAFAR gain by undoing about one cell
CONTEXT = 0.2  # every token carries the whole image (the [CLS] objective), more where there is little to see
CONTEXT_OF_STRUCTURE = 0.45  # of walls, floors and ceilings: blank patches are known to hold global content
CONFUSION_OF_OBJECT = (0.6, 2.4)  # Beta: how far an object looks like a relative of its class in all views
CONFUSION_OF_VIEW = 0.25  # standard deviation of that from view to view
CONFUSED_WITH_ANY = 0.25  # share of objects taken for a class outside the family
CLASS_BIAS = 0.12  # of image features towards each prompt, the same in all photos: some prompts attract
NOISE = 0.8  # norm of the white noise of a token beside a feature of length one
TOKEN_SCALE = 10.0  # length of a token's feature in text space; CLIP's are about ten before normalisation
APPEARANCE = 6.0  # of the colours of a cell in the channels that the projection drops
APPEARANCE_NOISE = 0.3  # standard deviation in each of those

FAMILIES: tuple[tuple[str, ...], ...] = (
    ("chair", "sofa", "couch", "armchair", "office chair", "stool", "bench", "ottoman", "bed"),
    ("table", "desk", "counter", "coffee table", "end table", "dining table"),
    ("cabinet", "bookshelf", "shelf", "refrigerator", "kitchen cabinet", "nightstand", "tv stand", "dresser", "closet",
     "bathroom cabinet", "storage bin", "file cabinet"),
    ("door", "window", "picture", "whiteboard", "mirror", "bathroom stall door", "shower door"),
    ("curtain", "shower curtain", "towel", "blanket", "clothes", "pillow", "cushion"),
    ("toilet", "sink", "bathtub", "toilet paper", "shower"),
    ("wall", "floor", "ceiling"),
    ("otherfurniture", "trash can", "box", "lamp", "monitor", "tv stand", "bag", "computer tower"),
)  # fmt: skip
SYNONYMS = {"couch": "sofa"}
SPECIAL_CASES = {  # ScanNet200's kinds of a class of ScanNet20
    "armchair": "chair",
    "office chair": "chair",
    "coffee table": "table",
    "kitchen cabinet": "cabinet",
    "tv stand": "otherfurniture",
    "trash can": "otherfurniture",
}
STRUCTURE = ("wall", "floor", "ceiling")


class TextSpace(NamedTuple):
    """Names and directions.

    Attributes:
        names: Of the classes of both tables.
        meanings: [names, C] unit meaning of each, without what all texts share.
        texts: [C] unit embedding of each name, alone and in a template.
        image_direction: [C] what all image features share, bias towards some prompts included.
        projection: [D, C] from tokens to text space, orthonormal columns.
        null_space: [D, D - C] what it drops.
    """

    names: tuple[str, ...]
    meanings: Float[np.ndarray, "names text"]
    texts: dict[str, np.ndarray]
    image_direction: Float[np.ndarray, " text"]
    projection: Float[np.ndarray, "channels text"]
    null_space: Float[np.ndarray, "channels dropped"]

    def meaning(self, name: str) -> Float[np.ndarray, " text"]:
        """Returns the meaning of one name."""
        return self.meanings[self.names.index(name)]


class DrawnTokens(NamedTuple):
    """What the stand-in makes of one photo.

    Attributes:
        tokens: [D, rows, columns] float32.
        clip_global: [C] unit.
    """

    tokens: Float[np.ndarray, "channels rows columns"]
    clip_global: Float[np.ndarray, " text"]


def text_space(rng: np.random.Generator) -> TextSpace:
    """Draws the meanings of all class names; relatives are close."""
    names = tuple(dict.fromkeys((*SCANNET20.names, *SCANNET200.names)))
    num_directions = 3 + len(FAMILIES) + len(names)
    rows = rng.permutation(NUM_TEXT)[:num_directions]
    signs = rng.choice([-1.0, 1.0], NUM_TEXT)
    directions = hadamard(NUM_TEXT)[rows] * signs / np.sqrt(NUM_TEXT)  # orthonormal to the last bit
    text_modality, off_text, template = directions[:3]
    of_family, own = directions[3 : 3 + len(FAMILIES)], dict(zip(names, directions[3 + len(FAMILIES) :], strict=True))
    meanings = {}
    for name in names:
        parent = SYNONYMS.get(name) or SPECIAL_CASES.get(name) or name
        family = next((of_family[number] for number, names in enumerate(FAMILIES) if parent in names), 0)
        meaning = (
            own[parent] + KINSHIP * family + (0 if parent == name else (0.2 if name in SYNONYMS else 0.6) * own[name])
        )
        meanings[name] = meaning / np.linalg.norm(meaning)
    stacked = np.stack([meanings[name] for name in names])
    plain = np.sqrt(TEXT_SIMILARITY) * text_modality + np.sqrt(1 - TEXT_SIMILARITY) * stacked
    templated = (plain + TEMPLATE_SHIFT * template) / np.sqrt(1 + TEMPLATE_SHIFT**2)
    overlap = OTHER_SIMILARITY / np.sqrt(IMAGE_SIMILARITY * TEXT_SIMILARITY)
    shared = np.sqrt(IMAGE_SIMILARITY) * (overlap * text_modality + np.sqrt(1 - overlap**2) * off_text)
    bias = CLASS_BIAS * _meaning_strength() * np.stack([own[name] for name in names]).T @ rng.normal(size=len(names))
    # A rotation of three by three between blocks of 256 is orthonormal, too.
    mixing = np.array([[1, 1, 1], [2, -1, -1], [0, 1, -1]]) / np.sqrt([[3], [6], [2]])
    whole = np.kron(mixing, hadamard(256) / 16) * rng.choice([-1.0, 1.0], NUM_CHANNELS)[:, None]
    texts = {
        **dict(zip(names, plain, strict=True)),
        **{TEMPLATE.format(name): text for name, text in zip(names, templated, strict=True)},
    }
    return TextSpace(names, stacked, texts, shared + bias, whole[:, :NUM_TEXT], whole[:, NUM_TEXT:])


def _meaning_strength() -> float:
    """Returns the length of the meaning in an image feature, by which it is closer to its own prompt."""
    return (OWN_SIMILARITY - OTHER_SIMILARITY) / np.sqrt(1 - TEXT_SIMILARITY)


class Teacher:
    """Looks at the photos of one room, with opinions on its objects that last from view to view.

    Args:
        space: Texts and directions.
        categories: Of the things of the room, by number.
        rng: Draws the opinions and all noise.
    """

    def __init__(self, space: TextSpace, categories: list[str], rng: np.random.Generator) -> None:
        self.space, self.rng = space, rng
        self._true = np.stack([space.meaning(name) for name in categories])
        self._mistaken = np.stack([space.meaning(self._relative(name)) for name in categories])
        self._doubt = rng.beta(*CONFUSION_OF_OBJECT, len(categories))
        is_structure = np.array([name in STRUCTURE for name in categories])
        rotation = np.concatenate([space.projection, space.null_space], 1).T
        self._rotation = np.ascontiguousarray(rotation, np.float32)
        self._context = np.where(is_structure, CONTEXT_OF_STRUCTURE, CONTEXT)

    def look(
        self, thing_ids: Int[np.ndarray, "height width"], image: UInt8[np.ndarray, "height width 3"]
    ) -> DrawnTokens:
        """Returns tokens of a photo by what its pixels show."""
        space, rng, strength = self.space, self.rng, _meaning_strength()
        doubt = np.clip(self._doubt + rng.normal(0, CONFUSION_OF_VIEW, len(self._doubt)), 0, 1)[:, None]
        seen_as = (1 - doubt) * self._true + doubt * self._mistaken
        shares = cell_shares(thing_ids, len(self._doubt))
        overall = shares.mean((0, 1))
        blurred = gaussian_filter(shares, (BLUR_CELLS, BLUR_CELLS, 0), mode="nearest").reshape(GRID * GRID, -1)
        leak = (blurred @ self._context)[:, None]
        mixed = _product((1 - leak) * blurred + leak * overall, seen_as)
        features = space.image_direction + strength * mixed
        dropped = APPEARANCE * self._appearance(image)
        clean = np.concatenate([TOKEN_SCALE * features, dropped], 1).astype(np.float32)
        noise = rng.standard_normal(clean.shape, np.float32)
        noise[:, :NUM_TEXT] *= TOKEN_SCALE * NOISE / np.sqrt(NUM_TEXT)
        noise[:, NUM_TEXT:] *= APPEARANCE_NOISE
        tokens = _product(clean + noise, self._rotation)
        whole = space.image_direction + strength * overall @ seen_as
        whole = whole + rng.normal(0, 0.5 * NOISE / np.sqrt(NUM_TEXT), whole.shape)
        return DrawnTokens(tokens.T.reshape(NUM_CHANNELS, GRID, GRID), whole / np.linalg.norm(whole))

    def _relative(self, name: str) -> str:
        """Draws what an object may be mistaken for."""
        families = [family for family in FAMILIES if name in family]
        known = [other for family in families for other in family if other != name and other in self.space.names]
        if not known or self.rng.random() < CONFUSED_WITH_ANY:
            known = [other for other in SCANNET20.names if other != name]
        return str(self.rng.choice(known))

    def _appearance(self, image: np.ndarray) -> np.ndarray:
        """Returns the mean colours of the cells in the channels that the projection drops."""
        rows, columns = (np.linspace(0, size, GRID + 1).astype(int)[:-1] for size in image.shape[:2])
        sums = np.add.reduceat(np.add.reduceat(image.astype(np.float64) / 255, rows, 0), columns, 1)
        counts = np.outer(np.diff([*rows, image.shape[0]]), np.diff([*columns, image.shape[1]]))
        directions = hadamard(NUM_CHANNELS - NUM_TEXT)[1:4] / np.sqrt(NUM_CHANNELS - NUM_TEXT)
        return (sums / counts[..., None] - 0.5).reshape(GRID * GRID, 3) @ directions


def _product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Multiplies matrices by torch, whose threads sleep afterwards; NumPy's spin on and take the cores from others."""
    return (torch.from_numpy(a) @ torch.from_numpy(b)).numpy()


def cell_shares(
    thing_ids: Int[np.ndarray, "height width"], num_things: int
) -> Float[np.ndarray, "rows columns things"]:
    """Returns which share of each cell of the grid shows each thing; the photo is squashed to a square."""
    rows, columns = (np.arange(size) * GRID // size for size in thing_ids.shape)
    cells = (rows[:, None] * GRID + columns) * num_things + thing_ids
    counts = np.bincount(cells.ravel(), minlength=GRID * GRID * num_things).reshape(GRID, GRID, num_things)
    return counts / counts.sum(2, keepdims=True)
