"""Typed batches: the contract between data and models."""

from typing import NamedTuple

from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from lightning_modules.functional.cameras import Camera


class PromptLabels(NamedTuple):
    """The labelled prompts of one view, in the LERF-OVS sense: one entry per distinct category of the frame.

    Attributes:
        prompts: P category names.
        embeddings: [P, C] unit text embeddings.
        masks: [P, H, W] bool; all objects of the category united.
        boxes: P tensors [B_p, 4] float32, x1 y1 x2 y2 in pixels, one per object.
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


def single_view(views: list[LanguageView]) -> LanguageView:
    """Collates a batch of one view (images differ in masks and prompts, so a batch is one view per process)."""
    (view,) = views
    return view
