"""LangSplatV2's training recipe (arXiv 2507.07136, its ``train.py``) on frozen blending weights: the baseline to beat.

Logits start at zero and a codebook at the k-means centroids of all masks; each step takes one full view of one level,
``1 - cosine`` averaged over all its pixels (those without a mask count as 0), Adam at 2.5e-3 for both, eps 1e-15. Every
level is trained on its own.
"""

import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from lightning_modules.functional.language_field.coefficient_space import cosine_similarity_to_targets
from lightning_modules.functional.language_field.sparse_codes import group_channels, top_k_softmax
from lightning_modules.functional.splatting.rasterization import BlendingWeights, splat_codes, splat_dense

LEARNING_RATE = 2.5e-3
TOP_K = 4


class TrainingView(NamedTuple):
    """One view to train on.

    Attributes:
        blending: Weights of all P pixels.
        mask_ids: [L, P] mask of each pixel and level, -1 = none.
        features: [M, C] unit features of its masks.
    """

    blending: BlendingWeights
    mask_ids: Int[Tensor, "levels pixels"]
    features: Float[Tensor, "masks channels"]


def train_level(
    views: Sequence[TrainingView], level: int, codebook: Float[Tensor, "size channels"], num_steps: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Trains one level in coefficient space: the recipe's loss and gradients, without its 512-channel maps.

    Returns:
        Logits [N, size] and codebook [size, C].
    """
    logits, atoms, optimizer = _leaves(views[0].blending.num_gaussians, codebook)
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for _ in range(num_steps):
        if not order:  # every view once, in a new order
            order = torch.randperm(len(views), generator=generator).tolist()
        view = views[order.pop()]
        weight_map = splat_codes(
            view.blending, group_channels(*top_k_softmax(logits[:, None], TOP_K), codebook.shape[0])
        )
        loss = 1 - cosine_similarity_to_targets(weight_map, atoms, view.features, view.mask_ids[level]).mean()
        _step(optimizer, loss)
    return logits.detach(), atoms.detach()


def dense_step_cpu_s(
    views: Sequence[TrainingView], level: int, codebook: Float[Tensor, "size channels"], num_steps: int
) -> float:
    """Returns the processor time of one step with the recipe's own dense maps, the mean over a few, seconds.

    The softmax is scattered to all entries and splatted densely, and the maps are [512, H, W], as in LangSplatV2; the
    blending weights are given, which the recipe computes anew in each step.
    """
    logits, atoms, optimizer = _leaves(views[0].blending.num_gaussians, codebook)
    started = time.process_time()
    for step in range(num_steps):
        view = views[step % len(views)]
        probabilities = logits.softmax(dim=1)
        kept, entries = probabilities.topk(TOP_K, dim=1)
        codes = torch.zeros_like(probabilities).scatter(1, entries, kept)
        codes = codes / (codes.sum(dim=1, keepdim=True) + 1e-10)
        features = atoms.T @ splat_dense(view.blending, codes).T
        is_labelled = view.mask_ids[level] >= 0
        targets = view.features[view.mask_ids[level].clamp_min(0)].T
        _step(optimizer, 1 - F.cosine_similarity(features * is_labelled, targets * is_labelled, dim=0).mean())
    return (time.process_time() - started) / num_steps


def _leaves(num_gaussians: int, codebook: Tensor) -> tuple[Tensor, Tensor, torch.optim.Optimizer]:
    logits = codebook.new_zeros(num_gaussians, codebook.shape[0]).requires_grad_()
    atoms = codebook.clone().requires_grad_()
    return logits, atoms, torch.optim.Adam([logits, atoms], lr=LEARNING_RATE, eps=1e-15)


def _step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
