"""OpenGaussian's protocol of 3D selection (arXiv 2406.02058): Gaussians chosen in 3D, judged by their silhouette.

The selection of a prompt is rendered alone, without what may stand in front of it, and its opacity above 0.7 is the
mask. LERF's protocol renders features and looks for the prompt in the picture: the same scene scores 51 there and 10
here, so the two have different names and no common table.

A scene has one selection per prompt. How a method selects is its own affair: OpenGaussian takes the cluster nearest to
the text; here it is ``gaussian_components.select_gaussians``.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lightning_modules.functional.answers.gaussian_components import GaussianSelector, SelectionSettings
from lightning_modules.functional.answers.language_scene import LanguageScene
from lightning_modules.functional.cameras import Camera
from lightning_modules.functional.splatting.gaussians import GaussianScene
from lightning_modules.functional.splatting.rasterization import prepare_view, render

SILHOUETTE_OPACITY = 0.7
"""Least opacity of a mask's pixels; the protocol's."""


class SelectionSilhouettes:
    """The silhouettes of prompts' selections in any view of one scene; each prompt is asked once.

    Args:
        language: The scene.
        settings: How prompts select.
    """

    def __init__(self, language: LanguageScene, settings: SelectionSettings) -> None:
        self.selector = GaussianSelector(language, settings)
        self._chosen: dict[str, GaussianScene] = {}

    def masks(
        self, camera: Camera, prompts: Sequence[str], embeddings: Float[Tensor, "prompts channels"]
    ) -> Bool[Tensor, "prompts height width"]:
        """Returns where each prompt's selection, rendered alone, is opaque."""
        for prompt, embedding in zip(prompts, embeddings, strict=True):
            if prompt not in self._chosen:
                selected = self.selector.select(embedding).selected
                self._chosen[prompt] = GaussianScene(*(part[selected] for part in self.selector.language.gaussians))
        empty = torch.zeros(0, camera.height, camera.width, dtype=torch.bool, device=embeddings.device)
        return torch.stack([silhouette(self._chosen[prompt], camera) for prompt in prompts]) if prompts else empty


def silhouette(gaussians: GaussianScene, camera: Camera) -> Bool[Tensor, "height width"]:
    """Returns where Gaussians, rendered alone, are opaque."""
    alpha = render(gaussians, prepare_view(gaussians, camera)).alpha
    return (alpha > SILHOUETTE_OPACITY).unflatten(0, (camera.height, camera.width))
