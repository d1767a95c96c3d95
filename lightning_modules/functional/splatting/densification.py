"""Adaptive density control of 3D Gaussian Splatting (Kerbl et al. 2023, section 5): Gaussians are added and removed.

Iterations count from 1 as in 3DGS; a change that is due at iteration i happens after its optimizer step. (3DGS makes it
between the backward pass and the step, which for the changed Gaussians is then left out.)
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import logsigmoid

from lightning_modules.functional.splatting.gaussians import GaussianScene, quaternions_to_matrices

SPLIT_SCALE = 1.6  # a half's standard deviation is its parent's over this
HALVES = 2


@dataclass(frozen=True)
class DensificationSettings:
    """When and where Gaussians are added and removed; the defaults are those of 3D Gaussian Splatting."""

    first_step: int = 500
    """Gaussians are added and removed after this iteration, ..."""
    last_step: int = 15_000
    """... and before this one."""
    every: int = 100
    """Iterations between two changes."""
    gradient_threshold: float = 2e-4
    """Mean norm of the loss's gradient by a centre, in image coordinates from -1 to 1, from which more are needed."""
    percent_dense: float = 0.01
    """Largest standard deviation of a Gaussian to be cloned, over the extent of the cameras; larger ones are split."""
    min_opacity: float = 0.005
    """Gaussians below this opacity are removed."""
    max_scale: float = 0.1
    """Gaussians with a larger standard deviation, over the extent of the cameras, are removed ..."""
    max_scale_from: int = 3000
    """... after this iteration."""
    reset_opacity_every: int = 3000
    """Iterations between two resets of all opacities; 0: never. Resets end with ``last_step``."""
    reset_opacity_to: float = 0.01
    """Largest opacity after a reset."""
    revise_clones: bool = False
    """Give a clone and its original the opacity 1 - sqrt(1 - o), so that both together cover as much as the one did
    (Rota Bulo et al. 2024); 3DGS leaves o."""
    max_gaussians: int = 0
    """Most Gaussians to grow to, those of the largest gradients first; 0: no limit."""

    def __post_init__(self) -> None:
        allowed = {
            "every": (self.every >= 1, "1 or more"),
            "min_opacity": (0 <= self.min_opacity < 1, "0 to below 1"),
            "reset_opacity_every": (self.reset_opacity_every >= 0, "0 or more"),
            "reset_opacity_to": (self.min_opacity < self.reset_opacity_to < 1, "above min_opacity and below 1"),
            "max_gaussians": (self.max_gaussians >= 0, "0 or more"),
        }
        for name, (is_allowed, values) in allowed.items():
            if not is_allowed:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: {values}.")

    def gathers_at(self, iteration: int) -> bool:
        """Whether an iteration's gradients are counted."""
        return iteration < self.last_step

    def densifies_at(self, iteration: int) -> bool:
        """Whether Gaussians are added and removed at an iteration."""
        return self.first_step < iteration < self.last_step and iteration % self.every == 0

    def resets_opacity_at(self, iteration: int, *, on_white: bool = False) -> bool:
        """Whether opacities are reset at an iteration; on a white background also when densification begins."""
        if self.reset_opacity_every == 0 or not 0 < iteration < self.last_step:
            return False
        return iteration % self.reset_opacity_every == 0 or (on_white and iteration == self.first_step)


class Densification(NamedTuple):
    """What becomes of N Gaussians: M, each of which is one of them, but for the parameters listed here.

    Attributes:
        parents: [M] row, among the N, whose other parameters a Gaussian has.
        is_new: [M] True for clones and halves, whose Adam moments begin at zero.
        means: [M, 3] centres, metres.
        log_scales: [M, 3].
        opacity_logits: [M].
        num_cloned: Gaussians added by cloning.
        num_split: Gaussians replaced by two halves.
        num_pruned: Gaussians removed, clones and halves among them.
    """

    parents: Int[Tensor, " new_gaussians"]
    is_new: Bool[Tensor, " new_gaussians"]
    means: Float[Tensor, "new_gaussians 3"]
    log_scales: Float[Tensor, "new_gaussians 3"]
    opacity_logits: Float[Tensor, " new_gaussians"]
    num_cloned: int
    num_split: int
    num_pruned: int


def screen_gradient_norms(
    gradients: Float[Tensor, "gaussians 2"], width: int, height: int
) -> Float[Tensor, " gaussians"]:
    """Returns the norms of gradients by pixels as they are by image coordinates from -1 to 1, which 3DGS thresholds."""
    return (gradients * gradients.new_tensor([width / 2, height / 2])).norm(dim=1)


