"""A trained field as queries need it: Gaussians with codes, codebooks, and what relevancy is measured against."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_modules.functional.cameras import Camera
from lightning_modules.functional.coefficient_space import decoded_norms, gram_matrix, relevancy
from lightning_modules.functional.colour_maps import feature_colours
from lightning_modules.functional.gaussians import GaussianScene
from lightning_modules.functional.rasterization import PreparedView, render_codes
from lightning_modules.functional.sparse_codes import SparseCodes


class LanguageScene(NamedTuple):
    """Gaussians that answer in words.

    Attributes:
        gaussians: The scene.
        codes: Coefficients of every Gaussian at all levels; channel (level * layers + layer) * size + entry. Gaussians
            without language have values of zero.
        codebooks: [L, K, C] entries of each level, its K = layers * size entries layer by layer.
        negatives: [J, C] unit embeddings that relevancy is measured against.
        num_layers: Residual layers of a codebook.
    """

    gaussians: GaussianScene
    codes: SparseCodes
    codebooks: Float[Tensor, "levels entries channels"]
    negatives: Float[Tensor, "negatives channels"]
    num_layers: int = 1

    @property
    def num_levels(self) -> int:
        """L."""
        return self.codebooks.shape[0]


class LanguageMap(NamedTuple):
    """One view of a language scene before any prompt; with it a prompt costs one small matrix product.

    Attributes:
        camera: The camera.
        weights: [P, L * K] coefficients of each pixel (P = H * W) at all levels.
        norms: [L, P] lengths of the decoded features, 0 where nothing is.
        alpha: [P] opacity of the scene.
    """

    camera: Camera
    weights: Float[Tensor, "pixels coefficients"]
    norms: Float[Tensor, "levels pixels"]
    alpha: Float[Tensor, " pixels"]


def render_language(language: LanguageScene, view: PreparedView) -> LanguageMap:
    """Splats the codes of all levels in one pass."""
    weights, alpha = render_codes(view, language.codes)
    return language_map(language, view.camera, weights, alpha)


def language_map(
    language: LanguageScene,
    camera: Camera,
    weights: Float[Tensor, "pixels coefficients"],
    alpha: Float[Tensor, " pixels"],
) -> LanguageMap:
    """Adds to a weight map what every prompt needs of it."""
    norms = [
        decoded_norms(part, gram_matrix(codebook))
        for part, codebook in zip(level_weights(language, weights), language.codebooks, strict=True)
    ]
    return LanguageMap(camera, weights, torch.stack(norms), alpha)


def level_weights(
    language: LanguageScene, weights: Float[Tensor, "pixels coefficients"]
) -> tuple[Float[Tensor, "pixels entries"], ...]:
    """Splits a weight map into its levels, without copies."""
    return weights.split(language.codebooks.shape[1], dim=1)


def relevancy_maps(
    language: LanguageScene, view: LanguageMap, embeddings: Float[Tensor, "prompts channels"]
) -> Float[Tensor, "levels prompts height width"]:
    """Returns LERF's relevancy of each prompt at each level, 0 to 1, exactly and without decoding a feature."""
    levels = zip(level_weights(language, view.weights), language.codebooks, view.norms, strict=True)
    maps = [
        relevancy(weights, codebook, embeddings, language.negatives, norms=norms).T
        for weights, codebook, norms in levels
    ]
    return torch.stack(maps).unflatten(2, (view.camera.height, view.camera.width))


def feature_colour_maps(language: LanguageScene, view: LanguageMap) -> Float[Tensor, "levels height width 3"]:
    """Returns pictures of the features in which a feature has the same colour in every view."""
    levels = zip(level_weights(language, view.weights), language.codebooks, strict=True)
    maps = [feature_colours(weights, codebook, num_layers=language.num_layers) for weights, codebook in levels]
    return torch.stack(maps).unflatten(1, (view.camera.height, view.camera.width))
