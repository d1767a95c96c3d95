"""The one gate through which Gaussians of every file format pass."""

from pathlib import Path

import torch
from torch import Tensor

from lightning_modules.functional.splatting.gaussians import GaussianScene

SH_REST_COUNTS = {0: 0, 9: 1, 24: 2, 45: 3}  # coefficients beyond the constant one -> degree


def checked_scene(
    path: Path, means: Tensor, log_scales: Tensor, quaternions: Tensor, opacity_logits: Tensor, harmonics: Tensor
) -> GaussianScene:
    """Returns the parameters as a float32 scene on the CPU, after checking that they are one.

    Args:
        path: File they came from, for the messages.
        means: [N, 3].
        log_scales: [N, 3].
        quaternions: [N, 4] wxyz.
        opacity_logits: [N] or [N, 1].
        harmonics: [N, B, 3], B = 1, 4, 9 or 16.

    Raises:
        ValueError: If shapes disagree, there are no Gaussians, or values are not finite, or a quaternion is zero.
    """
    if means.ndim != 2 or means.shape[0] == 0:
        raise ValueError(
            f"{path} holds no Gaussians (centres of shape {list(means.shape)}; allowed: [N, 3], N > 0). "
            "Export the scene again from a finished training."
        )
    num = means.shape[0]
    if opacity_logits.shape == (num, 1):
        opacity_logits = opacity_logits[:, 0]
    num_bases = harmonics.shape[1] if harmonics.ndim == 3 else 0
    if num_bases not in (1, 4, 9, 16):
        raise ValueError(
            f"{path}: spherical harmonics have shape {list(harmonics.shape)}; allowed: [{num}, B, 3] with B = 1, 4, 9 "
            "or 16 (degree 0 to 3). Export the scene again."
        )
    parts = {
        "means": (means, (num, 3)),
        "log scales": (log_scales, (num, 3)),
        "quaternions": (quaternions, (num, 4)),
        "opacity logits": (opacity_logits, (num,)),
        "spherical harmonics": (harmonics, (num, num_bases, 3)),
    }
    for name, (tensor, shape) in parts.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{path}: {name} have shape {list(tensor.shape)}; allowed for its {num} Gaussians: {list(shape)}. "
                "Export the scene again."
            )
        finite = torch.isfinite(tensor).reshape(num, -1).all(dim=1)
        if not finite.all():
            bad = (~finite).nonzero()[:, 0]
            raise ValueError(
                f"{path}: {name} of {len(bad)} of {num} Gaussians are NaN or infinite (first: Gaussian "
                f"{int(bad[0])}); allowed: finite numbers. Remove these Gaussians (SuperSplat does on export) or take "
                "an earlier checkpoint."
            )
    zero = (quaternions.float().norm(dim=1) == 0).nonzero()[:, 0]
    if len(zero):
        raise ValueError(
            f"{path}: the quaternions of {len(zero)} of {num} Gaussians are zero (first: Gaussian {int(zero[0])}), "
            "which is no rotation; allowed: any length above zero. Remove these Gaussians or export the scene again."
        )
    return GaussianScene._make(
        part.detach().to("cpu", torch.float32).contiguous()
        for part in (means, log_scales, quaternions, opacity_logits, harmonics)
    )
