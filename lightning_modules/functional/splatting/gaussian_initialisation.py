"""Where Gaussians begin: on the points of a reconstruction, or on the pixels of depth maps."""

import torch
from jaxtyping import Float, UInt8
from scipy.spatial import cKDTree
from torch import Tensor

from lightning_modules.functional.splatting.gaussians import GaussianScene

SH_CONSTANT = 0.28209479177387814  # the constant spherical harmonic, by which 3DGS divides colours
LEAST_SQUARED_DISTANCE = 1e-7  # m^2; points that coincide would make Gaussians of no size


def gaussians_of_sparse_points(
    points: Float[Tensor, "points 3"],
    colors: UInt8[Tensor, "points 3"],
    *,
    sh_degree: int = 0,
    opacity: float = 0.1,
) -> GaussianScene:
    """Makes a round Gaussian of each point, as large as its neighbours are far, as 3D Gaussian Splatting begins.

    The standard deviation is the root of the mean squared distance to the three nearest other points (fewer where there
    are fewer); harmonics above the constant are zero.

    Args:
        points: World coordinates, metres.
        colors: RGB.
        sh_degree: Degree of the spherical harmonics, 0 to 3.
        opacity: Of every Gaussian.

    Raises:
        ValueError: If there are fewer than two points.
    """
    num = len(points)
    if num < 2:
        raise ValueError(
            f"There are {num} points to begin with; at least 2 are needed, and useful reconstructions have thousands. "
            "Run the reconstruction again, or give its points3D."
        )
    positions = points.double().cpu().numpy()
    num_neighbours = min(3, num - 1)
    distances, _ = cKDTree(positions).query(positions, k=num_neighbours + 1, workers=-1)
    # The nearest is the point itself (or one that coincides with it).
    squared = torch.from_numpy(distances[:, 1:]).square().mean(dim=1).clamp_min(LEAST_SQUARED_DISTANCE)
    harmonics = torch.zeros(num, (sh_degree + 1) ** 2, 3, device=points.device)
    harmonics[:, 0] = constant_harmonics(colors / 255)
    return GaussianScene(
        means=points.float().clone(),
        log_scales=(0.5 * squared.log()).to(points.device, torch.float32)[:, None].repeat(1, 3),
        quaternions=torch.tensor([1.0, 0, 0, 0], device=points.device).repeat(num, 1),
        opacity_logits=torch.full((num,), opacity, device=points.device).logit(),
        spherical_harmonics=harmonics,
    )


def gaussians_of_points(
    points: Float[Tensor, "points 3"],
    colors: UInt8[Tensor, "points 3"],
    spacings: Float[Tensor, " points"],
    *,
    opacity: float = 0.95,
) -> GaussianScene:
    """Makes one round Gaussian of all points in a voxel, at their mean and with their mean colour.

    For dense points, such as the back-projected pixels of depth maps.

    Args:
        points: World coordinates, metres.
        colors: RGB.
        spacings: Distance of neighbouring points on a surface that faces the camera (depth / focal length), metres. The
            voxel is as long as their median; a Gaussian's standard deviation is half of its own.
        opacity: Of every Gaussian.
    """
    voxels = (points / spacings.median()).floor().long()
    _, voxel_of, counts = voxels.unique(dim=0, return_inverse=True, return_counts=True)
    columns = torch.cat([points, colors / 255, spacings[:, None]], dim=1).double()
    means = columns.new_zeros(len(counts), 7).index_add_(0, voxel_of, columns) / counts[:, None]
    num = len(counts)
    return GaussianScene(
        means=means[:, :3].float(),
        log_scales=(0.5 * means[:, 6:7]).log().float().expand(num, 3).contiguous(),
        quaternions=torch.tensor([1.0, 0, 0, 0]).repeat(num, 1),
        opacity_logits=torch.full((num,), opacity).logit(),
        spherical_harmonics=constant_harmonics(means[:, 3:6]).float()[:, None],
    )


def with_sh_degree(scene: GaussianScene, degree: int) -> GaussianScene:
    """Returns a scene with spherical harmonics of another degree: what is missing is zero, what is too much is cut."""
    harmonics, num_bases = scene.spherical_harmonics, (degree + 1) ** 2
    missing = harmonics.new_zeros(len(harmonics), max(num_bases - harmonics.shape[1], 0), 3)
    return scene._replace(spherical_harmonics=torch.cat([harmonics[:, :num_bases], missing], dim=1))


def constant_harmonics(colors: Float[Tensor, "points 3"]) -> Float[Tensor, "points 3"]:
    """Returns the constant coefficients that show ``colors`` (0..1) from everywhere."""
    return (colors - 0.5) / SH_CONSTANT


def cameras_extent(positions: Float[Tensor, "cameras 3"]) -> float:
    """Returns 1.1 times the largest distance of a camera from the mean of all, metres: 3DGS's unit of a scene's size.

    Raises:
        ValueError: If all cameras stand in one place, from which no depth can be learnt.
    """
    extent = 1.1 * float((positions - positions.mean(dim=0)).norm(dim=1).max())
    if extent == 0:
        raise ValueError(
            f"All {len(positions)} cameras stand in one place, so there is no depth to learn and no scale. Give photos "
            "taken from different places."
        )
    return extent
