"""How good each way to make a language field is, on synthetic worlds whose truth is known.

Every row is scored by the LERF-OVS protocol with pools scaled to the image, at the level that peaks highest, on the
test views of the worlds, with and without the gate of unreliable Gaussians. ``ceiling`` gives every Gaussian its true
feature. CPU seconds are of one thread and of everything a row needs beyond the blending weights of the training views,
which all rows share and which are stated apart. Defaults were chosen on seeds of 100 and more.

    python -m benchmarks.language_field_worlds --seeds 101 102 --difficulty hard --floaters isolated [--recipe-steps 1000]
"""

import argparse
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from benchmarks.langsplat_recipe import TOP_K, TrainingView, dense_step_cpu_s, train_level
from datamodules.batches import PromptLabels
from datamodules.lerf import CeilingField
from datamodules.synthetic.tabletop import TabletopDataModule
from lightning_modules.functional import coefficient_space
from lightning_modules.functional.codebook import residual_assign, residual_kmeans
from lightning_modules.functional.gaussians import GaussianScene
from lightning_modules.functional.lerf_protocol import (
    ProtocolSettings,
    best_level_masks,
    intersection_over_union,
    localize,
    segment,
)
from lightning_modules.functional.lifting import lift_features, mask_weights_of_view
from lightning_modules.functional.mask_denoising import DenoisingSettings, denoise_mask_features
from lightning_modules.functional.mask_table import MaskTable, gather_mask_table
from lightning_modules.functional.rasterization import BlendingWeights, blending_weights, prepare_view, splat_dense
from lightning_modules.functional.relevancy import relevancy
from lightning_modules.functional.reliability import GateSettings, Reliability, gate_gaussians
from lightning_modules.functional.sparse_coding import code_by_histogram, code_by_simplex_pursuit

PROTOCOL = ProtocolSettings(pool_scaling="relative")
MIN_ALPHA = 0.5
DENSE_STEPS = 3


class TestView(NamedTuple):
    """One labelled view and the weights it is rendered with."""

    blending: BlendingWeights
    labels: PromptLabels
    size: tuple[int, int]


class World(NamedTuple):
    """A world in memory, with the blending weights of its views.

    Attributes:
        blending_cpu_s: Processor time to blend the training views, seconds.
        masks_cpu_s: Processor time to sum the weights over the masks, seconds.
    """

    scene: GaussianScene
    training: list[TrainingView]
    masks: MaskTable
    test: list[TestView]
    negatives: Float[Tensor, "negatives channels"]
    ceiling: CeilingField
    blending_cpu_s: float
    masks_cpu_s: float


class DenseField(NamedTuple):
    """A feature of all channels per level and Gaussian."""

    levels: Sequence[Float[Tensor, "gaussians channels"]]

    def gated(self, keep: Bool[Tensor, " gaussians"]) -> "DenseField":
        """Takes the features of the Gaussians that are not kept."""
        return DenseField([features * keep[:, None] for features in self.levels])

    def relevancy(self, blending: BlendingWeights, prompts: Tensor, negatives: Tensor) -> Tensor:
        """Returns [L, P, Q]."""
        return torch.stack([relevancy(splat_dense(blending, level), prompts, negatives) for level in self.levels])


class CodedField(NamedTuple):
    """Coefficients over a codebook per level and Gaussian, written out densely: [N, size] and [size, C] of each level."""

    levels: Sequence[tuple[Float[Tensor, "gaussians size"], Float[Tensor, "size channels"]]]

    def gated(self, keep: Bool[Tensor, " gaussians"]) -> "CodedField":
        """Takes the coefficients of the Gaussians that are not kept."""
        return CodedField([(weights * keep[:, None], codebook) for weights, codebook in self.levels])

    def relevancy(self, blending: BlendingWeights, prompts: Tensor, negatives: Tensor) -> Tensor:
        """Returns [L, P, Q], exact without decoding."""
        return torch.stack(
            [
                coefficient_space.relevancy(splat_dense(blending, weights), codebook, prompts, negatives)
                for weights, codebook in self.levels
            ]
        )


class Scores(NamedTuple):
    """Means over all (view, prompt) pairs, 0 to 1."""

    miou: float
    best_level_miou: float
    localization: float
    alpha_gated_miou: float


def load_world(data: TabletopDataModule) -> World:
    """Reads or writes a world and blends its views."""
    data.prepare_data()
    data.setup()
    training, view_ids, weights = [], [], [[] for _ in range(data.num_levels)]
    blending_s = masks_s = 0.0
    # Nothing of the first view counts: it loads the kernels.
    blending_weights(prepare_view(data.gaussians, data.views[0].camera))
    for view in data.lifting_dataloader():
        started = time.process_time()
        blending = blending_weights(prepare_view(data.gaussians, view.camera))
        blended = time.process_time()
        for level, mask_ids in enumerate(view.mask_ids):
            weights[level].append(mask_weights_of_view(blending, mask_ids.flatten(), len(view.mask_features)))
        blending_s, masks_s = blending_s + blended - started, masks_s + time.process_time() - blended
        training.append(TrainingView(blending, view.mask_ids.flatten(1), view.mask_features))
        view_ids.append(view.view_id)
    started = time.process_time()
    masks = gather_mask_table([view.features for view in training], view_ids, weights)
    masks_s += time.process_time() - started
    test = [
        TestView(
            blending_weights(prepare_view(data.gaussians, view.camera)),
            view.labels,
            (view.camera.height, view.camera.width),
        )
        for view in data.test_dataloader()
    ]
    assert data.ceiling is not None
    return World(
        data.gaussians, training, masks, test, data.negative_embeddings, data.ceiling, blending_s, masks_s
    )


def score(field: DenseField | CodedField, world: World) -> Scores:
    """Queries a field on all test views."""
    ious, best, hits, gated = [], [], [], []
    for view in world.test:
        maps = field.relevancy(view.blending, view.labels.embeddings, world.negatives)
        maps = maps.transpose(1, 2).unflatten(2, view.size)
        found = segment(maps, PROTOCOL)
        ious.append(intersection_over_union(found.masks, view.labels.masks))
        best_masks = best_level_masks(found.level_masks, view.labels.masks)
        best.append(intersection_over_union(best_masks, view.labels.masks))
        hits.append(localize(maps, view.labels.boxes, PROTOCOL).hits)
        # A pixel the scene hardly covers has no language of its own; a zero feature has a relevancy of one half.
        is_covered = (view.blending.alphas >= MIN_ALPHA).unflatten(0, view.size)
        covered = segment(torch.where(is_covered, maps, 0.5), PROTOCOL)
        gated.append(intersection_over_union(covered.masks, view.labels.masks))
    return Scores(*(float(torch.cat(values).float().mean()) for values in (ious, best, hits, gated)))


class Timer:
    """Adds up the processor time of named pieces of work."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str, work, *args, **kwargs):  # noqa: ANN001, ANN002, ANN003, ANN204
        """Runs a piece of work and books its time."""
        started = time.process_time()
        result = work(*args, **kwargs)
        self.seconds[name] = time.process_time() - started
        return result

    def total(self, *names: str) -> float:
        """Returns the sum over some of the names."""
        return sum(self.seconds[name] for name in names)
