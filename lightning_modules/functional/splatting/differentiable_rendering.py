"""Rendering with gradients with respect to the Gaussians themselves, to train them.

The picture is that of :func:`lightning_modules.functional.splatting.rasterization.render`: same lists, same thresholds.
Its twin, in value and in gradient, is :func:`lightning_modules.functional.splatting.rasterization_reference.render`.
"""

from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_modules.functional.cameras import Camera
from lightning_modules.functional.splatting.gaussians import GaussianScene
from lightning_modules.functional.splatting.rasterization import (
    MIN_BLOCK_TILES,
    as_kernels_read,
    blend_image,
    image_kernels,
    prepare_view_by_gaussian,
    shade,
)


class TrainingRender(NamedTuple):
    """What a camera sees of a scene that is being trained.

    Attributes:
        rgb: [P, 3] colour of each pixel, row by row, 0 to 1 and above.
        depth: [P] blended camera-space z over alpha, metres; 0 where nothing is seen.
        alpha: [P] opacity, 0 to 1.
        radii: [N] half the side of the square of 3 standard deviations, whole pixels; 0 = not visible. No gradient.
    """

    rgb: Float[Tensor, "pixels 3"]
    depth: Float[Tensor, " pixels"]
    alpha: Float[Tensor, " pixels"]
    radii: Float[Tensor, " gaussians"]


def render_with_gradients(
    scene: GaussianScene,
    camera: Camera,
    background: Float[Tensor, "3"] | None = None,
    *,
    screen_offsets: Float[Tensor, "gaussians 2"] | None = None,
    backend: Literal["warp", "gsplat"] = "warp",
) -> TrainingRender:
    """Renders all pixels; differentiable with respect to all tensors of the scene, in float32.

    On CPU the gradients are the same bits on any number of threads; on CUDA sums are atomic, so their last bits vary.

    Args:
        scene: The scene.
        camera: The camera; no gradient.
        background: Colour behind the scene, no gradient; None means black.
        screen_offsets: Zeros, to be added to the projected centres, pixels: what backward leaves in their ``grad`` is
            dL/dcentre, by which 3D Gaussian Splatting decides where to densify.
        backend: "warp", our kernels, or "gsplat", the library's, on CUDA only.

    Raises:
        ValueError: If ``backend`` is neither, or is "gsplat" where that cannot run, or if the spherical harmonics are
            not those of degree 0 to 3.
    """
    if backend == "gsplat":
        from lightning_modules.functional.splatting import gsplat_backend

        return TrainingRender(*gsplat_backend.render(scene, camera, background, screen_offsets))
    if backend != "warp":
        raise ValueError(f"backend must be 'warp' or 'gsplat', got {backend!r}.")
    num_bases = scene.spherical_harmonics.shape[1]
    if num_bases not in (1, 4, 9, 16):
        raise ValueError(f"Spherical harmonics need 1, 4, 9 or 16 coefficients (degree 0 to 3), got {num_bases}.")
    background = scene.means.new_zeros(3) if background is None else background
    return TrainingRender(*_Render.apply(*scene, screen_offsets, camera, background))


class _Render(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        means: Tensor,
        log_scales: Tensor,
        quaternions: Tensor,
        opacity_logits: Tensor,
        harmonics: Tensor,
        screen_offsets: Tensor | None,
        camera: Camera,
        background: Tensor,
    ) -> tuple[Tensor, ...]:
        device, num_gaussians = means.device, means.shape[0]
        scene = GaussianScene(
            *(as_kernels_read(x, device) for x in (means, log_scales, quaternions, opacity_logits, harmonics))
        )
        view, ends, entries = prepare_view_by_gaussian(scene, camera)
        if screen_offsets is not None:
            view.projected[:, :2] += screen_offsets.index_select(0, view.gaussian_ids)
        colors, radii, visible_rows = shade(scene, view)
        position, background = as_kernels_read(camera.position, device), as_kernels_read(background, device)
        rgb, depth, alpha = blend_image(view, colors, background)
        blended = [view.projected, view.tile_offsets, view.tile_rows, colors, background, rgb, depth, alpha]
        if image_kernels(device).lanes == 1:  # one row of sums for each Gaussian, added to by all its tiles
            entries = view.gaussian_ids.index_select(0, view.tile_rows).long()
            ends = torch.arange(1, num_gaussians + 1, device=device)
        ctx.camera = camera
        ctx.save_for_backward(*scene, visible_rows, ends, entries, position, *blended)
        ctx.mark_non_differentiable(radii)
        ctx.set_materialize_grads(False)
        return rgb, depth, alpha, radii

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        from lightning_modules.functional.kernels import launch, projection_gradients, shading

        means, log_scales, quaternions, _, harmonics, visible_rows, ends, entries, position = ctx.saved_tensors[:9]
        blended = ctx.saved_tensors[9:]
        projected, tile_offsets, _, colors, _, *outputs = blended
        camera, device, num_gaussians = ctx.camera, means.device, means.shape[0]
        size = (camera.width, camera.height)
        upstream = [
            torch.zeros_like(output) if grad is None else grad.contiguous()
            for grad, output in zip(grads[:3], outputs, strict=True)
        ]
        kernels = image_kernels(device)
        num_rows, new = (num_gaussians, torch.zeros) if kernels.lanes == 1 else (entries.numel(), torch.empty)
        sums = new(num_rows, kernels.num_sums, device=device)
        num_threads = (tile_offsets.numel() - 1) * kernels.threads_per_tile
        arguments = [*size, *blended, *upstream, entries, sums]
        launch.launch(kernels.blend_gradients, num_threads, arguments, device, min_block_rows=MIN_BLOCK_TILES)

        grad_means, grad_log_scales, grad_quaternions, grad_harmonics = (
            torch.empty_like(x) for x in (means, log_scales, quaternions, harmonics)
        )
        grad_logits, grad_centres = means.new_empty(num_gaussians), means.new_empty(num_gaussians, 2)
        grad_colors = torch.empty_like(colors)
        camera_from_world = as_kernels_read(camera.camera_from_world, device)
        (fx, _, cx), (_, fy, cy), _ = camera.intrinsics.tolist()
        arguments = [
            visible_rows, projected, ends, sums, means, log_scales, quaternions, camera_from_world, fx, fy, cx, cy,
            *size, grad_means, grad_log_scales, grad_quaternions, grad_logits, grad_colors, grad_centres,
        ]  # fmt: skip
        launch.launch(projection_gradients.project_gradients, num_gaussians, arguments, device)
        arguments = [visible_rows, means, harmonics, position, colors, grad_colors, grad_harmonics, grad_means]
        launch.launch(shading.shade_gradients, num_gaussians, arguments, device)
        of_offsets = grad_centres if ctx.needs_input_grad[5] else None
        return grad_means, grad_log_scales, grad_quaternions, grad_logits, grad_harmonics, of_offsets, None, None
