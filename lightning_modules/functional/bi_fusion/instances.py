"""Objects of one frame, and which of them are objects seen before."""

from collections.abc import Collection
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from scipy.sparse import coo_matrix, csr_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from lightning_modules.functional.bi_fusion.ball_query import ball_query

LINKS = 8  # neighbours that a point may be joined to; a surface stays in one piece with fewer


class Instances(NamedTuple):
    """Objects of a frame of N points, from :func:`frame_instances` or from any segmenter.

    Attributes:
        point_ids: K tensors [n_k] of rows of the frame's points; objects may overlap.
        scores: [K] how sure each one is, 0 to 1.
        class_ids: [K] int64, -1 = unknown, which agrees with every class.
        descriptors: [K, C] unit features.
        boxes: [K, 6] axis-aligned in the world: lower corner, upper corner, metres.
    """

    point_ids: tuple[Int[Tensor, " _"], ...]
    scores: Float[Tensor, " objects"]
    class_ids: Int[Tensor, " objects"]
    descriptors: Float[Tensor, "objects channels"]
    boxes: Float[Tensor, "objects 6"]


def frame_instances(
    points: Float[Tensor, "points 3"],
    features: Float[Tensor, "points channels"],
    class_ids: Int[Tensor, " points"],
    scores: Float[Tensor, " points"],
    *,
    radius: float = 0.1,
    min_points: int = 30,
    leave_out: Collection[int] = (),
    superpoints: Int[Tensor, " points"] | None = None,
) -> Instances:
    """Groups neighbouring points of one class into objects; no network, and no masks needed.

    Args:
        points: World coordinates, metres.
        features: Unit, of the points.
        class_ids: Of the points, -1 = none, which is no object.
        scores: How sure each point's class is, 0 to 1.
        radius: Points at most this far apart, and of one class, are of one object; metres.
        min_points: Smaller groups are dropped.
        leave_out: Classes that are no objects, such as wall and floor.
        superpoints: Group of each point; a group's points take the class of most of them first.
    """
    if superpoints is not None:
        class_ids = majority_class(class_ids, superpoints)
    neighbours = ball_query(points, radius, LINKS + 1)
    source = torch.arange(len(points), device=points.device, dtype=torch.int64)[:, None].expand_as(neighbours)
    target = neighbours.long()
    joined = (target >= 0) & (class_ids[source] == class_ids[target.clamp_min(0)])
    edges = torch.stack([source[joined], target[joined]]).cpu().numpy()
    graph = coo_matrix((np.ones(edges.shape[1], np.int8), (edges[0], edges[1])), shape=(len(points),) * 2)
    groups = torch.from_numpy(connected_components(graph, directed=False)[1]).long().to(points.device)
    kept = class_ids >= 0
    for left_out in leave_out:
        kept = kept & (class_ids != left_out)
    sizes = torch.bincount(groups[kept], minlength=int(groups.max()) + 1 if len(groups) else 0)
    point_ids = tuple(((groups == group) & kept).nonzero()[:, 0] for group in (sizes >= min_points).nonzero()[:, 0])
    return describe_instances(points, features, class_ids, scores, point_ids)


def describe_instances(
    points: Float[Tensor, "points 3"],
    features: Float[Tensor, "points channels"],
    class_ids: Int[Tensor, " points"],
    scores: Float[Tensor, " points"],
    point_ids: tuple[Int[Tensor, " _"], ...],
) -> Instances:
    """Gives masks of a frame what merging needs: the mean feature and score, the first point's class, the box."""
    if not point_ids:
        return Instances(
            (),
            scores[:0].float(),
            class_ids[:0].long(),
            features[:0].float(),
            points.new_zeros(0, 6, dtype=torch.float32),
        )
    boxes = [torch.cat([points[rows].amin(dim=0), points[rows].amax(dim=0)]) for rows in point_ids]
    return Instances(
        point_ids,
        torch.stack([scores[rows].float().mean() for rows in point_ids]),
        torch.stack([class_ids[rows[0]].long() for rows in point_ids]),
        F.normalize(torch.stack([features[rows].float().mean(dim=0) for rows in point_ids]), dim=-1),
        torch.stack(boxes).float(),
    )


