"""The scene of 3D Gaussians, in the raw (unactivated) parameters in which 3D Gaussian Splatting stores it."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


class GaussianScene(NamedTuple):
    """A frozen scene of N Gaussians.

    Attributes:
        means: [N, 3] centres in world coordinates, metres.
        log_scales: [N, 3] natural logarithms of the standard deviations along the local axes.
        quaternions: [N, 4] rotations local-to-world, wxyz, of any length above zero.
        opacity_logits: [N] opacities before the sigmoid.
        spherical_harmonics: [N, B, 3] colour coefficients, B = (degree + 1)^2, degree 0 to 3; RGB last.
    """

    means: Float[Tensor, "gaussians 3"]
    log_scales: Float[Tensor, "gaussians 3"]
    quaternions: Float[Tensor, "gaussians 4"]
    opacity_logits: Float[Tensor, " gaussians"]
    spherical_harmonics: Float[Tensor, "gaussians bases 3"]

    @property
    def num_gaussians(self) -> int:
        """N."""
        return self.means.shape[0]

    @property
    def scales(self) -> Float[Tensor, "gaussians 3"]:
        """[N, 3] standard deviations, metres."""
        return self.log_scales.exp()

    @property
    def opacities(self) -> Float[Tensor, " gaussians"]:
        """[N] opacities, 0 to 1."""
        return self.opacity_logits.sigmoid()


def quaternions_to_matrices(quaternions: Float[Tensor, "*batch 4"]) -> Float[Tensor, "*batch 3 3"]:
    """Converts wxyz quaternions of any length above zero to rotation matrices."""
    w, x, y, z = F.normalize(quaternions, dim=-1).unbind(-1)
    rows = [
        1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
        2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
        2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y),
    ]  # fmt: skip
    return torch.stack(rows, dim=-1).unflatten(-1, (3, 3))


def matrices_to_quaternions(matrices: Float[Tensor, "*batch 3 3"]) -> Float[Tensor, "*batch 4"]:
    """Converts rotation matrices to unit wxyz quaternions with w >= 0, stable at every angle."""
    xx, xy, xz, yx, yy, yz, zx, zy, zz = matrices.flatten(-2).unbind(-1)
    # Row i is 4 q_i times the quaternion; the row of the largest component loses no digits.
    rows = [
        1 + xx + yy + zz, zy - yz, xz - zx, yx - xy,
        zy - yz, 1 + xx - yy - zz, xy + yx, xz + zx,
        xz - zx, xy + yx, 1 - xx + yy - zz, yz + zy,
        yx - xy, xz + zx, yz + zy, 1 - xx - yy + zz,
    ]  # fmt: skip
    candidates = torch.stack(rows, dim=-1).unflatten(-1, (4, 4))
    best = candidates.diagonal(dim1=-2, dim2=-1).argmax(-1)
    chosen = candidates.gather(-2, best[..., None, None].expand(*best.shape, 1, 4)).squeeze(-2)
    chosen = F.normalize(chosen, dim=-1)
    return torch.where(chosen[..., :1] < 0, -chosen, chosen)
