"""Rasterization of 3D Gaussians: blending weights, colours and sparse codes of one camera's pixels.

The conventions are those of 3D Gaussian Splatting (Kerbl et al. 2023): depth 0.2 and nearer is culled, the affine
projection (EWA) is clamped at 1.3 times the field of view (the principal point honoured), 0.3 px^2 are added to the
covariance's diagonal, the square of 3 standard deviations decides which 16x16 tiles a Gaussian touches, alpha below
1/255 is skipped, alpha is at most 0.99, and blending stops before transmittance falls below 1e-4.

The geometry is frozen: gradients flow to what is splatted, never to the Gaussians' shape. The pure-torch twin with all
gradients is :mod:`lightning_modules.functional.splatting.rasterization_reference`.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Float32, Int32, Int64
from scipy.sparse import csr_array
from torch import Tensor

from lightning_modules.functional.cameras import Camera
from lightning_modules.functional.language_field.sparse_codes import SparseCodes
from lightning_modules.functional.splatting.gaussians import GaussianScene

TILE_SIZE = 16
MIN_BLOCK_TILES = 8
"""Tiles that a thread takes at a time, at least: below this the launch costs more than the tiles."""


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
        return splat_dense(self, self.weights.new_ones(self.num_gaussians, 1))[:, 0]


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


def prepare_view(scene: GaussianScene, camera: Camera) -> PreparedView:
    """Projects a scene into a camera and lists, tile by tile and by rising depth, the Gaussians that can be seen.

    A list holds the Gaussians whose square of 3 standard deviations touches the tile, as in 3D Gaussian Splatting,
    less those whose alpha is below 1/255 on every pixel of it, which changes no result.
    """
    return _prepare_view(scene, camera)[0]


def prepare_view_by_gaussian(
    scene: GaussianScene, camera: Camera
) -> tuple[PreparedView, Int64[Tensor, " gaussians"], Int64[Tensor, " instances"]]:
    """Prepares a view, and numbers the entries of its lists Gaussian by Gaussian, for sums over a Gaussian's tiles.

    Returns:
        The view; [N] the number after that of the last entry of each Gaussian, in the order of the scene; [I] the
        number of each entry of ``tile_rows``.
    """
    view, spans, order = _prepare_view(scene, camera)
    ends = spans.cumsum(0)
    ids = view.gaussian_ids
    spans_by_depth = spans.index_select(0, ids)
    shifts = (ends - spans).index_select(0, ids) - (spans_by_depth.cumsum(0) - spans_by_depth)
    return view, ends, order + shifts.index_select(0, view.tile_rows)


@torch.no_grad()
def _prepare_view(scene: GaussianScene, camera: Camera) -> tuple[PreparedView, Tensor, Tensor]:
    """Returns a view, [N] the number of tiles of each Gaussian, and [I] the order that sorted its entries by tile."""
    from lightning_modules.functional.kernels import launch, projection

    device = scene.means.device
    tiles_x, tiles_y = -(-camera.width // TILE_SIZE), -(-camera.height // TILE_SIZE)
    (fx, _, cx), (_, fy, cy), _ = camera.intrinsics.tolist()
    projected = torch.empty(scene.num_gaussians, 8, device=device)
    boxes = torch.empty(scene.num_gaussians, 4, dtype=torch.int32, device=device)
    parameters = (scene.means, scene.log_scales, scene.quaternions, scene.opacity_logits, camera.camera_from_world)
    arguments = [
        *(x.to(device, torch.float32).contiguous() for x in parameters),
        fx, fy, cx, cy, camera.width, camera.height, projected, boxes,
    ]  # fmt: skip
    launch.launch(projection.project, scene.num_gaussians, arguments, device)

    spans = (boxes[:, 1] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 2])
    ids = torch.nonzero(spans)[:, 0]
    # The bits of positive floats sort like the floats, by a faster (radix) sort; ties keep the order of the scene.
    # index_select copies whole rows, several times faster than indexing.
    depths = projected[:, 6].index_select(0, ids)
    ids = ids.index_select(0, depths.view(torch.int32).argsort(stable=True))
    spans_by_depth = spans.index_select(0, ids)
    ends = spans_by_depth.cumsum(0)
    instances = int(ends[-1]) if ids.numel() else 0
    tiles = torch.empty(instances, dtype=torch.int32, device=device)
    rows = torch.empty(instances, dtype=torch.int32, device=device)
    arguments = [boxes.index_select(0, ids), ends - spans_by_depth, tiles_x, tiles, rows]
    launch.launch(projection.list_tiles, ids.numel(), arguments, device)
    tile_offsets = torch.zeros(tiles_x * tiles_y + 1, dtype=torch.int32, device=device)
    tile_offsets[1:] = torch.bincount(tiles, minlength=tiles_x * tiles_y).cumsum(0)
    order = tiles.argsort(stable=True)
    rows = rows.index_select(0, order)
    projected = projected.index_select(0, ids)
    return PreparedView(camera, scene.num_gaussians, projected, ids.int(), tile_offsets, rows), spans, order


@torch.no_grad()
def blending_weights(view: PreparedView, pixel_ids: Tensor | None = None) -> BlendingWeights:
    """Returns how much each Gaussian contributes to each pixel.

    Args:
        view: The view.
        pixel_ids: [P] flat pixel ids (y * width + x), any integer type, any order; None means all pixels.

    Raises:
        ValueError: If a pixel id is outside the image.
    """
    from lightning_modules.functional.kernels import launch

    strips = _strips(view, pixel_ids)
    pixels = strips.pixel_ids
    device = pixels.device
    counts = torch.empty(pixels.numel(), dtype=torch.int32, device=device)
    offsets = torch.zeros(pixels.numel() + 1, dtype=torch.int64, device=device)

    def blend(is_counting: bool, gaussian_ids: Tensor, weights: Tensor) -> None:
        arguments = [
            strips.first_pixels, strips.rows, view.camera.width, view.projected, view.gaussian_ids, view.tile_offsets,
            view.tile_rows, is_counting, counts, offsets[:-1].clone(), gaussian_ids, weights,
        ]  # fmt: skip
        launch.launch(strips.kernels.blend_weights, strips.rows.shape[0], arguments, device)

    blend(True, torch.empty(0, dtype=torch.int32, device=device), torch.empty(0, device=device))
    torch.cumsum(counts, 0, out=offsets[1:])
    entries = int(offsets[-1])
    gaussian_ids = torch.empty(entries, dtype=torch.int32, device=device)
    weights = torch.empty(entries, device=device)
    blend(False, gaussian_ids, weights)
    return BlendingWeights(pixels, offsets, gaussian_ids, weights, view.num_gaussians)


@torch.no_grad()
def render(
    scene: GaussianScene,
    view: PreparedView,
    pixel_ids: Tensor | None = None,
    background: Float[Tensor, "3"] | None = None,
) -> RenderedPixels:
    """Renders colour, depth and opacity, without gradients (blend colours by ``splat_dense`` to have them).

    Args:
        scene: The scene that ``view`` was prepared from; only its means and spherical harmonics are read.
        view: The view.
        pixel_ids: [P] flat pixel ids; None means all pixels.
        background: Colour behind the scene; None means black.

    Raises:
        ValueError: If a pixel id is outside the image.
    """
    colors, _, _ = shade(scene, view)
    background = colors.new_zeros(3) if background is None else background.to(colors)
    image = blend_image(view, colors, background)
    if pixel_ids is None:
        return image
    _check_pixels(view.camera, pixel_ids)
    return RenderedPixels(*(part[pixel_ids.long()] for part in image))


def shade(
    scene: GaussianScene, view: PreparedView
) -> tuple[Float32[Tensor, "visible 3"], Float32[Tensor, " gaussians"], Int32[Tensor, " gaussians"]]:
    """Evaluates the colours of the Gaussians of a view towards its camera; no gradients.

    Returns:
        Colours [V, 3]; radii [N], half the side of the square of 3 standard deviations in whole pixels, 0 = not
        visible; rows [N] of the Gaussians in the view, -1 = not visible.
    """
    from lightning_modules.functional.kernels import launch, shading

    device = view.projected.device
    # The kernel runs in the order of the scene: harmonics are too large to be read here and there.
    rows = torch.full((view.num_gaussians,), -1, dtype=torch.int32, device=device)
    rows[view.gaussian_ids] = torch.arange(len(view.gaussian_ids), dtype=torch.int32, device=device)
    colors = torch.empty(len(view.gaussian_ids), 3, device=device)
    radii = torch.empty(view.num_gaussians, device=device)
    parts = (as_kernels_read(x, device) for x in (scene.means, scene.spherical_harmonics, view.camera.position))
    launch.launch(shading.shade, view.num_gaussians, [rows, view.projected, *parts, colors, radii], device)
    return colors, radii, rows


def blend_image(
    view: PreparedView, colors: Float32[Tensor, "visible 3"], background: Float[Tensor, "3"]
) -> RenderedPixels:
    """Blends the colours of a view's Gaussians at all pixels, row by row; no gradients."""
    from lightning_modules.functional.kernels import launch

    camera, device = view.camera, view.projected.device
    rgb = torch.empty(camera.num_pixels, 3, device=device)
    depth, alpha = torch.empty(camera.num_pixels, device=device), torch.empty(camera.num_pixels, device=device)
    kernels = image_kernels(device)
    arguments = [
        camera.width, camera.height, view.projected, view.tile_offsets, view.tile_rows, colors,
        as_kernels_read(background, device), rgb, depth, alpha,
    ]  # fmt: skip
    num_threads = (view.tile_offsets.numel() - 1) * kernels.threads_per_tile
    launch.launch(kernels.blend, num_threads, arguments, device, min_block_rows=MIN_BLOCK_TILES)
    return RenderedPixels(rgb, depth, alpha)


