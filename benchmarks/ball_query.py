"""The nearest points within a radius: our hash grid against scipy's tree, every row equal.

Points fill a cube evenly, with about 30 in each ball, or lie on the walls of a room, with several hundred in each ball
of 0.3 m of which the nearest 16 are wanted. Both sides build their index anew, as they must for every batch; the tree
has as many workers as we have threads.

What it takes at least: the balls are 4.2 of the 27 cells around a point, so that there are 6.4 distances for each
neighbour, 4 million for the cube, of ten operations each: a few ms of one core if nothing had to be sorted or looked
up. The result is 2.5 MB. The tree does far less arithmetic and spends its time on following branches.

    python -m benchmarks.ball_query [--device cuda]
"""

import argparse
import os
import time

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import Tensor

from benchmarks.measuring import Cost, measure, print_costs, report_claim, report_error
from lightning_modules.functional.bi_fusion.ball_query import ball_query


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--points", type=int, default=20_000)
    parser.add_argument("--neighbours", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    radius = 0.0726 * (20_000 / args.points) ** (1 / 3)
    cube = torch.rand(args.points, 3)
    ours, theirs = compare("cube", cube, radius, args.neighbours, args)
    details = {"ours": ours._asdict(), "tree": theirs._asdict()}
    report_error("ball_query_ms", 1000 * ours.wall_s, at_most=40)
    report_claim("ball_query_faster_than_tree", theirs.wall_s / ours.wall_s, 1, costs=details)
    report_claim("ball_query_less_cpu_than_tree", theirs.cpu_s / ours.cpu_s)
    ours, theirs = compare("room", room(args.points), 0.3, 16, args)
    report_claim("ball_query_faster_than_tree_in_a_room", theirs.wall_s / ours.wall_s)

    clouds = (torch.arange(args.points) * 4 // args.points).int().to(args.device)
    batch = cube.to(args.device)
    ragged = measure(lambda: ball_query(batch, radius, args.neighbours, clouds), args.device, args.repeats)
    print_costs({"four clouds in one call": ragged})
    neighbours = ball_query(batch, radius, args.neighbours, clouds).cpu()
    for cloud in range(4):
        rows = (clouds.cpu() == cloud).nonzero()[:, 0]
        own = by_tree(cube[rows].numpy(), radius, args.neighbours, args.threads)
        expected = np.where(own < 0, -1, rows.numpy()[own])
        assert (neighbours[rows].numpy() == expected).all(), "a cloud differs from the tree of its own"


def compare(
    name: str, points: Tensor, radius: float, num_neighbours: int, args: argparse.Namespace
) -> tuple[Cost, Cost]:
    """Times both sides on the same points and prints; every row must be equal."""
    on_device, array = points.to(args.device), points.double().numpy()
    ours = measure(lambda: ball_query(on_device, radius, num_neighbours), args.device, args.repeats)
    tree = measure(lambda: by_tree(array, radius, num_neighbours, args.threads), torch.device("cpu"), args.repeats)
    neighbours = ball_query(on_device, radius, num_neighbours).cpu().numpy()
    expected = by_tree(array, radius, num_neighbours, args.threads)
    assert (neighbours == expected).all(), f"{name}: {int((neighbours != expected).any(axis=1).sum())} rows differ"
    found = float((neighbours >= 0).sum(axis=1).mean())
    print(
        f"{name}: {len(points)} points, radius {radius:.4f}, {num_neighbours} neighbours at most, {found:.1f} found, "
        f"every row equal, {args.device}, {args.threads} threads"
    )
    print_costs({"hash grid": ours, "scipy's tree": tree})
    return ours, tree


def by_tree(points: np.ndarray, radius: float, num_neighbours: int, workers: int) -> np.ndarray:
    """Builds scipy's tree and asks it; -1 where there is no neighbour."""
    _, rows = cKDTree(points).query(points, k=num_neighbours, distance_upper_bound=radius, workers=workers)
    return np.where(rows == len(points), -1, rows)


def room(num_points: int) -> Tensor:
    """Scatters points over the floor and the walls of a room, with the noise of a depth camera."""
    points = torch.rand(num_points, 3) * torch.tensor([5.0, 4.0, 2.5])
    face = torch.randint(0, 5, (num_points,))
    for number, (axis, place) in enumerate([(2, 0.0), (0, 0.0), (0, 5.0), (1, 0.0), (1, 4.0)]):
        points[face == number, axis] = place
    return points + 0.003 * torch.randn(num_points, 3)


if __name__ == "__main__":
    started = time.process_time()
    main()
    print(f"all of it: {time.process_time() - started:.1f} CPU s")
