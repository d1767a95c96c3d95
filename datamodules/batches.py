"""Typed batches: the contract between data and models."""

from typing import NamedTuple, TypeVar

from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from lightning_modules.functional.cameras import Camera
from lightning_modules.functional.splatting.gaussians import GaussianScene


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


class SceneFrames(NamedTuple):
    """B scenes with the points of some of their frames, as the Bi-Fusion encoder takes them.

    Frames and scenes are ragged where they must be: each scene has its own number of points, and scenes with fewer than
    V frames are padded (``has_frame``). The depth map is registered to the image's camera but may have another size.

    Attributes:
        scenes: B names, such as ``scene0011_00``.
        frame_ids: [B, V] int64 number of each frame in its recording; -1 where there is none.
        has_frame: [B, V] bool, False where padded.
        points: B tensors [N_b, 6] float32: x y z in metres in the scene's own (unaligned) world, r g b in 0 to 1.
        intrinsics: [B, V, 3, 3] float32 of the images at ``image_size``; pixel (0, 0) has its centre at (0.5, 0.5).
        camera_from_world: [B, V, 4, 4] float32 OpenCV cameras.
        image_size: Height and width of the images as the encoder sees them, also where only their tokens are here.
        images: [B, V, H, W, 3] uint8 RGB, squashed to ``image_size``; None where tokens come from a store.
        depth: [B, V, h, w] float32 metres, 0 = none, or None.
        tokens: [B, V, D, gh, gw] cached grid of the frozen image tower, float16; None where there are images.
        clip_global: [B, V, C] unit image embeddings from the same store, float16, or None.
        labels: Class table (``scannet20``, ``scannet200``) to B tensors [N_b] int64 class index in that table, -1 =
            none or ignored. Empty where nothing is labelled.
        instances: B tensors [N_b] int64 object id in the scene, -1 = none; None where unknown.
        superpoints: B tensors [N_b] int64 contiguous group of each point, or None.
        vertex_ids: B tensors [N_b] int64 the same surface point has the same id in all frames of its scene (a mesh
            vertex, or its voxel), -1 = no vertex within 5 cm; None where unknown.
    """

    scenes: tuple[str, ...]
    frame_ids: Int[Tensor, "scenes views"]
    has_frame: Bool[Tensor, "scenes views"]
    points: tuple[Float[Tensor, "_ 6"], ...]
    intrinsics: Float[Tensor, "scenes views 3 3"]
    camera_from_world: Float[Tensor, "scenes views 4 4"]
    image_size: tuple[int, int]
    images: UInt8[Tensor, "scenes views height width 3"] | None
    depth: Float[Tensor, "scenes views depth_height depth_width"] | None
    tokens: Float[Tensor, "scenes views channels grid_height grid_width"] | None
    clip_global: Float[Tensor, "scenes views text"] | None
    labels: dict[str, tuple[Int[Tensor, " _"], ...]]
    instances: tuple[Int[Tensor, " _"], ...] | None
    superpoints: tuple[Int[Tensor, " _"], ...] | None
    vertex_ids: tuple[Int[Tensor, " _"], ...] | None


class SparseSdf(NamedTuple):
    """The truncated signed distance of B shapes at the grid points near their surfaces.

    Grid point (i, j, k) of a shape of resolution R lies at ``2 * (i, j, k) / (R - 1) - 1`` in the cube [-1, 1]^3, in
    which the shape fills [-0.95, 0.95].

    Attributes:
        names: B shapes.
        coords: [N, 4] int32 rows (shape, x, y, z); a shape's rows follow each other, sorted by their key
            ``(x * R + y) * R + z``, none twice.
        sdf: [N, 1] float32 in -1 to 1: signed distance over the band, negative inside.
        resolution: R, a multiple of the network's down factor.
        band: Of the truncation, in voxels of width ``2 / (R - 1)``.
    """

    names: tuple[str, ...]
    coords: Int[Tensor, "voxels 4"]
    sdf: Float[Tensor, "voxels 1"]
    resolution: int
    band: float


Item = TypeVar("Item")


def single_view(items: list[Item]) -> Item:
    """Collates a batch of one (images differ in size, masks and prompts, so a batch is one item per process)."""
    (item,) = items
    return item
