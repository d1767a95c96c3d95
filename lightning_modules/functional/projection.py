"""Points seen by posed images: where, how surely, and what image features they get.

Pixel (0, 0) has its centre at (0.5, 0.5), so that the sampling coordinate of ``grid_sample`` with
``align_corners=False`` is exactly ``2 u / W - 1``, at every resolution of the features. ``cameras.back_project`` is the
way back, from a depth map to points.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lightning_modules.functional.kernels.launch import launch
from lightning_modules.functional.kernels.uv_index import look_up

NEAR_M = 0.05  # points nearer than this, or behind the camera, are not seen
DEPTH_TOLERANCE_M = 0.05
DEPTH_TOLERANCE_FRACTION = 0.02  # beyond 2.5 m the noise of depth cameras outgrows 5 cm


class UvIndex(NamedTuple):
    """Where points lie in images.

    Attributes:
        uv: [..., N, 2] u to the right and v down, pixels; pixel (0, 0) covers 0 to 1. Zero for points that are not in
            front of the camera, outside 0 to W and 0 to H for those beside the image.
        valid: [..., N] the point is in front of the camera and in the image, and its depth agrees with the depth map.
        conf_2d: [..., N] 0 where invalid. Elsewhere 1 / (1 + (2 e / t)^2) for a difference e to the depth map and its
            tolerance t (Cauchy's weight): from 1 down to 0.2. 1 where there is no depth map.
        z: [..., N] camera-space depth, metres.
    """

    uv: Float[Tensor, "*batch points 2"]
    valid: Bool[Tensor, "*batch points"]
    conf_2d: Float[Tensor, "*batch points"]
    z: Float[Tensor, "*batch points"]


def build_uv_index(
    points: Float[Tensor, "points 3"],
    intrinsics: Float[Tensor, "3 3"],
    camera_from_world: Float[Tensor, "4 4"],
    size: tuple[int, int],
    depth: Float[Tensor, "depth_height depth_width"] | None = None,
) -> UvIndex:
    """Projects points into one image; as :func:`build_uv_index_batch`, without its leading dimensions."""
    index = build_uv_index_batch(
        points[None],
        intrinsics[None, None],
        camera_from_world[None, None],
        size,
        None if depth is None else depth[None, None],
    )
    return UvIndex(*(part[0, 0] for part in index))


@torch.no_grad()
def build_uv_index_batch(
    points: Float[Tensor, "scenes points 3"],
    intrinsics: Float[Tensor, "scenes views 3 3"],
    camera_from_world: Float[Tensor, "scenes views 4 4"],
    size: tuple[int, int],
    depth: Float[Tensor, "scenes views depth_height depth_width"] | None = None,
    *,
    has_frame: Bool[Tensor, "scenes views"] | None = None,
) -> UvIndex:
    """Projects the points of B scenes into the V images of each.

    The arithmetic is float64, also under autocast: in float32, points half a metre before a camera of 1000 px that is
    14 m from the world's origin are up to 0.003 px off. Depth is compared with the pixel of the depth map that the
    point falls in; OpenScene's tolerance of 25 % accepts even inverted poses, so ours is 5 cm, or 2 % beyond 2.5 m.

    Args:
        points: World coordinates, metres. A point that is not finite is seen nowhere.
        intrinsics: Of the images at ``size``.
        camera_from_world: OpenCV cameras, metres.
        size: Height and width of the images.
        depth: Camera-space z registered to the images, of any size with the same field of view, metres; 0, less, or
            not finite = none, where nothing is seen.
        has_frame: False for views that only fill up the batch; no point is seen by them.

    Returns:
        uv [B, V, N, 2], the others [B, V, N], float32.
    """
    num_scenes, num_points, num_views = len(points), points.shape[1], intrinsics.shape[1]
    shape, device = (num_scenes, num_views, num_points), points.device
    image_from_world = intrinsics.double() @ camera_from_world[..., :3, :].double()
    if has_frame is None:
        has_frame = torch.ones(shape[:2], dtype=torch.bool, device=device)
    maps = torch.zeros(1, 1, 1, device=device) if depth is None else depth.flatten(0, 1).float()
    index = UvIndex(
        torch.empty(*shape, 2, device=device),
        torch.empty(shape, dtype=torch.bool, device=device),
        torch.empty(shape, device=device),
        torch.empty(shape, device=device),
    )
    arguments = (
        num_points,
        num_views,
        float(size[1]),
        float(size[0]),
        NEAR_M,
        DEPTH_TOLERANCE_M,
        DEPTH_TOLERANCE_FRACTION,
        depth is not None,
        points.reshape(-1, 3).float().contiguous(),
        image_from_world.reshape(-1, 12),
        has_frame.flatten().contiguous(),
        maps.contiguous(),
        index.uv.view(-1, 2),
        *(part.flatten() for part in index[1:]),
    )
    launch(look_up, num_scenes * num_points, arguments, device, min_block_rows=2048)
    return index


@torch.no_grad()
def build_uv_index_reference(
    points: Float[Tensor, "scenes points 3"],
    intrinsics: Float[Tensor, "scenes views 3 3"],
    camera_from_world: Float[Tensor, "scenes views 4 4"],
    size: tuple[int, int],
    depth: Float[Tensor, "scenes views depth_height depth_width"] | None = None,
    *,
    has_frame: Bool[Tensor, "scenes views"] | None = None,
) -> UvIndex:
    """Does in torch alone what :func:`build_uv_index_batch` does in a Warp kernel, as its twin."""
    height, width = size
    num_scenes, num_views = intrinsics.shape[:2]
    image_from_world = intrinsics.double() @ camera_from_world[..., :3, :].double()
    homogeneous = torch.baddbmm(
        image_from_world[..., 3].reshape(num_scenes, num_views * 3, 1),
        image_from_world[..., :3].reshape(num_scenes, num_views * 3, 3),
        points.double().mT,
    ).unflatten(1, (num_views, 3))
    exact_z = homogeneous[:, :, 2]
    in_front = exact_z > NEAR_M
    uv = torch.where(in_front[:, :, None], homogeneous[:, :, :2] / exact_z[:, :, None], 0.0).mT.float()
    z = exact_z.float()
    valid = in_front & (uv >= 0).all(dim=-1) & (uv < torch.tensor([width, height], device=uv.device)).all(dim=-1)
    if has_frame is not None:
        valid &= has_frame[..., None]
    conf_2d = valid.float()
    if depth is not None:
        observed = depth.flatten(2).float().gather(2, _pixels(uv, size, (depth.shape[2], depth.shape[3])))
        deviation = (observed - z).abs() / (z * DEPTH_TOLERANCE_FRACTION).clamp(min=DEPTH_TOLERANCE_M)
        valid &= (observed > 0) & (deviation <= 1)
        conf_2d = torch.where(valid, 1 / (1 + 4 * deviation.square()), 0.0)
    return UvIndex(uv, valid, conf_2d, z)


@torch.no_grad()
def filter_by_masks(
    index: UvIndex,
    mask_ids: Int[Tensor, "views mask_height mask_width"],
    size: tuple[int, int],
    *,
    margin: int = 2,
    min_overlap: float = 0.5,
) -> UvIndex:
    """Leaves out of each view the points that 2D instance masks from elsewhere say are not safely on one thing.

    Two tests; a point fails in single views and may stay in others:

    - Near a boundary: within ``margin`` pixels of another mask, or of none. There uv, masks and depth are off by a
      pixel or two, and features mix both sides.
    - Outvoted: masks need not be tracked, so numbers of different views mean nothing to each other. Two masks of two
      views are taken for the same thing, or a part of it, if they share at least ``min_overlap`` of the smaller one's
      points that both views see. A view loses a point where the masks of more views disagree with its own than agree;
      of two views that disagree, both lose it.

    Points in no mask are not voted on: they stay unless they are near a boundary. The encoder takes no masks; filter
    ``EncodedScenes.uv_index`` between ``BiFusionEncoder.encode`` and ``fuse``.

    Args:
        index: Of one scene, [V, N].
        mask_ids: Number of the mask of each pixel, -1 = none; registered to the images, of any size.
        size: Height and width of the images that uv counts in.
        margin: Pixels of the masks.
        min_overlap: Share of the smaller mask.

    Returns:
        The same with fewer valid points; ``conf_2d`` is 0 where they are left out.
    """
    ids, window = mask_ids.double()[:, None], 2 * margin + 1
    highest, lowest = (sign * F.max_pool2d(sign * ids, window, 1, margin) for sign in (1, -1))
    is_inside = (highest == lowest).flatten(1)
    pixels = _pixels(index.uv, size, (mask_ids.shape[1], mask_ids.shape[2]))
    valid = index.valid & is_inside.gather(1, pixels)
    mask_of_point = mask_ids.flatten(1).gather(1, pixels)
    votes = torch.zeros_like(pixels)
    for one in range(len(mask_ids)):
        for other in range(one):
            both = (valid[one] & valid[other]).nonzero()[:, 0]
            vote = _mask_votes(mask_of_point[one, both], mask_of_point[other, both], min_overlap)
            votes[one, both] += vote
            votes[other, both] += vote
    valid &= votes >= 0
    return index._replace(valid=valid, conf_2d=index.conf_2d * valid)


def _mask_votes(
    ids_a: Int[Tensor, " points"], ids_b: Int[Tensor, " points"], min_overlap: float
) -> Int[Tensor, " points"]:
    """Returns 1 for points whose masks in two views are of one thing, -1 where they are not, 0 where one has none."""
    masks_a, a = ids_a.unique(return_inverse=True)
    masks_b, b = ids_b.unique(return_inverse=True)
    shared = torch.bincount(a * len(masks_b) + b, minlength=len(masks_a) * len(masks_b)).view(
        len(masks_a), len(masks_b)
    )
    smaller = torch.minimum(shared.sum(dim=1, keepdim=True), shared.sum(dim=0, keepdim=True))
    vote = torch.where(shared >= min_overlap * smaller, 1, -1)[a, b]
    return torch.where((ids_a >= 0) & (ids_b >= 0), vote, 0)


def _pixels(
    uv: Float[Tensor, "*batch points 2"], size: tuple[int, int], grid: tuple[int, int]
) -> Int[Tensor, "*batch points"]:
    """Returns the pixel of a map of size ``grid`` that each point falls in, as a row of the flattened map."""
    scale = torch.tensor([grid[1] / size[1], grid[0] / size[0]], dtype=torch.float32, device=uv.device)
    last = torch.tensor([grid[1] - 1, grid[0] - 1], device=uv.device)
    column, row = torch.minimum((uv * scale).nan_to_num(0.0).clamp(min=0), last).long().unbind(-1)
    return row * grid[1] + column


def sample_img_feat(
    features: Float[Tensor, "*batch channels height width"], uv: Float[Tensor, "*batch points 2"], size: tuple[int, int]
) -> Float[Tensor, "*batch points channels"]:
    """Interpolates image features bilinearly at points; beyond the outermost cell centres the border goes on.

    Equal to ``grid_sample`` with ``align_corners=False`` and ``padding_mode="border"``. A weighted sum of rows is
    several times as fast, forward and backward, because the channels of a cell lie side by side, and it is
    deterministic on CUDA, too.

    Args:
        features: Of the whole images.
        uv: Pixels of the images at ``size``, u before v; no gradient flows to them. Points that are not finite get
            some cell's features.
        size: Height and width of the images.
    """
    *batch, num_channels, height, width = features.shape
    tables = features.reshape(-1, num_channels, height * width)
    cells, weights = _bilinear_cells(uv.reshape(len(tables), uv.shape[-2], 2), size, (height, width))
    rows = F.embedding_bag(
        cells.flatten(0, 1),
        tables.mT.reshape(-1, num_channels).contiguous(),
        per_sample_weights=weights.flatten(0, 1).to(features.dtype),
        mode="sum",
    )
    return rows.view(*batch, uv.shape[-2], num_channels)


def sample_views(
    features: Float[Tensor, "*batch views channels height width"],
    uv: Float[Tensor, "*batch views points 2"],
    conf_2d: Float[Tensor, "*batch views points"],
    size: tuple[int, int],
) -> tuple[Float[Tensor, "*batch points channels"], Bool[Tensor, "*batch points"]]:
    """Samples features in all views and merges them: :func:`sample_img_feat`, then :func:`merge_views`, in one sum.

    The features of each view's points, V times the result, are never stored.
    """
    *batch, num_views, num_channels, height, width = features.shape
    num_points = uv.shape[-2]
    tables = features.reshape(-1, num_channels, height * width)
    cells, weights = _bilinear_cells(uv.reshape(len(tables), num_points, 2), size, (height, width))
    shares, seen = _view_shares(conf_2d)
    weights = weights * shares.reshape(len(tables), num_points, 1)
    cells, weights = (
        part.unflatten(0, (-1, num_views)).transpose(1, 2).reshape(-1, num_views * 4) for part in (cells, weights)
    )
    rows = F.embedding_bag(
        cells,
        tables.mT.reshape(-1, num_channels).contiguous(),
        per_sample_weights=weights.to(features.dtype),
        mode="sum",
    )
    return rows.view(*batch, num_points, num_channels), seen


def merge_views(
    values: Float[Tensor, "*batch views points channels"], conf_2d: Float[Tensor, "*batch views points"]
) -> tuple[Float[Tensor, "*batch points channels"], Bool[Tensor, "*batch points"]]:
    """Averages what the views say of each point, weighted by confidence.

    Returns:
        The means, zero for points that no view sees; and which points are seen.
    """
    shares, seen = _view_shares(conf_2d)
    return (values * shares.to(values.dtype)[..., None]).sum(dim=-3), seen


@torch.no_grad()
def _view_shares(
    conf_2d: Float[Tensor, "*batch views points"],
) -> tuple[Float[Tensor, "*batch views points"], Bool[Tensor, "*batch points"]]:
    """Returns each view's share in a point's mean, zero where no view sees it."""
    total = conf_2d.sum(dim=-2)
    seen = total > 0
    return conf_2d / torch.where(seen, total, 1.0)[..., None, :], seen


@torch.no_grad()
def _bilinear_cells(
    uv: Float[Tensor, "images points 2"], size: tuple[int, int], grid: tuple[int, int]
) -> tuple[Int[Tensor, "images points 4"], Float[Tensor, "images points 4"]]:
    """Returns the four cells around each point, as rows of all images' cells one after the other, and their weights."""
    height, width = grid
    scale = torch.tensor([width / size[1], height / size[0]], dtype=torch.float32, device=uv.device)
    last = torch.tensor([width - 1, height - 1], dtype=torch.float32, device=uv.device)
    position = torch.minimum((uv.float() * scale - 0.5).nan_to_num(0.0).clamp_(min=0), last)
    before = torch.minimum(position.floor(), (last - 1).clamp_(min=0))
    x, y = (position - before).unbind(-1)
    column, row = before.long().unbind(-1)
    first = row * width + column + torch.arange(len(uv), device=uv.device)[:, None] * (height * width)
    right, down = min(width - 1, 1), min(height - 1, 1) * width  # a grid of one cell has no other
    cells = torch.stack([first, first + right, first + down, first + right + down], dim=-1)
    return cells, torch.stack([(1 - x) * (1 - y), x * (1 - y), (1 - x) * y, x * y], dim=-1)