@torch.no_grad()
def densify(
    scene: GaussianScene,
    gradient_norms: Float[Tensor, " gaussians"],
    extent: float,
    settings: DensificationSettings,
    *,
    iteration: int,
    seed: int = 0,
) -> Densification:
    """Clones small Gaussians and splits large ones where the gradient is large, then removes faint and huge ones.

    3DGS also means to remove Gaussians of more than 20 pixels, but clears their radii before it looks at them; nothing
    of the kind is done here. The order is 3DGS's: those that stay, clones, first halves, second halves.

    Args:
        scene: The N Gaussians; their colours are not read.
        gradient_norms: [N] means over the views in which each was visible, as of :func:`screen_gradient_norms`.
        extent: Of the cameras, metres;
            :func:`~lightning_modules.functional.splatting.gaussian_initialisation.cameras_extent`.
        settings: Thresholds.
        iteration: Decides whether huge Gaussians are removed, and with ``seed`` where the halves go.
        seed: Of the halves' places.
    """
    largest = scene.scales.amax(dim=1)
    chosen = gradient_norms >= settings.gradient_threshold
    if settings.max_gaussians:
        chosen &= _is_among_largest(gradient_norms, settings.max_gaussians - scene.num_gaussians)
    is_small = largest <= settings.percent_dense * extent
    is_cloned, is_split = chosen & is_small, chosen & ~is_small
    kept, cloned, split = (torch.nonzero(rows)[:, 0] for rows in (~is_split, is_cloned, is_split))

    parents = torch.cat([kept, cloned, split.repeat(HALVES)])
    num_halves = HALVES * len(split)
    is_new = torch.arange(len(parents), device=parents.device) >= len(kept)
    means, log_scales = scene.means[parents], scene.log_scales[parents]
    opacity_logits = scene.opacity_logits[parents]
    if num_halves:
        generator = generator_of(seed, iteration)
        local = torch.randn(num_halves, 3, generator=generator).to(means) * log_scales[-num_halves:].exp()
        rotations = quaternions_to_matrices(scene.quaternions[parents[-num_halves:]])
        means[-num_halves:] += (rotations @ local[..., None])[..., 0]
        log_scales[-num_halves:] -= math.log(SPLIT_SCALE)
    if settings.revise_clones:
        revised = is_cloned[parents]
        opacity_logits[revised] = _opacity_logits_of_each_of_two(opacity_logits[revised])

    stays = opacity_logits.sigmoid() >= settings.min_opacity
    if iteration > settings.max_scale_from:
        stays &= log_scales.exp().amax(dim=1) <= settings.max_scale * extent
    return Densification(
        parents=parents[stays],
        is_new=is_new[stays],
        means=means[stays],
        log_scales=log_scales[stays],
        opacity_logits=opacity_logits[stays],
        num_cloned=len(cloned),
        num_split=len(split),
        num_pruned=len(parents) - int(stays.sum()),
    )


def reset_opacities(opacity_logits: Float[Tensor, " gaussians"], largest: float) -> Float[Tensor, " gaussians"]:
    """Lowers opacities to at most ``largest``: what the photographs do not ask for stays faint and is then removed."""
    return opacity_logits.clamp_max(math.log(largest / (1 - largest)))


def inherited_moments(
    state: Mapping[str, Tensor], parents: Int[Tensor, " new_gaussians"], is_new: Bool[Tensor, " new_gaussians"]
) -> dict[str, Tensor]:
    """Returns Adam's state of a parameter after a densification: the moments by row, zero for the new."""
    return {name: _inherited(part, parents, is_new) if part.ndim else part for name, part in state.items()}


def generator_of(*seeds: int) -> torch.Generator:
    """Returns a generator, on the CPU so that all devices draw the same, whose stream the seeds alone decide."""
    (state,) = np.random.SeedSequence(seeds).generate_state(1, dtype=np.uint64)
    return torch.Generator().manual_seed(int(state >> 1))


def _inherited(moments: Tensor, parents: Tensor, is_new: Tensor) -> Tensor:
    rows = moments[parents]
    rows[is_new] = 0
    return rows


def _is_among_largest(values: Tensor, count: int) -> Tensor:
    """Tells which are among the ``count`` largest; of equal ones the first."""
    chosen = torch.zeros_like(values, dtype=torch.bool)
    if count > 0:
        chosen[values.argsort(descending=True, stable=True)[:count]] = True
    return chosen


def _opacity_logits_of_each_of_two(logits: Tensor) -> Tensor:
    """Returns the logit of 1 - sqrt(1 - sigmoid(x)), without loss of digits where that is near 0 or 1."""
    log_root = 0.5 * logsigmoid(-logits)  # of r = sqrt(1 - opacity)
    return logsigmoid(logits) - torch.log1p(log_root.exp()) - log_root  # 1 - r = opacity / (1 + r)
