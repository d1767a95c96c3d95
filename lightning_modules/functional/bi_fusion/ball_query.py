"""Neighbourhoods of points: the nearest ones within a radius, cloud by cloud."""

import math
import threading

import torch
import warp as wp
from jaxtyping import Float, Int32
from torch import Tensor

from lightning_modules.functional.kernels import ball_query as kernels
from lightning_modules.functional.kernels.launch import launch

_MANY = 1024  # points from which a look at some of them is worth it
_SAMPLES = 64
_grids = threading.local()  # the buffers are kept for the next call; threads must not share them


@torch.no_grad()
def ball_query(
    points: Float[Tensor, "points 3"],
    radius: float,
    num_neighbours: int,
    cloud_ids: Int32[Tensor, " points"] | None = None,
    *,
    queries: Float[Tensor, "queries 3"] | None = None,
    query_cloud_ids: Int32[Tensor, " queries"] | None = None,
) -> Int32[Tensor, "rows num_neighbours"]:
    """Lists the nearest points within a radius of each point, itself included, nearest first.

    Points at the same distance are sorted by their number. All clouds share one hash grid, whose cells are sorted by
    cloud, so that their number does not matter.

    Args:
        points: Of all clouds, one after the other or mixed; metres. A point that is not finite has no neighbour.
        radius: Metres; a point at this very distance is in.
        num_neighbours: Most neighbours of a point.
        cloud_ids: Which cloud each point is of; points of different clouds are no neighbours. None: all of one.
        queries: Look around these places instead of around the points.
        query_cloud_ids: Which cloud each query looks in; needed where both ``queries`` and ``cloud_ids`` are given.

    Returns:
        Numbers of the neighbours, a row for each point, or each query; -1 after the last.

    Raises:
        ValueError: If ``radius`` is not positive, or ``num_neighbours`` less than 1.
    """
    _check(radius, num_neighbours)
    points = points.float().contiguous()
    places = points if queries is None else queries.float().contiguous()
    place_clouds = cloud_ids if queries is None else query_cloud_ids
    assert (place_clouds is None) == (cloud_ids is None)
    first = _first_radius(points, cloud_ids, places, place_clouds, radius, num_neighbours)
    neighbours = _nearest(points, cloud_ids, places, place_clouds, first, num_neighbours)
    if first < radius:
        rest = (neighbours[:, -1] < 0).nonzero()[:, 0]
        rest_clouds = None if place_clouds is None else place_clouds[rest]
        neighbours[rest] = _nearest(points, cloud_ids, places[rest], rest_clouds, radius, num_neighbours)
    return neighbours


def ball_query_reference(
    points: Float[Tensor, "points 3"],
    radius: float,
    num_neighbours: int,
    cloud_ids: Int32[Tensor, " points"] | None = None,
    *,
    queries: Float[Tensor, "queries 3"] | None = None,
    query_cloud_ids: Int32[Tensor, " queries"] | None = None,
) -> Int32[Tensor, "rows num_neighbours"]:
    """Compares all pairs in torch alone, as the twin of :func:`ball_query`; memory is quadratic in the points."""
    _check(radius, num_neighbours)
    exact = points.float().double()
    places = exact if queries is None else queries.float().double()
    clouds = cloud_ids if queries is None else query_cloud_ids
    squares = (places[:, None] - exact[None]).square().sum(dim=-1)
    is_near = squares <= radius**2
    if cloud_ids is not None and clouds is not None:
        is_near &= clouds[:, None] == cloud_ids[None]
    nearest = torch.where(is_near, squares, torch.inf).sort(dim=1, stable=True)
    neighbours = torch.where(nearest.values.isfinite(), nearest.indices, -1)[:, :num_neighbours].int()
    return torch.nn.functional.pad(neighbours, (0, num_neighbours - neighbours.shape[1]), value=-1)


def _check(radius: float, num_neighbours: int) -> None:
    if not radius > 0:
        raise ValueError(f"radius must be positive, got {radius}; it is in the points' unit, metres.")
    if num_neighbours < 1:
        raise ValueError(f"num_neighbours must be 1 or more, got {num_neighbours}; a point is its own neighbour.")


def _nearest(
    points: Float[Tensor, "points 3"],
    clouds: Int32[Tensor, " points"] | None,
    places: Float[Tensor, "places 3"],
    place_clouds: Int32[Tensor, " places"] | None,
    radius: float,
    num_neighbours: int,
) -> Int32[Tensor, "places num_neighbours"]:
    """Builds the grid and looks around every place."""
    shape, device = (len(places), num_neighbours), points.device
    neighbours = torch.empty(shape, dtype=torch.int32, device=device)
    if len(points) == 0 or len(places) == 0:
        return neighbours.fill_(-1)
    grid = _build_grid(points, radius, None if clouds is None else clouds.contiguous())
    arguments = (
        wp.uint64(grid.id),
        wp.from_torch(points, dtype=wp.vec3, return_ctype=True),
        wp.from_torch(places, dtype=wp.vec3, return_ctype=True),
        torch.zeros(shape[:1], dtype=torch.int32, device=device) if place_clouds is None else place_clouds.contiguous(),
        places is points,
        wp.float64(radius),
        torch.empty(shape, dtype=torch.float64, device=device),
        neighbours,
    )
    launch(kernels.nearest_within, len(places), arguments, device)
    return neighbours


def _first_radius(
    points: Float[Tensor, "points 3"],
    clouds: Int32[Tensor, " points"] | None,
    places: Float[Tensor, "places 3"],
    place_clouds: Int32[Tensor, " places"] | None,
    radius: float,
    num_neighbours: int,
) -> float:
    """Returns a radius that nine in ten balls are full within, or ``radius``.

    A full ball has the same neighbours in any larger one, and time grows with the points in it: in a frame of 20,000
    points and balls of 0.3 m, the nearest 16 are found many times faster. Some places tell; on CUDA, where it would
    have to be waited for, ``radius`` it is.
    """
    if points.device.type != "cpu" or len(points) < _MANY or len(places) < _MANY:
        return radius
    some = slice(None, None, len(places) // _SAMPLES)
    sampled_clouds = None if place_clouds is None else place_clouds[some]
    last = _nearest(points, clouds, places[some].contiguous(), sampled_clouds, radius, num_neighbours)[:, -1].long()
    distance = (points[last] - places[some]).norm(dim=1)[last >= 0]
    if len(distance) < 0.9 * len(last):
        return radius
    first = 1.1 * float(distance.quantile(0.9))
    return first if 0 < first < 0.7 * radius else radius


def _build_grid(
    points: Float[Tensor, "points 3"], radius: float, clouds: Int32[Tensor, " points"] | None
) -> wp.HashGrid:
    """Sorts the points into cells as wide as the radius; on CUDA, on torch's current stream."""
    # At least four cells for each point, so that few share one with far points; powers of two, so that few are kept.
    side = min(128, max(8, 1 << math.ceil(math.log2(4 * len(points)) / 3)))
    name = f"{points.device}, {side}"
    if not hasattr(_grids, name):
        wp.init()
        setattr(_grids, name, wp.HashGrid(side, side, side, device=wp.device_from_torch(points.device)))
    grid: wp.HashGrid = getattr(_grids, name)
    vectors = wp.from_torch(points, dtype=wp.vec3)
    groups = None if clouds is None else wp.from_torch(clouds, dtype=wp.int32)
    if points.device.type == "cuda":
        with wp.ScopedStream(wp.stream_from_torch(torch.cuda.current_stream(points.device)), sync_enter=False):
            grid.build(vectors, radius, groups)
    else:
        grid.build(vectors, radius, groups)
    return grid
