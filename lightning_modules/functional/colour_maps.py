"""From numbers to colours."""

from functools import cache

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor


@cache
def _turbo_table() -> np.ndarray:
    from matplotlib import colormaps

    return colormaps["turbo"](np.linspace(0, 1, 256))[:, :3].astype(np.float32)


def turbo(values: Float[Tensor, "*size"]) -> Float[Tensor, "*size 3"]:
    """Returns the colours of values in 0..1, blue to red; values outside take the ends' colours, NaN the lower."""
    table = torch.from_numpy(_turbo_table()).to(values.device)
    return table[(values.nan_to_num(0.0).clamp(0, 1) * 255).round().long()]


def principal_axes(atoms: Float[Tensor, "atoms channels"]) -> Float[Tensor, "channels 3"]:
    """Returns the three directions in which the atoms differ most, each with a sum of components above zero."""
    centred = atoms - atoms.mean(dim=0)
    _, _, axes = torch.linalg.svd(centred, full_matrices=False)
    axes = axes[:3].T
    sign = torch.where(axes.sum(dim=0) < 0, -1.0, 1.0)  # singular vectors have no sign of their own
    return axes * sign


def feature_colours(
    weight_map: Float[Tensor, "pixels atoms"], codebook: Float[Tensor, "atoms channels"]
) -> Float[Tensor, "pixels 3"]:
    """Colours decoded features by the principal components of the codebook's atoms.

    Every atom has its colour and a pixel mixes them, so a feature looks the same in every view and no PCA over pixels
    is needed. Pixels that nothing covers are black.
    """
    used = codebook.norm(dim=1) > 0
    if int(used.sum()) < 4:
        return weight_map.new_zeros(weight_map.shape[0], 3)
    projected = (codebook - codebook[used].mean(dim=0)) @ principal_axes(codebook[used])
    spread = projected[used].std(dim=0).clamp_min(1e-12)
    colours = (0.5 + projected / (4 * spread)).clamp(0, 1) * used[:, None]
    return (weight_map @ colours).clamp(0, 1)
