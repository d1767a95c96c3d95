"""A trained field as queries need it: Gaussians with codes, codebooks, and what relevancy is measured against."""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lightning_modules.functional.cameras import Camera, resize_camera
from lightning_modules.functional.colour_maps import feature_colours
from lightning_modules.functional.language_field.coefficient_space import (
    decoded_norms,
    gram_matrix,
    normalized_coefficients,
    relevancy,
)
from lightning_modules.functional.language_field.sparse_codes import SparseCodes
from lightning_modules.functional.splatting.gaussians import GaussianScene
from lightning_modules.functional.splatting.rasterization import PreparedView, render_codes


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


def render_language(
    language: LanguageScene, view: PreparedView, passes: Literal["quick", "standard"] = "quick"
) -> LanguageMap:
    """Splats the codes of a view.

    Args:
        language: The scene.
        view: The view.
        passes: ``quick`` splats all levels in one pass; ``standard``, as LangSplatV2's evaluation without
            ``--quick_render``, each level by itself. Both give the same map.
    """
    if passes == "quick":
        weights, alpha = render_codes(view, language.codes)
        return language_map(language, view.camera, weights, alpha)
    levels = range(language.num_levels)
    rendered = [render_codes(view, level_codes(language.codes, level, language.num_levels)) for level in levels]
    weights = torch.cat([level for level, _ in rendered], dim=1)
    return language_map(language, view.camera, weights, rendered[0][1])


def level_codes(codes: SparseCodes, level: int, num_levels: int) -> SparseCodes:
    """Takes one level's coefficients out of the codes of all levels."""
    active, channels = codes.values.shape[1] // num_levels, codes.num_channels // num_levels
    columns = slice(level * active, (level + 1) * active)
    return SparseCodes(codes.channel_ids[:, columns] - level * channels, codes.values[:, columns], channels)


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


def resize_language_map(language: LanguageScene, view: LanguageMap, width: int, height: int) -> LanguageMap:
    """Resizes the unit features of a view bilinearly, as LangSplatV2's ``eval_mip_nerf360.py`` does before relevancy.

    Features are normalised at the size of the view and not again: between two features a pixel's is shorter than one.
    Decoding is linear, so the coefficients of unit features are resized instead, with the same result. There is no
    antialiasing, as in the torchvision 0.13 which the script is pinned to.
    """
    size = (view.camera.height, view.camera.width)
    units = [
        normalized_coefficients(weights, gram_matrix(codebook))
        for weights, codebook in zip(level_weights(language, view.weights), language.codebooks, strict=True)
    ]
    maps = torch.cat([*units, view.alpha[:, None]], dim=1).T.unflatten(1, size)
    resized = F.interpolate(maps[None], (height, width), mode="bilinear", align_corners=False)[0].flatten(1)
    weights, alpha = resized[:-1].T.contiguous(), resized[-1]
    norms = alpha.new_ones(language.num_levels, width * height)
    return LanguageMap(resize_camera(view.camera, width, height), weights, norms, alpha)


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
    levels = zip(level_weights(language, view.weights), language.codebooks, entry_usage(language), strict=True)
    maps = [
        feature_colours(weights, codebook, num_layers=language.num_layers, usage=usage)
        for weights, codebook, usage in levels
    ]
    return torch.stack(maps).unflatten(1, (view.camera.height, view.camera.width))


def entry_usage(language: LanguageScene) -> Float[Tensor, "levels entries"]:
    """Returns how much each entry counts in the pictures of its level.

    That is the square root of its coefficients' sum over the Gaussians: a wall, of many Gaussians, does not decide on
    all colours, and entries which another level uses do not either.
    """
    codes, sums = language.codes, language.codebooks.new_zeros(language.codes.num_channels)
    sums.scatter_add_(0, codes.channel_ids.flatten().long(), codes.values.detach().flatten().to(sums))
    return sums.clamp_min(0).sqrt().unflatten(0, (language.num_levels, -1))