@torch.no_grad()
def render_codes(
    view: PreparedView, codes: SparseCodes, pixel_ids: Tensor | None = None
) -> tuple[Float[Tensor, "pixels channels"], Float[Tensor, " pixels"]]:
    """Renders the weight map of sparse codes without storing blending weights; for queries, so without gradients.

    Equals ``splat_codes(blending_weights(view, pixel_ids), codes)``.

    Returns:
        The weight map [P, num_channels] and the opacity [P].

    Raises:
        ValueError: If a pixel id is outside the image, or the codes are not those of the view's Gaussians.
    """
    from lightning_modules.functional.kernels import launch

    _check_rows("codes", codes.values.shape[0], view.num_gaussians, "Gaussians")
    strips = _strips(view, pixel_ids)
    pixels = strips.pixel_ids
    out = torch.empty(pixels.numel(), codes.num_channels, device=pixels.device)
    alphas = torch.empty(pixels.numel(), device=pixels.device)
    arguments = [
        strips.first_pixels, strips.rows, view.camera.width, view.projected, view.gaussian_ids, view.tile_offsets,
        view.tile_rows, codes.channel_ids.short().contiguous(), codes.values.float().contiguous(), out, alphas,
    ]  # fmt: skip
    scratch = (codes.num_channels, strips.rows.shape[1])
    launch.launch(strips.kernels.blend_codes, strips.rows.shape[0], arguments, pixels.device, scratch)
    return out, alphas


