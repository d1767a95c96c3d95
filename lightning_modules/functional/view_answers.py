"""What a language scene shows of one view: pictures, and the answers to prompts."""

from collections.abc import Sequence
from typing import NamedTuple

from jaxtyping import Bool, Float, Int
from torch import Tensor

from lightning_modules.functional.language_scene import (
    LanguageScene,
    feature_colour_maps,
    relevancy_maps,
    render_language,
)
from lightning_modules.functional.lerf_protocol import ProtocolSettings, segment
from lightning_modules.functional.rasterization import PreparedView, render


class ViewAnswer(NamedTuple):
    """The pictures of one view and the answers to P prompts.

    Attributes:
        name: Stem of the view.
        prompts: P prompts.
        rgb: [H, W, 3] the rendered scene, 0..1.
        relevancy: [P, H, W] smoothed relevancy at the chosen level, 0..1.
        masks: [P, H, W] bool.
        levels: [P] chosen level.
        feature_colours: [L, H, W, 3] view-consistent colours of the features: principal components of the codebook.
    """

    name: str
    prompts: tuple[str, ...]
    rgb: Float[Tensor, "height width 3"]
    relevancy: Float[Tensor, "prompts height width"]
    masks: Bool[Tensor, "prompts height width"]
    levels: Int[Tensor, " prompts"]
    feature_colours: Float[Tensor, "levels height width 3"]


def answer_view(
    language: LanguageScene,
    view: PreparedView,
    name: str,
    prompts: Sequence[str],
    embeddings: Float[Tensor, "prompts channels"],
    protocol: ProtocolSettings,
) -> ViewAnswer:
    """Renders a view and answers each prompt at the level that answers it best."""
    size = (view.camera.height, view.camera.width)
    language_map = render_language(language, view)
    segmentation = segment(relevancy_maps(language, language_map, embeddings), protocol)
    return ViewAnswer(
        name,
        tuple(prompts),
        render(language.gaussians, view).rgb.clamp(0, 1).unflatten(0, size),
        segmentation.relevancy,
        segmentation.masks,
        segmentation.levels,
        feature_colour_maps(language, language_map),
    )
