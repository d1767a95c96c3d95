"""The pure-torch twin of :mod:`lightning_modules.functional.splatting.rasterization`.

Every pixel is blended over every Gaussian in plain differentiable torch, in the scene's dtype: slow, but with gradients
with respect to geometry, colours and codes, and in float64 where asked. Only for tests and benchmarks.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lightning_modules.functional.cameras import Camera
from lightning_modules.functional.language_field.sparse_codes import SparseCodes, densify_codes
from lightning_modules.functional.splatting.gaussians import GaussianScene, quaternions_to_matrices
from lightning_modules.functional.splatting.spherical_harmonics import spherical_harmonics_colors


class ProjectedGaussians(NamedTuple):
    """The V Gaussians in front of a camera, by rising depth.

    Attributes:
        gaussian_ids: [V] positions in the scene.
        centres: [V, 2] pixel coordinates (pixel (0, 0) covers 0 to 1).
        covariances: [V, 2, 2] in px^2, low-pass included.
        depths: [V] camera-space z, metres.
        radii: [V] half the side of the square that decides the tiles, whole pixels.
    """

    gaussian_ids: Int[Tensor, " visible"]
    centres: Float[Tensor, "visible 2"]
    covariances: Float[Tensor, "visible 2 2"]
    depths: Float[Tensor, " visible"]
    radii: Float[Tensor, " visible"]


class DenseBlending(NamedTuple):
    """Blending of P pixels over V Gaussians.

    Attributes:
        weights: [P, V] alpha times transmittance; zero where skipped.
        transmittances: [P] what is left behind the last Gaussian.
        is_ambiguous: [P] True where a threshold (alpha 1/255, transmittance 1e-4) is met within one part in a
            thousand, so that float32 may decide otherwise than float64.
    """

    weights: Float[Tensor, "pixels visible"]
    transmittances: Float[Tensor, " pixels"]
    is_ambiguous: Bool[Tensor, " pixels"]


def project_gaussians(scene: GaussianScene, camera: Camera) -> ProjectedGaussians:
    """Projects by the local affine approximation (EWA) of Zwicker et al. 2001 as 3D Gaussian Splatting does."""
    rotation = camera.camera_from_world[:3, :3]
    in_camera = scene.means @ rotation.T + camera.camera_from_world[:3, 3]
    ids = torch.nonzero(in_camera[:, 2] > 0.2)[:, 0]
    ids = ids[in_camera[ids, 2].argsort(stable=True)]
    x, y, z = in_camera[ids].unbind(-1)
    focal_x, focal_y = camera.intrinsics[0, 0], camera.intrinsics[1, 1]
    centre_x, centre_y = camera.intrinsics[0, 2], camera.intrinsics[1, 2]
    # 1.3 tan(fov / 2) on each side for a centred principal point: 0.3 of the half width beyond the border.
    beyond_x, beyond_y = 0.3 * camera.width / 2, 0.3 * camera.height / 2
    slope_x = (x / z).clamp((-beyond_x - centre_x) / focal_x, (camera.width + beyond_x - centre_x) / focal_x)
    slope_y = (y / z).clamp((-beyond_y - centre_y) / focal_y, (camera.height + beyond_y - centre_y) / focal_y)
    zero = torch.zeros_like(z)
    jacobian = torch.stack(
        [
            torch.stack([focal_x / z, zero, -focal_x * slope_x / z], -1),
            torch.stack([zero, focal_y / z, -focal_y * slope_y / z], -1),
        ],
        -2,
    )
    local = quaternions_to_matrices(scene.quaternions[ids])
    world_covariance = local @ torch.diag_embed(scene.scales[ids] ** 2) @ local.mT
    to_image = jacobian @ rotation
    covariance = to_image @ world_covariance @ to_image.mT
    covariance = covariance + 0.3 * torch.eye(2, dtype=z.dtype, device=z.device)
    half_trace = covariance.diagonal(dim1=-2, dim2=-1).sum(-1) / 2
    largest = half_trace + (half_trace**2 - torch.linalg.det(covariance)).clamp_min(0.1).sqrt()
    centres = torch.stack([focal_x * x / z + centre_x, focal_y * y / z + centre_y], -1)
    return ProjectedGaussians(ids, centres, covariance, z, (3 * largest.sqrt()).ceil().detach())


def blend(
    scene: GaussianScene, projected: ProjectedGaussians, camera: Camera, pixel_ids: Int[Tensor, " pixels"]
) -> DenseBlending:
    """Blends the pixels front to back; memory in proportion to pixels times visible Gaussians."""
    row, column = pixel_ids // camera.width, pixel_ids % camera.width
    pixels = torch.stack([column, row], -1).to(projected.centres.dtype) + 0.5
    offsets = projected.centres[None] - pixels[:, None]
    precision = torch.linalg.inv(projected.covariances)
    power = -0.5 * torch.einsum("pvi,vij,pvj->pv", offsets, precision, offsets)
    unskipped = (scene.opacities[projected.gaussian_ids] * power.exp()).clamp_max(0.99)

    # The square of 3 sigma decides by whole tiles; its borders are integers of 3DGS's centred pixel coordinates.
    tile = torch.stack([column // 16, row // 16], -1)[:, None]
    index = projected.centres.detach() - 0.5
    first = ((index - projected.radii[:, None]) / 16).floor()
    last = ((index + projected.radii[:, None] + 15) / 16).floor()
    touched = ((tile >= first) & (tile < last)).all(-1)

    kept = touched & (unskipped >= 1 / 255) & (power <= 0)
    alpha = torch.where(kept, unskipped, torch.zeros_like(unskipped))
    remaining = (1 - alpha).cumprod(1)
    in_front = torch.cat([torch.ones_like(remaining[:, :1]), remaining[:, :-1]], 1)
    is_reached = remaining >= 1e-4
    weights = torch.where(is_reached, alpha * in_front, torch.zeros_like(alpha))
    transmittances = torch.where(is_reached, 1 - alpha, torch.ones_like(alpha)).prod(1)

    near_alpha = touched & ((unskipped * 255 - 1).abs() < 1e-3)
    near_stop = kept & ((remaining * 1e4 - 1).abs() < 1e-3)
    return DenseBlending(weights, transmittances, (near_alpha | near_stop).any(1))


def render(
    scene: GaussianScene,
    camera: Camera,
    pixel_ids: Int[Tensor, " pixels"],
    background: Float[Tensor, "3"] | None = None,
) -> tuple[Float[Tensor, "pixels 3"], Float[Tensor, " pixels"], Float[Tensor, " pixels"]]:
    """Returns RGB [P, 3], depth [P] (blended z over alpha, 0 where alpha is 0) and alpha [P]."""
    projected = project_gaussians(scene, camera)
    blending = blend(scene, projected, camera, pixel_ids)
    ids = projected.gaussian_ids
    directions = torch.nn.functional.normalize(scene.means[ids] - camera.position, dim=-1)
    colors = spherical_harmonics_colors(scene.spherical_harmonics[ids], directions)
    rgb = blending.weights @ colors
    if background is not None:
        rgb = rgb + blending.transmittances[:, None] * background
    alpha = blending.weights.sum(1)
    depth = blending.weights @ projected.depths / torch.where(alpha > 0, alpha, torch.ones_like(alpha))
    return rgb, depth, alpha


def dense_weights(
    scene: GaussianScene, camera: Camera, pixel_ids: Int[Tensor, " pixels"]
) -> Float[Tensor, "pixels gaussians"]:
    """Returns the blending weights E as a dense matrix over all Gaussians of the scene."""
    projected = project_gaussians(scene, camera)
    weights = blend(scene, projected, camera, pixel_ids).weights
    dense = weights.new_zeros(weights.shape[0], scene.num_gaussians)
    return dense.index_copy(1, projected.gaussian_ids, weights)


def splat_codes(
    scene: GaussianScene, camera: Camera, codes: SparseCodes, pixel_ids: Int[Tensor, " pixels"]
) -> Float[Tensor, "pixels channels"]:
    """Returns the weight map [P, num_channels] of sparse codes: E times the dense coefficients."""
    return dense_weights(scene, camera, pixel_ids) @ densify_codes(codes)
