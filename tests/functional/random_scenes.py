"""Small random scenes that reach every branch of the rasterizer."""

import torch
from torch import Tensor

from lightning_modules.functional.cameras import Camera
from lightning_modules.functional.language_field.sparse_codes import SparseCodes
from lightning_modules.functional.splatting.gaussians import GaussianScene, quaternions_to_matrices


def random_camera(seed: int, width: int = 53, height: int = 38) -> Camera:
    """A rotated camera whose focal lengths differ and whose principal point is far from the centre."""
    generator = torch.Generator().manual_seed(seed)
    camera_from_world = torch.eye(4)
    camera_from_world[:3, :3] = quaternions_to_matrices(torch.randn(4, generator=generator))
    camera_from_world[:3, 3] = torch.randn(3, generator=generator)
    intrinsics = torch.tensor([[45.0, 0.0, 0.4 * width], [0.0, 38.0, 0.65 * height], [0.0, 0.0, 1.0]])
    return Camera(camera_from_world, intrinsics, width, height)


def random_scene(seed: int, camera: Camera, num_gaussians: int = 120, num_bases: int = 4) -> GaussianScene:
    """Anisotropic, overlapping Gaussians in front of, beside and behind the camera, faint to opaque."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    in_camera = normal(num_gaussians, 3) * torch.tensor([1.2, 1.0, 1.5]) + torch.tensor([0.0, 0.0, 2.0])
    means = (in_camera - camera.camera_from_world[:3, 3]) @ camera.camera_from_world[:3, :3]
    return GaussianScene(
        means=means,
        log_scales=normal(num_gaussians, 3) - 2.0,
        quaternions=normal(num_gaussians, 4),
        opacity_logits=2 * normal(num_gaussians),
        spherical_harmonics=normal(num_gaussians, num_bases, 3),
    )


def random_codes(seed: int, num_gaussians: int, active: int = 5, num_channels: int = 19) -> SparseCodes:
    """Codes in which a channel may occur twice for one Gaussian."""
    generator = torch.Generator().manual_seed(seed)
    channel_ids = torch.randint(0, num_channels, (num_gaussians, active), generator=generator).short()
    return SparseCodes(channel_ids, torch.randn(num_gaussians, active, generator=generator), num_channels)


def facing_camera(width: int = 64, height: int = 48, focal: float = 50.0) -> Camera:
    """A camera at the origin that looks along z; the optical axis meets the centre of pixel (width / 2, height / 2)."""
    intrinsics = torch.tensor([[focal, 0.0, width / 2 + 0.5], [0.0, focal, height / 2 + 0.5], [0.0, 0.0, 1.0]])
    return Camera(torch.eye(4), intrinsics, width, height)


def isotropic_scene(means: list[list[float]], scales: list[float], opacities: list[float]) -> GaussianScene:
    """Round Gaussians of colour 0.5 + 0.28 (n + 1), one row of each list per Gaussian."""
    count = len(means)
    return GaussianScene(
        means=torch.tensor(means).reshape(count, 3),
        log_scales=torch.tensor(scales).log()[:, None].expand(count, 3).contiguous(),
        quaternions=torch.tensor([1.0, 0.0, 0.0, 0.0]).expand(count, 4).contiguous(),
        opacity_logits=torch.tensor(opacities).logit(),
        spherical_harmonics=torch.arange(1.0, count + 1)[:, None, None].expand(count, 1, 3).contiguous(),
    )


def as_float64(scene: GaussianScene, camera: Camera) -> tuple[GaussianScene, Camera]:
    """The same scene and camera in double precision."""
    widened = camera._replace(
        camera_from_world=camera.camera_from_world.double(), intrinsics=camera.intrinsics.double()
    )
    return GaussianScene(*(parameter.double() for parameter in scene)), widened