def splat_codes(weights: BlendingWeights, codes: SparseCodes) -> Float[Tensor, "pixels channels"]:
    """Blends sparse codes to a weight map [P, num_channels]; differentiable with respect to ``codes.values``.

    Raises:
        ValueError: If the codes are not those of the weights' Gaussians.
    """
    _check_rows("codes", codes.values.shape[0], weights.num_gaussians, "Gaussians")
    return _SplatCodes.apply(codes.values, codes.channel_ids, codes.num_channels, weights)


def splat_dense(
    weights: BlendingWeights, values: Float[Tensor, "gaussians channels"]
) -> Float[Tensor, "pixels channels"]:
    """Blends dense vectors, E @ values; differentiable with respect to ``values``.

    Raises:
        ValueError: If ``values`` has not one row per Gaussian.
    """
    _check_rows("values", values.shape[0], weights.num_gaussians, "Gaussians")
    return _Multiply.apply(values, weights, False)


def transpose_splat(
    weights: BlendingWeights, maps: Float[Tensor, "pixels channels"]
) -> Float[Tensor, "gaussians channels"]:
    """Gathers maps back onto the Gaussians, E^T @ maps; differentiable with respect to ``maps``.

    Raises:
        ValueError: If ``maps`` has not one row per pixel.
    """
    _check_rows("maps", maps.shape[0], weights.pixel_ids.numel(), "pixels")
    return _Multiply.apply(maps, weights, True)


