"""Rendering with gradients by gsplat's CUDA kernels (Ye et al. 2024), where the extra ``gsplat`` is installed.

Its alpha is at most 0.999 where ours is at most 0.99, it stops one Gaussian earlier or later at a transmittance of
1e-4, and its Gaussians end at 3.33 standard deviations instead of at the borders of tiles.
"""

from importlib.util import find_spec

import torch
from jaxtyping import Float
from torch import Tensor

from lightning_modules.functional.cameras import Camera
from lightning_modules.functional.splatting.gaussians import GaussianScene
from lightning_modules.functional.splatting.spherical_harmonics import spherical_harmonics_colors

_TILE_SIZE = 16


def check_gsplat(device: torch.device) -> None:
    """Refuses what gsplat cannot do.

    Raises:
        ValueError: If gsplat is not installed or the device is not a CUDA device.
    """
    if find_spec("gsplat") is None:
        raise ValueError(
            "backend 'gsplat' needs the library gsplat, which is not installed: run `pip install -e '.[gsplat]'` "
            "(Linux, CUDA), or choose backend 'warp', which runs everywhere."
        )
    if device.type != "cuda":
        raise ValueError(
            f"backend 'gsplat' needs a CUDA device, but the Gaussians are on {device.type!r}: train with "
            "--trainer.accelerator gpu, or choose backend 'warp', which runs everywhere."
        )


def render(
    scene: GaussianScene,
    camera: Camera,
    background: Float[Tensor, "3"] | None = None,
    screen_offsets: Float[Tensor, "gaussians 2"] | None = None,
) -> tuple[Float[Tensor, "pixels 3"], Float[Tensor, " pixels"], Float[Tensor, " pixels"], Float[Tensor, " gaussians"]]:
    """Renders colour, depth, opacity and radii as :class:`~.differentiable_rendering.TrainingRender` describes them.

    gsplat's steps one by one instead of its ``rasterization``, which has no place for ``screen_offsets``.

    Raises:
        ValueError: If gsplat is not installed or the scene is not on a CUDA device.
    """
    check_gsplat(scene.means.device)
    import gsplat

    means, width, height = scene.means, camera.width, camera.height
    tiles_x, tiles_y = -(-width // _TILE_SIZE), -(-height // _TILE_SIZE)
    radii, centres, depths, conics, _ = gsplat.fully_fused_projection(
        means, None, scene.quaternions, scene.scales, camera.camera_from_world.to(means)[None],
        camera.intrinsics.to(means)[None], width, height, eps2d=0.3, near_plane=0.2, opacities=scene.opacities,
    )  # fmt: skip
    if screen_offsets is not None:
        centres = centres + screen_offsets
    _, keys, order = gsplat.isect_tiles(centres, radii, depths, _TILE_SIZE, tiles_x, tiles_y)
    tile_offsets = gsplat.isect_offset_encode(keys, 1, tiles_x, tiles_y)
    directions = torch.nn.functional.normalize(means - camera.position.to(means), dim=-1)
    colors = spherical_harmonics_colors(scene.spherical_harmonics, directions)
    background = means.new_zeros(3) if background is None else background.to(means)
    channels, alpha = gsplat.rasterize_to_pixels(
        centres, conics, torch.cat([colors, depths[0, :, None]], 1)[None], scene.opacities[None], width, height,
        _TILE_SIZE, tile_offsets, order, backgrounds=torch.cat([background, background.new_zeros(1)])[None],
    )  # fmt: skip
    alpha = alpha.reshape(-1)
    depth = channels[..., 3].reshape(-1) / torch.where(alpha > 0, alpha, torch.ones_like(alpha))
    return channels[..., :3].reshape(-1, 3), depth, alpha, radii[0].float().amax(-1)
