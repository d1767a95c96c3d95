"""The field without training: from mask weights to gated sparse codes of all levels."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lightning_modules.functional.codebook import residual_assign, residual_kmeans
from lightning_modules.functional.gaussians import GaussianScene
from lightning_modules.functional.lifting import MaskWeights
from lightning_modules.functional.mask_denoising import DenoisingSettings, denoise_mask_features
from lightning_modules.functional.reliability import GateSettings, Reliability, gate_gaussians
from lightning_modules.functional.sparse_coding import code_by_histogram, code_by_simplex_pursuit


@dataclass(frozen=True)
class LiftingSettings:
    """Settings of the lifting; None switches a step off.

    Raises:
        ValueError: If the coding is unknown.
    """

    num_layers: int = 1
    """Residual layers of the codebook."""
    size: int = 64
    """Entries of a layer."""
    top_k: int = 4
    """Coefficients kept per Gaussian, level and layer."""
    coding: Literal["histogram", "simplex_pursuit"] = "histogram"
    """Histogram of the masks' entries, or the best mixture for the mean feature (no gain was measured)."""
    gate: GateSettings | None = field(default_factory=GateSettings)
    """Gate of unreliable Gaussians."""
    denoising: DenoisingSettings | None = field(default_factory=DenoisingSettings)
    """Consensus of overlapping masks."""

    def __post_init__(self) -> None:
        if self.coding not in ("histogram", "simplex_pursuit"):
            raise ValueError(f"coding must be 'histogram' or 'simplex_pursuit', got {self.coding!r}.")


class LiftedCodes(NamedTuple):
    """Sparse codes of N Gaussians in L levels over one codebook.

    Attributes:
        entries: [N, L, layers, k] codebook entries.
        values: [N, L, layers, k] coefficients; they sum to one, or are zero where the Gaussian is gated or paints no
            mask.
        codebook: [layers, size, C].
        features: [M, C] unit mask features after denoising, which the codebook was fitted to.
        reliability: The gate's verdict, or None without a gate.
    """

    entries: Int[Tensor, "gaussians levels layers top_k"]
    values: Float[Tensor, "gaussians levels layers top_k"]
    codebook: Float[Tensor, "layers size channels"]
    features: Float[Tensor, "masks channels"]
    reliability: Reliability | None


def denoise_levels(
    mask_weights: Sequence[MaskWeights],
    features: Float[Tensor, "masks channels"],
    mask_view_ids: Int[Tensor, " masks"],
    settings: DenoisingSettings | None,
) -> Float[Tensor, "masks channels"]:
    """Denoises the masks of each level among themselves; None leaves the features as they are."""
    if settings is not None:
        for level in mask_weights:  # each level moves the features of its own masks only
            features = denoise_mask_features(level, features, mask_view_ids, settings)
    return features


def lift_codes(
    scene: GaussianScene,
    mask_weights: Sequence[MaskWeights],
    features: Float[Tensor, "masks channels"],
    mask_view_ids: Int[Tensor, " masks"],
    settings: LiftingSettings,
    *,
    seed: int,
) -> LiftedCodes:
    """Lifts mask features of all levels and codes them over one codebook, fitted to the denoised masks.

    Args:
        scene: N Gaussians.
        mask_weights: A of each level, over one mask table of all views.
        features: [M, C] unit features of the table.
        mask_view_ids: [M] view of each mask, never decreasing.
        settings: Which steps to take and how.
        seed: Seed of the k-means.

    Raises:
        ValueError: If no Gaussian paints any mask.
    """
    reliability = gate_gaussians(scene, mask_weights, features, settings.gate) if settings.gate is not None else None
    painted = torch.zeros(features.shape[0], dtype=torch.bool, device=features.device)
    for level in mask_weights:
        painted[level.mask_ids] = True
    if not bool(painted.any()):
        raise ValueError("No Gaussian paints any mask: do the cameras and the Gaussians belong to one scene?")
    features = denoise_levels(mask_weights, features, mask_view_ids, settings.denoising)
    codebook = residual_kmeans(features[painted], num_layers=settings.num_layers, size=settings.size, seed=seed)
    mask_entries = residual_assign(features, codebook)
    coded = [
        code_by_histogram(level, mask_entries, settings.size, settings.top_k)
        if settings.coding == "histogram"
        else code_by_simplex_pursuit(level, features, codebook, settings.top_k)
        for level in mask_weights
    ]
    entries, values = (torch.stack(parts, dim=1) for parts in zip(*coded, strict=True))
    if reliability is not None:
        values = values * reliability.keep[:, None, None, None]
    return LiftedCodes(entries, values, codebook, features, reliability)
