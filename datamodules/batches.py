"""Typed batches: the contract between data and models."""

from typing import NamedTuple, TypeVar

from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from lightning_modules.functional.cameras import Camera
from lightning_modules.functional.gaussians import GaussianScene


class PromptLabels(NamedTuple):
    """The labelled prompts of one view, in the LERF-OVS sense: one entry per distinct category of the frame.

    Attributes:
        prompts: P category names.
        embeddings: [P, C] unit text embeddings.
        masks: [P, H, W] bool; all objects of the category united. Of the view's size, or of the labels' own.
        boxes: P tensors [B_p, 4] float32, x1 y1 x2 y2 in pixels of the masks, one per object; () where the labels are
            masks alone.
    """

    prompts: tuple[str, ...]
    embeddings: Float[Tensor, "prompts channels"]
    masks: Bool[Tensor, "prompts height width"]
    boxes: tuple[Float[Tensor, "_ 4"], ...]


class LanguageView(NamedTuple):
    """One posed photograph with its masks' language features.

    Attributes:
        name: Image stem; labels and features were matched to the camera by it.
        view_id: Position of the view in the data module's list of all views, sorted by name.
        camera: The camera at the size of the maps.
        image: [H, W, 3] uint8 RGB, or None where there is no photograph.
        mask_ids: [L, H, W] int32 row of ``mask_features`` for each level, -1 = no mask. None where a view has labels
            only.
        mask_features: [M, C] float32 unit CLIP features of the view's masks. None where ``mask_ids`` is.
        labels: The prompts to evaluate in this view, or None.
    """

    name: str
    view_id: int
    camera: Camera
    image: UInt8[Tensor, "height width 3"] | None
    mask_ids: Int[Tensor, "levels height width"] | None
    mask_features: Float[Tensor, "masks channels"] | None
    labels: PromptLabels | None


class PosedView(NamedTuple):
    """One posed photograph, to train or judge a scene's colours with.

    Attributes:
        name: Image stem.
        view_id: Position of the view in the data module's list of all views, sorted by name.
        camera: The camera at the size of the image.
        image: [H, W, 3] uint8 RGB.
    """

    name: str
    view_id: int
    camera: Camera
    image: UInt8[Tensor, "height width 3"]


class PixelTruth(NamedTuple):
    """What each pixel of a photograph truly shows; synthetic worlds know it.

    Attributes:
        ids: [3, H, W] row of ``features`` for the part, the object and the group of objects that a pixel belongs to.
        features: [T, C] unit features.
    """

    ids: Int[Tensor, "3 height width"]
    features: Float[Tensor, "things channels"]


class Photograph(NamedTuple):
    """One photograph to find masks in.

    Attributes:
        name: Image stem.
        image: [H, W, 3] uint8 RGB; empty where the file cannot be read.
        problem: Why it cannot be read, or None.
        is_done: Its features are written already; it is here because it shares a batch with one whose are not.
        truth: What its pixels show, or None for a real photograph.
    """

    name: str
    image: UInt8[Tensor, "height width 3"]
    problem: str | None = None
    is_done: bool = False
    truth: PixelTruth | None = None


class StoredField(NamedTuple):
    """A language field as LangSplatV2 stores it: a logit for every entry of every level.

    Attributes:
        scene: The Gaussians.
        logits: [N, G, K] coefficients before softmax and top-k; a group G is a layer of a level, level by level.
        codebooks: [L, layers, K, C] entries of each level.
    """

    scene: GaussianScene
    logits: Float[Tensor, "gaussians groups size"]
    codebooks: Float[Tensor, "levels layers size channels"]


class DepthMaps(NamedTuple):
    """Depth maps of one size.

    Attributes:
        names: Path of each below the root, without suffix.
        images: [B, 1, H, W] float32 depth on the scale of the data module's ``depth_range``: 0 = none, above where
            there is any.
        kind_ids: [B] int64 kind of each one's scene, as a position in the data module's ``kinds``; -1 = unknown.
    """

    names: tuple[str, ...]
    images: Float[Tensor, "maps 1 height width"]
    kind_ids: Int[Tensor, " maps"]

    @property
    def valid(self) -> Bool[Tensor, "maps 1 height width"]:
        """Pixels with depth."""
        return self.images > 0


Item = TypeVar("Item")


def single_view(items: list[Item]) -> Item:
    """Collates a batch of one (images differ in size, masks and prompts, so a batch is one item per process)."""
    (item,) = items
    return item
