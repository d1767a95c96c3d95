"""Scores a language field on one view: against its labels, and against the photograph itself."""

from collections.abc import Mapping

import torch
from torch import Tensor

from datamodules.batches import LanguageView, PromptLabels
from lightning_modules.functional.answers.language_scene import (
    LanguageScene,
    language_map,
    level_weights,
    relevancy_maps,
    resize_language_map,
)
from lightning_modules.functional.answers.selection_protocol import SelectionSilhouettes
from lightning_modules.functional.cameras import Camera, resize_camera
from lightning_modules.functional.language_field.coefficient_space import cosine_similarity_to_targets
from lightning_modules.functional.splatting.image_quality import peak_signal_to_noise
from lightning_modules.functional.splatting.rasterization import PreparedView, render, render_codes
from lightning_modules.metrics.field_evaluation import FieldEvaluation

ALPHA_GATE = 0.5  # pixels the scene covers less than this have no language of their own; reported beside the protocol


def score_labels(
    evaluation: FieldEvaluation,
    scored: str,
    language: LanguageScene,
    view: LanguageView,
    prepared: PreparedView,
    companions: Mapping[str, Tensor],
    *,
    alpha_gate: float = 0.0,
) -> None:
    """Adds the masks and points of a view's labelled prompts.

    Where the labels have another size than the view, the features are resized to it before relevancy.

    Args:
        evaluation: The metrics.
        scored: Name of the figures with ``{}`` for the metric.
        language: The scene.
        view: The view; without labels nothing is added.
        prepared: Its Gaussians.
        companions: Embeddings of the protocol's second prompts, by the first one.
        alpha_gate: Pixels that are covered less have no language.
    """
    labels, camera = view.labels, view.camera
    if labels is None:
        return
    weights, alpha = render_codes(prepared, language.codes)
    rendered = language_map(language, camera, weights * (alpha >= alpha_gate)[:, None], alpha)
    height, width = labels.masks.shape[1:]
    if (height, width) != (camera.height, camera.width):
        rendered = resize_language_map(language, rendered, width, height)
    maps = relevancy_maps(language, rendered, labels.embeddings)
    second_maps = {
        row: relevancy_maps(language, rendered, companions[prompt][None].to(labels.embeddings))[:, 0]
        for row, prompt in enumerate(labels.prompts)
        if prompt in companions
    }
    evaluation.score(scored, maps, labels.prompts, labels.masks, labels.boxes, second_maps)


def score_selection(
    evaluation: FieldEvaluation, scored: str, silhouettes: SelectionSilhouettes, camera: Camera, labels: PromptLabels
) -> None:
    """Adds the silhouettes of what a view's labelled prompts select in 3D, drawn at the size of the labels."""
    height, width = labels.masks.shape[1:]
    masks = silhouettes.masks(resize_camera(camera, width, height), labels.prompts, labels.embeddings)
    evaluation.score_selection(scored, masks, labels.masks, labels.prompts)


def score_photograph(
    evaluation: FieldEvaluation, language: LanguageScene, view: LanguageView, prepared: PreparedView, seed: int
) -> None:
    """Compares with the photograph itself: its colours, and its own features where they were held out.

    Args:
        evaluation: The metrics.
        language: The scene.
        view: The view.
        prepared: Its Gaussians.
        seed: Of the order in which the features are shuffled for the comparison with wrong ones.
    """
    if view.image is not None:
        rendered, photograph = render(language.gaussians, prepared), view.image.flatten(0, 1) / 255
        covered = rendered.alpha >= ALPHA_GATE
        evaluation["test/psnr"].update(peak_signal_to_noise(rendered.rgb, photograph))
        evaluation["test/coverage"].update(covered.float())
        if covered.any():
            psnr = peak_signal_to_noise(rendered.rgb[covered], photograph[covered])
            evaluation["test/psnr_covered"].update(psnr)
    if view.mask_ids is None or view.mask_features is None:
        return
    weight_map, _ = render_codes(prepared, language.codes)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(view.mask_features), generator=generator).to(view.mask_features.device)
    shuffled = view.mask_features[order]
    levels = zip(level_weights(language, weight_map), language.codebooks, view.mask_ids.flatten(1), strict=True)
    for weights, codebook, ids in levels:
        for name, features in {"cosine": view.mask_features, "cosine_shuffled": shuffled}.items():
            cosine = cosine_similarity_to_targets(weights, codebook, features, ids)
            evaluation[f"test/{name}"].update(cosine[ids >= 0])
