"""What a language scene shows of one view: pictures, the answers to prompts, the classes of a list of prompts.

Prompts are answered in blocks, so that memory depends on the block and not on how many are asked.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lightning_modules.functional.answers.language_scene import (
    LanguageMap,
    LanguageScene,
    feature_colour_maps,
    relevancy_maps,
    render_language,
)
from lightning_modules.functional.answers.lerf_protocol import ProtocolSettings, Segmentation, segment
from lightning_modules.functional.splatting.rasterization import PreparedView, render

PROMPT_BLOCK = 8
"""Prompts answered at a time."""

MIN_ALPHA = 0.5
"""Pixels the scene covers less than this belong to no class and have no depth."""


class Prompts(NamedTuple):
    """Texts with their embeddings.

    Attributes:
        texts: P texts.
        embeddings: [P, C] unit embeddings.
    """

    texts: tuple[str, ...]
    embeddings: Float[Tensor, "prompts channels"]


class ViewPictures(NamedTuple):
    """What a view shows before any prompt.

    Attributes:
        rgb: [H, W, 3] the rendered scene, 0..1.
        depth: [H, W] blended camera-space z over alpha, in the unit of the scene.
        alpha: [H, W] opacity.
        feature_colours: [L, H, W, 3] view-consistent colours of the features: principal components of the codebook.
    """

    rgb: Float[Tensor, "height width 3"]
    depth: Float[Tensor, "height width"]
    alpha: Float[Tensor, "height width"]
    feature_colours: Float[Tensor, "levels height width 3"]


class PromptScores(NamedTuple):
    """The answers to P prompts as numbers, at every level.

    Attributes:
        peaks: [L, P] highest smoothed relevancy.
        peak_pixels: [L, P, 2] x and y of the first pixel that has it.
        mean_in_mask: [L, P] mean smoothed relevancy over the mask; 0 where it is empty.
        mask_areas: [L, P] pixels of the mask.
        levels: [P] chosen level.
        level_scores: [L, P] what the level was chosen by.
    """

    peaks: Float[Tensor, "levels prompts"]
    peak_pixels: Int[Tensor, "levels prompts 2"]
    mean_in_mask: Float[Tensor, "levels prompts"]
    mask_areas: Int[Tensor, "levels prompts"]
    levels: Int[Tensor, " prompts"]
    level_scores: Float[Tensor, "levels prompts"]


class PromptAnswers(NamedTuple):
    """The answers to a block of P prompts in one view.

    Attributes:
        prompts: P prompts.
        relevancy: [P, H, W] smoothed relevancy at the chosen level, 0..1.
        masks: [P, H, W] masks at the chosen level.
        scores: The same as numbers, for all levels.
    """

    prompts: tuple[str, ...]
    relevancy: Float[Tensor, "prompts height width"]
    masks: Bool[Tensor, "prompts height width"]
    scores: PromptScores


def view_pictures(language: LanguageScene, view: PreparedView, language_map: LanguageMap) -> ViewPictures:
    """Renders what a view shows before any prompt."""
    size = (view.camera.height, view.camera.width)
    rendered = render(language.gaussians, view)
    return ViewPictures(
        rendered.rgb.clamp(0, 1).unflatten(0, size),
        rendered.depth.unflatten(0, size),
        rendered.alpha.unflatten(0, size),
        feature_colour_maps(language, language_map),
    )


def answer_prompts(
    language: LanguageScene,
    view: LanguageMap,
    prompts: Prompts,
    protocol: ProtocolSettings,
    *,
    block: int = PROMPT_BLOCK,
) -> Iterator[PromptAnswers]:
    """Answers each prompt at the level that answers it best, a block of prompts at a time.

    Args:
        language: The scene.
        view: Its map of the view.
        prompts: What is asked.
        protocol: How relevancy becomes masks and how the level is chosen.
        block: Prompts in one answer; the last may have fewer.
    """
    for start in range(0, len(prompts.texts), block):
        maps = relevancy_maps(language, view, prompts.embeddings[start : start + block])
        segmentation = segment(maps, protocol)
        yield PromptAnswers(
            prompts.texts[start : start + block],
            segmentation.relevancy,
            segmentation.masks,
            prompt_scores(segmentation),
        )


def prompt_scores(segmentation: Segmentation) -> PromptScores:
    """Reduces the smoothed relevancy and the masks of prompts to numbers."""
    relevancy, masks = segmentation.level_relevancy, segmentation.level_masks
    peaks, at = relevancy.flatten(2).max(dim=2)
    areas = masks.flatten(2).sum(dim=2)
    sums = torch.stack([(level * mask).sum(dim=(1, 2)) for level, mask in zip(relevancy, masks, strict=True)])
    peak_pixels = torch.stack([at % relevancy.shape[3], at // relevancy.shape[3]], dim=2)
    means = sums / areas.clamp_min(1)
    return PromptScores(peaks, peak_pixels, means, areas, segmentation.levels, segmentation.scores)


def class_map(
    language: LanguageScene,
    view: LanguageMap,
    embeddings: Float[Tensor, "prompts channels"],
    *,
    min_relevancy: float = 0.5,
    block: int = PROMPT_BLOCK,
) -> Int[Tensor, "height width"]:
    """Returns which prompt fits each pixel best, at the level where it fits best, or -1.

    Args:
        language: The scene.
        view: Its map of the view.
        embeddings: Text embeddings of the classes.
        min_relevancy: Below this a pixel is of no class; at 0.5 a prompt fits as well as the best negative phrase.
            Pixels that are covered by less than ``MIN_ALPHA`` are of no class either.
        block: Prompts taken at a time.
    """
    size = (view.camera.height, view.camera.width)
    best = torch.full(size, min_relevancy, device=view.weights.device)
    ids = torch.full(size, -1, dtype=torch.int64, device=view.weights.device)
    for start in range(0, len(embeddings), block):
        own, own_ids = relevancy_maps(language, view, embeddings[start : start + block]).amax(dim=0).max(dim=0)
        is_better = own > best
        best, ids = torch.where(is_better, own, best), torch.where(is_better, own_ids + start, ids)
    return torch.where(view.alpha.unflatten(0, size) >= MIN_ALPHA, ids, -1)


def nearest_prompts(
    language: LanguageScene, view: LanguageMap, pixel_id: int, embeddings: Float[Tensor, "prompts channels"]
) -> Float[Tensor, "levels prompts"]:
    """Returns the relevancy of each prompt at one pixel, at every level: what is here.

    Args:
        language: The scene.
        view: Its map of the view.
        pixel_id: y * width + x.
        embeddings: Text embeddings of the prompts.

    Raises:
        ValueError: If the pixel is outside the view.
    """
    camera = view.camera
    if not 0 <= pixel_id < camera.num_pixels:
        raise ValueError(
            f"pixel_id is {pixel_id}; allowed in a view of {camera.width} x {camera.height}: 0 to "
            f"{camera.num_pixels - 1}, y * width + x."
        )
    pixel = slice(pixel_id, pixel_id + 1)
    here = LanguageMap(camera._replace(width=1, height=1), view.weights[pixel], view.norms[:, pixel], view.alpha[pixel])
    return relevancy_maps(language, here, embeddings)[:, :, 0, 0]


class ViewAnswer(NamedTuple):
    """The pictures of one view and the answers to prompts in it.

    Attributes:
        name: Stem of the view.
        pictures: What the view shows before any prompt, or None where only answers were asked for.
        answers: The answers, a block at a time, each computed when it is asked for, once.
        classes: Prompts among which every pixel was given one.
        class_ids: [H, W] number of each pixel's class, -1 none; None without classes.
    """

    name: str
    pictures: ViewPictures | None
    answers: Iterator[PromptAnswers]
    classes: tuple[str, ...]
    class_ids: Int[Tensor, "height width"] | None


def answer_view(
    language: LanguageScene,
    view: PreparedView,
    name: str,
    prompts: Prompts,
    protocol: ProtocolSettings,
    *,
    classes: Prompts | None = None,
    with_pictures: bool = True,
    passes: Literal["quick", "standard"] = "quick",
) -> ViewAnswer:
    """Renders a view and answers prompts in it.

    Args:
        language: The scene.
        view: The view.
        name: Its name.
        prompts: What is asked.
        protocol: How relevancy becomes masks and how the level is chosen.
        classes: Prompts among which every pixel gets one.
        with_pictures: Whether to render colour, depth and features as well.
        passes: See ``render_language``.
    """
    language_map = render_language(language, view, passes)
    return ViewAnswer(
        name,
        view_pictures(language, view, language_map) if with_pictures else None,
        answer_prompts(language, language_map, prompts, protocol),
        () if classes is None else classes.texts,
        None if classes is None else class_map(language, language_map, classes.embeddings),
    )
