"""Real spherical harmonics of degree 0 to 3, in the order and sign of 3D Gaussian Splatting."""

import torch
from jaxtyping import Float
from torch import Tensor

_C0 = 0.28209479177387814
_C1 = 0.4886025119029199
_C2 = (1.0925484305920792, 0.31539156525252005, 0.5462742152960396)
_C3 = (0.5900435899266435, 2.890611442640554, 0.4570457994644658, 0.3731763325901154, 1.445305721320277)


def spherical_harmonics_basis(
    directions: Float[Tensor, "*batch 3"], num_bases: int
) -> Float[Tensor, "*batch {num_bases}"]:
    """Evaluates the first ``num_bases`` basis functions in unit ``directions``.

    The bases are orthonormal over the sphere. The order is that of 3D Gaussian Splatting: degree by degree, order m
    from -l to l, with the Condon-Shortley sign (so degree 1 is -y, z, -x).

    Raises:
        ValueError: If ``num_bases`` is not 1, 4, 9 or 16.
    """
    if num_bases not in (1, 4, 9, 16):
        raise ValueError(f"Spherical harmonics need 1, 4, 9 or 16 coefficients (degree 0 to 3), got {num_bases}.")
    x, y, z = directions.unbind(-1)
    bases = [torch.full_like(x, _C0)]
    if num_bases > 1:
        bases += [-_C1 * y, _C1 * z, -_C1 * x]
    if num_bases > 4:
        bases += [
            _C2[0] * x * y,
            -_C2[0] * y * z,
            _C2[1] * (2 * z * z - x * x - y * y),
            -_C2[0] * x * z,
            _C2[2] * (x * x - y * y),
        ]
    if num_bases > 9:
        bases += [
            -_C3[0] * y * (3 * x * x - y * y),
            _C3[1] * x * y * z,
            -_C3[2] * y * (4 * z * z - x * x - y * y),
            _C3[3] * z * (2 * z * z - 3 * x * x - 3 * y * y),
            -_C3[2] * x * (4 * z * z - x * x - y * y),
            _C3[4] * z * (x * x - y * y),
            -_C3[0] * x * (x * x - 3 * y * y),
        ]
    return torch.stack(bases, dim=-1)


def spherical_harmonics_colors(
    coefficients: Float[Tensor, "gaussians bases 3"], directions: Float[Tensor, "gaussians 3"]
) -> Float[Tensor, "gaussians 3"]:
    """Returns the RGB seen along unit ``directions`` (from the camera to the Gaussian): max(harmonics + 0.5, 0)."""
    basis = spherical_harmonics_basis(directions, coefficients.shape[1])
    return (torch.einsum("nb,nbc->nc", basis, coefficients) + 0.5).clamp_min(0.0)