def majority_class(class_ids: Int[Tensor, " points"], groups: Int[Tensor, " points"]) -> Int[Tensor, " points"]:
    """Gives each point the class most points of its group have; of equals the lower, -1 where none has one."""
    _, group = torch.unique(groups, return_inverse=True)
    votes = torch.zeros(_count(group), max(_count(class_ids), 1), dtype=torch.int64, device=class_ids.device)
    counted = class_ids >= 0
    votes.index_put_((group[counted], class_ids[counted]), torch.ones_like(group[counted]), accumulate=True)
    most, winner = votes.max(dim=1)
    return torch.where(most > 0, winner, -1)[group]


def _count(ids: Tensor) -> int:
    return int(ids.max()) + 1 if len(ids) else 0


def box_iou(
    ones: Float[Tensor, "ones 6"], others: Float[Tensor, "others 6"], min_size: float = 1e-3
) -> Float[Tensor, "ones others"]:
    """Returns the shared volume over the united volume of axis-aligned boxes.

    Args:
        ones: Lower and upper corners, metres.
        others: Likewise.
        min_size: Thinner boxes, such as a door seen from the front, count as this thick.
    """
    (lower_a, upper_a), (lower_b, upper_b) = (_thickened(boxes, min_size) for boxes in (ones, others))
    shared = torch.minimum(upper_a[:, None], upper_b[None]) - torch.maximum(lower_a[:, None], lower_b[None])
    volume = shared.clamp_min(0).prod(dim=-1)
    volume_a, volume_b = (upper_a - lower_a).prod(dim=-1), (upper_b - lower_b).prod(dim=-1)
    return volume / (volume_a[:, None] + volume_b[None] - volume)


def _thickened(boxes: Tensor, min_size: float) -> tuple[Tensor, Tensor]:
    middle = (boxes[:, :3] + boxes[:, 3:]) / 2
    half = ((boxes[:, 3:] - boxes[:, :3]) / 2).clamp_min(min_size / 2)
    return middle - half, middle + half


def voxel_overlap(
    ones: tuple[Int[Tensor, " _"], ...], others: tuple[Int[Tensor, " _"], ...]
) -> Float[Tensor, "ones others"]:
    """Returns the shared voxels over those of the smaller set: 1 where a view of an object's part lies in it.

    Args:
        ones: Keys of each object's voxels, none twice.
        others: Likewise.
    """
    if not ones or not others:
        return torch.zeros(len(ones), len(others))
    voxels, column = np.unique(torch.cat([*ones, *others]).cpu().numpy(), return_inverse=True)
    lengths = np.array([len(keys) for keys in (*ones, *others)])
    row = np.repeat(np.arange(len(lengths)), lengths)
    table = csr_matrix((np.ones(len(row), np.float32), (row, column)), shape=(len(lengths), len(voxels)))
    shared = (table[: len(ones)] @ table[len(ones) :].T).toarray()
    smaller = np.minimum(lengths[: len(ones), None], lengths[None, len(ones) :]).clip(1)
    return torch.from_numpy(shared / smaller)


def same_class(ones: Int[Tensor, " ones"], others: Int[Tensor, " others"]) -> Float[Tensor, "ones others"]:
    """Returns 1 where classes agree or one of them is unknown, else 0."""
    a, b = ones[:, None], others[None]
    return ((a == b) | (a < 0) | (b < 0)).float()


def match_objects(
    similarity: Float[Tensor, "ones others"], min_similarity: float = 0.0
) -> tuple[Int[Tensor, " pairs"], Int[Tensor, " pairs"]]:
    """Pairs objects one to one, the sum of similarities at its largest (the Hungarian method); drops weak pairs.

    Args:
        similarity: Of each pair; what cannot be the same has 0 or less.
        min_similarity: Pairs must be more alike than this.
    """
    rows, columns = linear_sum_assignment(-similarity.double().clamp_min(0).cpu().numpy())
    rows_, columns_ = torch.from_numpy(rows), torch.from_numpy(columns)
    accepted = similarity.cpu()[rows_, columns_] > min_similarity
    return rows_[accepted], columns_[accepted]