class _SplatCodes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, channel_ids: Tensor, num_channels: int, weights: BlendingWeights) -> Tensor:
        from lightning_modules.functional.kernels import launch, splatting

        ctx.weights, ctx.channel_ids = weights, channel_ids.short().contiguous()
        matrix = (weights.offsets, weights.gaussian_ids, weights.weights)
        out = torch.empty(weights.pixel_ids.numel(), num_channels, device=values.device)
        arguments = [*matrix, ctx.channel_ids, values.float().contiguous(), out]
        launch.launch(splatting.splat_codes, out.shape[0], arguments, out.device)
        return out.to(values.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        from lightning_modules.functional.kernels import launch, splatting

        (maps,) = grads
        out = torch.empty(ctx.channel_ids.shape, device=maps.device)
        block = _columns_per_thread(out)
        arguments = [block, *_transpose(ctx.weights), ctx.channel_ids, maps.float().contiguous(), out]
        launch.launch(splatting.gather_codes, out.numel() // block, arguments, out.device)
        return out.to(maps.dtype), None, None, None


class _Multiply(torch.autograd.Function):
    """E @ values, or E^T @ values; each is the other's gradient."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, weights: BlendingWeights, is_transposed: bool) -> Tensor:
        ctx.weights, ctx.is_transposed = weights, is_transposed
        return _multiply(weights, values, is_transposed)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _multiply(ctx.weights, grads[0], not ctx.is_transposed), None, None


def _multiply(weights: BlendingWeights, values: Tensor, is_transposed: bool) -> Tensor:
    from lightning_modules.functional.kernels import launch, splatting

    if is_transposed:
        matrix, num_rows = _transpose(weights), weights.num_gaussians
    else:
        matrix, num_rows = (weights.offsets, weights.gaussian_ids, weights.weights), weights.pixel_ids.numel()
    out = torch.empty(num_rows, values.shape[1], device=values.device)
    block = _columns_per_thread(out)
    arguments = [block, *matrix, values.float().contiguous(), out]
    launch.launch(splatting.multiply, out.numel() // block, arguments, out.device)
    return out.to(values.dtype)


def _columns_per_thread(out: Tensor) -> int:
    """Returns a whole row on CPU, where it stays in cache, and one element on CUDA, where neighbours read together."""
    return 1 if out.is_cuda else max(out.shape[1], 1)


def _transpose(weights: BlendingWeights) -> tuple[Tensor, Tensor, Tensor]:
    """Lists E by Gaussian, pixel rows rising, so that every sum over pixels has one owner and one order."""
    num_pixels = weights.pixel_ids.numel()
    if weights.weights.is_cuda:
        order = weights.gaussian_ids.argsort(stable=True)
        counts = torch.bincount(weights.gaussian_ids, minlength=weights.num_gaussians)
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        pixel_rows = torch.arange(num_pixels, device=order.device, dtype=torch.int32)
        pixel_rows = pixel_rows.repeat_interleave(weights.offsets.diff(), output_size=order.numel())
        return offsets, pixel_rows[order], weights.weights[order]
    # A counting sort, on CPU five times faster than sorting by comparison.
    parts = (weights.weights.numpy(), weights.gaussian_ids.numpy(), weights.offsets.numpy())
    by_gaussian = csr_array(parts, shape=(num_pixels, weights.num_gaussians)).tocsc()
    offsets, pixel_rows = torch.from_numpy(by_gaussian.indptr).long(), torch.from_numpy(by_gaussian.indices).int()
    return offsets, pixel_rows, torch.from_numpy(by_gaussian.data)


class _Strips(NamedTuple):
    """Pixels in groups of neighbours, tile by tile.

    Attributes:
        pixel_ids: [P] flat pixel ids.
        first_pixels: [S] flat pixel id of each strip's lane 0.
        rows: [S, lanes] row of ``pixel_ids`` of each lane, -1 = none.
        kernels: Kernels for this number of lanes.
    """

    pixel_ids: Tensor
    first_pixels: Tensor
    rows: Tensor
    kernels: Any


def _strips(view: PreparedView, pixel_ids: Tensor | None) -> _Strips:
    width, height, device = view.camera.width, view.camera.height, view.projected.device
    if pixel_ids is None:
        return _image_strips(width, height, device)
    _check_pixels(view.camera, pixel_ids)
    return _group_pixels(pixel_ids.to(device, torch.int64).contiguous(), width)


def _check_pixels(camera: Camera, pixel_ids: Tensor) -> None:
    if pixel_ids.numel() == 0:
        return
    lowest, highest = torch.stack(pixel_ids.aminmax()).tolist()
    if lowest < 0 or highest >= camera.num_pixels:
        raise ValueError(
            f"pixel_ids must be between 0 and {camera.num_pixels - 1} ({camera.width}x{camera.height} pixels), got "
            f"{lowest} to {highest}; they are y * width + x of this view's camera."
        )


@lru_cache(maxsize=4)
def _image_strips(width: int, height: int, device: torch.device) -> _Strips:
    return _group_pixels(torch.arange(width * height, device=device), width)


def _lanes(device: torch.device) -> int:
    """Returns the pixels of a strip: as many as a SIMD register holds on CPU, one per thread on CUDA."""
    return 1 if device.type == "cuda" else TILE_SIZE


def _group_pixels(pixel_ids: Tensor, width: int) -> _Strips:
    """Groups pixels, in any order and perhaps repeated, into strips for the kernels of their device."""
    from lightning_modules.functional.kernels.blending import blending_kernels

    lanes = _lanes(pixel_ids.device)
    y, x = pixel_ids // width, pixel_ids % width
    tile = y // TILE_SIZE * -(-width // TILE_SIZE) + x // TILE_SIZE
    strip = (tile * TILE_SIZE + y % TILE_SIZE) * (TILE_SIZE // lanes) + x % TILE_SIZE // lanes
    lane = x % lanes
    slot, order = (strip * lanes + lane).sort(stable=True)
    # A repeated pixel goes to the next strip of its kind: the strip's key counts repetitions in its high digits.
    places = torch.arange(slot.numel(), device=slot.device)
    is_new = torch.ones_like(slot, dtype=torch.bool)
    is_new[1:] = slot[1:] != slot[:-1]
    repetition = places - torch.where(is_new, places, 0).cummax(0).values
    num_slots = int(slot[-1]) + 1 if slot.numel() else 1
    key, again = (slot // lanes + repetition * num_slots).sort(stable=True)
    order, slot = order[again], slot[again]
    keys, group = key.unique_consecutive(return_inverse=True)
    rows = torch.full((keys.numel(), lanes), -1, dtype=torch.int32, device=slot.device)
    rows[group, slot % lanes] = order.int()
    first_pixels = torch.empty(keys.numel(), dtype=torch.int32, device=slot.device)
    first_pixels[group] = (pixel_ids - lane)[order].int()
    return _Strips(pixel_ids, first_pixels, rows, blending_kernels(lanes))


def image_kernels(device: torch.device) -> Any:
    """Returns the kernels that blend whole images, for the registers of a device."""
    from lightning_modules.functional.kernels.tile_blending import tile_blending_kernels

    return tile_blending_kernels(_lanes(device))


def as_kernels_read(x: Tensor, device: torch.device) -> Tensor:
    """Returns a tensor as kernels take it: float32, contiguous, on a device, without gradients."""
    return x.detach().to(device, torch.float32).contiguous()


def _check_rows(name: str, actual: int, expected: int, of_what: str) -> None:
    if actual != expected:
        raise ValueError(f"{name} has {actual} rows, but the view has {expected} {of_what}; give one row for each.")
