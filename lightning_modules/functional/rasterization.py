"""Rasterization of 3D Gaussians: blending weights, colours and sparse codes of one camera's pixels.

The conventions are those of 3D Gaussian Splatting (Kerbl et al. 2023): depth 0.2 and nearer is culled, the affine
projection (EWA) is clamped at 1.3 times the field of view (the principal point honoured), 0.3 px^2 are added to the
covariance's diagonal, the square of 3 standard deviations decides which 16x16 tiles a Gaussian touches, alpha below
1/255 is skipped, alpha is at most 0.99, and blending stops before transmittance falls below 1e-4.

The geometry is frozen: gradients flow to what is splatted, never to the Gaussians' shape. The pure-torch twin with all
gradients is :mod:`lightning_modules.functional.rasterization_reference`.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Float32, Int32, Int64
from torch import Tensor

from lightning_modules.functional.cameras import Camera
from lightning_modules.functional.gaussians import GaussianScene, quaternions_to_matrices
from lightning_modules.functional.sparse_codes import SparseCodes
from lightning_modules.functional.spherical_harmonics import spherical_harmonics_colors

TILE_SIZE = 16
NEAR = 0.2
LOW_PASS = 0.3
MIN_ALPHA = 1 / 255


class PreparedView(NamedTuple):
    """The Gaussians of a scene projected into one camera and listed by tile; holds no colours and no codes.

    Attributes:
        camera: The camera.
        num_gaussians: Gaussians of the scene.
        projected: [V, 8] of the V visible Gaussians by rising depth: centre x, y in pixel indices (the centre of pixel
            (0, 0) is 0, 0), conic a, b, c in 1/px^2, opacity, depth in metres, and the power below which alpha is less
            than 1/255.
        gaussian_ids: [V] the Gaussian of each row.
        tile_offsets: [T + 1] where each tile's list begins, tiles row by row.
        tile_rows: [I] rows of ``projected`` in each tile, by rising depth.
    """

    camera: Camera
    num_gaussians: int
    projected: Float32[Tensor, "visible 8"]
    gaussian_ids: Int32[Tensor, " visible"]
    tile_offsets: Int32[Tensor, " tile_bounds"]
    tile_rows: Int32[Tensor, " instances"]

    @property
    def num_bytes(self) -> int:
        """Memory of the tensors, in bytes."""
        return sum(field.numel() * field.element_size() for field in self if isinstance(field, Tensor))


class BlendingWeights(NamedTuple):
    """The sparse matrix E of blending weights, pixel by Gaussian, in CSR form.

    Attributes:
        pixel_ids: [P] flat pixel id (y * width + x) of each row.
        offsets: [P + 1] where each row begins.
        gaussian_ids: [E] Gaussians, front to back within a row.
        weights: [E] alpha times the transmittance in front of it.
        num_gaussians: Columns.
    """

    pixel_ids: Int64[Tensor, " pixels"]
    offsets: Int64[Tensor, " bounds"]
    gaussian_ids: Int32[Tensor, " entries"]
    weights: Float32[Tensor, " entries"]
    num_gaussians: int

    @property
    def alphas(self) -> Float32[Tensor, " pixels"]:
        """[P] opacity of each pixel: the sum of its weights, one minus the final transmittance."""
        return torch.segment_reduce(self.weights, "sum", offsets=self.offsets, initial=0.0)


class RenderedPixels(NamedTuple):
    """What a camera sees.

    Attributes:
        rgb: [P, 3] colour, 0 to 1 and above.
        depth: [P] blended camera-space z over alpha, metres; 0 where nothing is seen.
        alpha: [P] opacity, 0 to 1.
    """

    rgb: Float[Tensor, "pixels 3"]
    depth: Float[Tensor, " pixels"]
    alpha: Float[Tensor, " pixels"]


@torch.no_grad()
def prepare_view(scene: GaussianScene, camera: Camera) -> PreparedView:
    """Projects a scene into a camera and lists, tile by tile and by rising depth, the Gaussians that can be seen.

    A list holds the Gaussians whose square of 3 standard deviations touches the tile, as in 3D Gaussian Splatting,
    less those whose alpha is below 1/255 on every pixel of it, which changes no result.
    """
    device = scene.means.device
    rotation, translation = camera.camera_from_world[:3, :3], camera.camera_from_world[:3, 3]
    in_camera = scene.means @ rotation.T + translation
    ids = torch.nonzero(in_camera[:, 2] > NEAR)[:, 0]
    t = in_camera[ids]
    x, y, z = t.unbind(-1)
    fx, fy, cx, cy = (camera.intrinsics[i, j].item() for i, j in ((0, 0), (1, 1), (0, 2), (1, 2)))
    width, height = camera.width, camera.height
    margin_x, margin_y = 0.15 * width / fx, 0.15 * height / fy
    tx = (x / z).clamp(-cx / fx - margin_x, (width - cx) / fx + margin_x)
    ty = (y / z).clamp(-cy / fy - margin_y, (height - cy) / fy + margin_y)
    zero = torch.zeros_like(z)
    jacobian = torch.stack([fx / z, zero, -fx * tx / z, zero, fy / z, -fy * ty / z], -1).unflatten(-1, (2, 3))
    axes = quaternions_to_matrices(scene.quaternions[ids]) * scene.scales[ids][:, None, :]
    spread = jacobian @ rotation @ axes
    covariance = spread @ spread.mT
    a, b, c = covariance[:, 0, 0] + LOW_PASS, covariance[:, 0, 1], covariance[:, 1, 1] + LOW_PASS
    determinant = a * c - b * b
    middle = 0.5 * (a + c)
    radius = (3 * (middle + (middle * middle - determinant).clamp_min(0.1).sqrt()).sqrt()).ceil()
    column, row = fx * x / z + cx - 0.5, fy * y / z + cy - 0.5
    opacity = scene.opacities[ids]
    # The box of alpha >= 1/255, a little enlarged so that rounding loses no pixel.
    reach = (2 * (opacity / MIN_ALPHA).log().clamp_min(0) * 1.001).sqrt()
    tiles_x, tiles_y = -(-width // TILE_SIZE), -(-height // TILE_SIZE)

    def tile_span(centre: Tensor, variance: Tensor, tiles: int) -> tuple[Tensor, Tensor]:
        first = ((centre - radius) / TILE_SIZE).floor()
        last = ((centre + radius + TILE_SIZE - 1) / TILE_SIZE).floor()
        half = reach * variance.sqrt() + 0.01
        tight_first = ((centre - half) / TILE_SIZE).floor()
        tight_last = ((centre + half) / TILE_SIZE).floor() + 1
        return (
            torch.maximum(first, tight_first).clamp(0, tiles).int(),
            torch.minimum(last, tight_last).clamp(0, tiles).int(),
        )

    x0, x1 = tile_span(column, a, tiles_x)
    y0, y1 = tile_span(row, c, tiles_y)
    visible = (determinant > 0) & (opacity >= MIN_ALPHA) & (x1 > x0) & (y1 > y0)
    power_floor = -(opacity / MIN_ALPHA).log() * 1.0001 - 0.0001
    projected = torch.stack(
        [column, row, c / determinant, -b / determinant, a / determinant, opacity, z, power_floor], -1
    )
    order = torch.nonzero(visible)[:, 0]
    order = order[z[order].argsort(stable=True)]
    x0, x1, y0, y1 = x0[order], x1[order], y0[order], y1[order]
    spans = ((x1 - x0) * (y1 - y0)).long()
    rows = torch.arange(order.numel(), device=device).repeat_interleave(spans)
    nth = torch.arange(rows.numel(), device=device) - (spans.cumsum(0) - spans).repeat_interleave(spans)
    across = (x1 - x0)[rows]
    tiles = (y0[rows] + nth // across) * tiles_x + x0[rows] + nth % across
    by_tile = tiles.argsort(stable=True)
    counts = torch.bincount(tiles, minlength=tiles_x * tiles_y)
    tile_offsets = torch.zeros(tiles_x * tiles_y + 1, dtype=torch.int32, device=device)
    tile_offsets[1:] = counts.cumsum(0)
    return PreparedView(
        camera,
        scene.num_gaussians,
        projected[order].contiguous(),
        ids[order].int(),
        tile_offsets,
        rows[by_tile].int(),
    )


@torch.no_grad()
def blending_weights(view: PreparedView, pixel_ids: Tensor | None = None) -> BlendingWeights:
    """Returns how much each Gaussian contributes to each pixel.

    Args:
        view: The view.
        pixel_ids: [P] flat pixel ids (y * width + x), any integer type, any order; None means all pixels.
    """
    from lightning_modules.functional.kernels import blending, launch

    device = view.projected.device
    pixels = _pixel_ids(view, pixel_ids)
    counts = torch.zeros(pixels.numel(), dtype=torch.int32, device=device)
    offsets = torch.zeros(pixels.numel() + 1, dtype=torch.int64, device=device)
    gaussian_ids = torch.empty(0, dtype=torch.int32, device=device)
    weights = torch.empty(0, device=device)

    def blend(is_counting: bool) -> None:
        arguments = [
            pixels, view.camera.width, -(-view.camera.width // TILE_SIZE), view.projected, view.gaussian_ids,
            view.tile_offsets, view.tile_rows, is_counting, counts, offsets, gaussian_ids, weights,
        ]  # fmt: skip
        launch.launch(blending.blend_weights, pixels.numel(), arguments, device)

    blend(is_counting=True)
    torch.cumsum(counts, 0, out=offsets[1:])
    entries = int(offsets[-1])
    gaussian_ids, weights = gaussian_ids.new_empty(entries), weights.new_empty(entries)
    blend(is_counting=False)
    return BlendingWeights(pixels, offsets, gaussian_ids, weights, view.num_gaussians)


@torch.no_grad()
def render(
    scene: GaussianScene,
    view: PreparedView,
    pixel_ids: Tensor | None = None,
    background: Float[Tensor, "3"] | None = None,
) -> RenderedPixels:
    """Renders colour, depth and opacity.

    Args:
        scene: The scene that ``view`` was prepared from; only its means and spherical harmonics are read.
        view: The view.
        pixel_ids: [P] flat pixel ids; None means all pixels.
        background: Colour behind the scene; None means black.
    """
    from lightning_modules.functional.kernels import blending, launch

    device = view.projected.device
    pixels = _pixel_ids(view, pixel_ids)
    ids = view.gaussian_ids.long()
    directions = torch.nn.functional.normalize(scene.means[ids] - view.camera.position, dim=-1)
    colors = spherical_harmonics_colors(scene.spherical_harmonics[ids], directions)
    background = colors.new_zeros(3) if background is None else background.to(colors)
    rgb = torch.empty(pixels.numel(), 3, device=device)
    depth, alpha = torch.empty(pixels.numel(), device=device), torch.empty(pixels.numel(), device=device)
    arguments = [
        pixels, view.camera.width, -(-view.camera.width // TILE_SIZE), view.projected, view.tile_offsets,
        view.tile_rows, colors, background[None], rgb, depth, alpha,
    ]  # fmt: skip
    launch.launch(blending.blend_colors, pixels.numel(), arguments, device)
    return RenderedPixels(rgb, depth, alpha)


@torch.no_grad()
def render_codes(
    view: PreparedView, codes: SparseCodes, pixel_ids: Tensor | None = None
) -> tuple[Float[Tensor, "pixels channels"], Float[Tensor, " pixels"]]:
    """Renders the weight map of sparse codes without storing blending weights; for queries, so without gradients.

    Equals ``splat_codes(blending_weights(view, pixel_ids), codes)``.

    Returns:
        The weight map [P, num_channels] and the opacity [P].
    """
    from lightning_modules.functional.kernels import blending, launch

    device = view.projected.device
    pixels = _pixel_ids(view, pixel_ids)
    out = torch.zeros(pixels.numel(), codes.num_channels, device=device)
    alphas = torch.empty(pixels.numel(), device=device)
    arguments = [
        pixels, view.camera.width, -(-view.camera.width // TILE_SIZE), view.projected, view.gaussian_ids,
        view.tile_offsets, view.tile_rows, codes.channel_ids.contiguous(), codes.values.contiguous(), out, alphas,
    ]  # fmt: skip
    launch.launch(blending.blend_codes, pixels.numel(), arguments, device)
    return out, alphas


def splat_codes(weights: BlendingWeights, codes: SparseCodes) -> Float[Tensor, "pixels channels"]:
    """Blends sparse codes to a weight map [P, num_channels]; differentiable with respect to ``codes.values``."""
    return _SplatCodes.apply(codes.values, codes.channel_ids, codes.num_channels, weights)


def splat_dense(
    weights: BlendingWeights, values: Float[Tensor, "gaussians channels"]
) -> Float[Tensor, "pixels channels"]:
    """Blends dense vectors, E @ values; differentiable with respect to ``values``."""
    return _SplatDense.apply(values, weights)


def transpose_splat(
    weights: BlendingWeights, maps: Float[Tensor, "pixels channels"]
) -> Float[Tensor, "gaussians channels"]:
    """Gathers maps back onto the Gaussians, E^T @ maps; differentiable with respect to ``maps``."""
    return _TransposeSplat.apply(maps, weights)


class _SplatCodes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, channel_ids: Tensor, num_channels: int, weights: BlendingWeights) -> Tensor:
        from lightning_modules.functional.kernels import launch, splatting

        ctx.weights, ctx.channel_ids = weights, channel_ids.contiguous()
        out = values.new_zeros(weights.pixel_ids.numel(), num_channels)
        arguments = [
            weights.offsets, weights.gaussian_ids, weights.weights, ctx.channel_ids, values.contiguous(), out,
        ]  # fmt: skip
        launch.launch(splatting.splat_codes, out.shape[0], arguments, out.device)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        from lightning_modules.functional.kernels import launch, splatting

        (maps,) = grads
        offsets, pixel_rows, transposed = _transpose(ctx.weights)
        out = maps.new_empty(ctx.channel_ids.shape)
        arguments = [offsets, pixel_rows, transposed, ctx.channel_ids, maps.contiguous(), out]
        launch.launch(splatting.gather_codes, out.shape[0], arguments, out.device)
        return out, None, None, None


class _SplatDense(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, weights: BlendingWeights) -> Tensor:
        ctx.weights = weights
        return _multiply(weights, values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _multiply_transposed(ctx.weights, grads[0]), None


class _TransposeSplat(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, maps: Tensor, weights: BlendingWeights) -> Tensor:
        ctx.weights = weights
        return _multiply_transposed(weights, maps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _multiply(ctx.weights, grads[0]), None


def _multiply(weights: BlendingWeights, values: Tensor) -> Tensor:
    size = (weights.pixel_ids.numel(), weights.num_gaussians)
    return _sparse(weights.offsets, weights.gaussian_ids, weights.weights, size) @ values


def _multiply_transposed(weights: BlendingWeights, maps: Tensor) -> Tensor:
    offsets, pixel_rows, transposed = _transpose(weights)
    return _sparse(offsets, pixel_rows, transposed, (weights.num_gaussians, weights.pixel_ids.numel())) @ maps


def _sparse(offsets: Tensor, columns: Tensor, values: Tensor, size: tuple[int, int]) -> Tensor:
    return torch.sparse_csr_tensor(offsets.int(), columns, values, size=size, check_invariants=False)


def _transpose(weights: BlendingWeights) -> tuple[Tensor, Tensor, Tensor]:
    """Lists E by Gaussian, pixel rows rising, so that every sum over pixels has one owner and one order."""
    order = weights.gaussian_ids.argsort(stable=True)
    counts = torch.bincount(weights.gaussian_ids, minlength=weights.num_gaussians)
    offsets = counts.new_zeros(weights.num_gaussians + 1)
    torch.cumsum(counts, 0, out=offsets[1:])
    num_pixels = weights.pixel_ids.numel()
    pixel_rows = torch.arange(num_pixels, device=order.device, dtype=torch.int32)
    pixel_rows = pixel_rows.repeat_interleave(weights.offsets.diff(), output_size=order.numel())
    return offsets, pixel_rows[order], weights.weights[order]


def _pixel_ids(view: PreparedView, pixel_ids: Tensor | None) -> Tensor:
    """Returns checked int64 pixel ids on the view's device."""
    device, num_pixels = view.projected.device, view.camera.num_pixels
    if pixel_ids is None:
        return torch.arange(num_pixels, device=device)
    if pixel_ids.numel() and not (0 <= int(pixel_ids.min()) and int(pixel_ids.max()) < num_pixels):
        raise ValueError(
            f"pixel_ids must be between 0 and {num_pixels - 1} ({view.camera.width}x{view.camera.height} pixels), got "
            f"{int(pixel_ids.min())} to {int(pixel_ids.max())}; they are y * width + x of this view's camera."
        )
    return pixel_ids.to(device=device, dtype=torch.int64).contiguous()
