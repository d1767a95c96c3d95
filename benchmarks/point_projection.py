"""Points into posed images with a depth test: the Warp kernel against torch, and against a loop over views in numpy.

A wall with hills, seen by eight cameras side by side at 320 x 240, each with its depth map; its points come from the
first view. All sides compute uv, validity, confidence and depth in float64 and agree.

What it takes at least: each of the 160,000 pairs of point and view writes 17 bytes (uv, valid, confidence, z) and reads
one pixel of depth, about 6 MiB in all, below 1 ms at 10 GB/s; and 30 operations in float64, below 5 million together.

    python -m benchmarks.point_projection [--device cuda]
"""

import argparse
import os
import time

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import numpy as np
import torch
from torch import Tensor

from benchmarks.measuring import measure, print_costs, report_claim, report_error
from lightning_modules.functional.cameras import Camera, back_project
from lightning_modules.functional.projection import build_uv_index_batch, build_uv_index_reference


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--views", type=int, default=8)
    parser.add_argument("--points", type=int, default=20_000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    scene = [part.to(args.device) for part in hilly_wall(args.views, args.points)]
    points, intrinsics, cameras, depth = scene
    size = (240, 320)

    costs = {
        "Warp kernel": measure(
            lambda: build_uv_index_batch(points, intrinsics, cameras, size, depth), args.device, args.repeats
        ),
        "torch": measure(
            lambda: build_uv_index_reference(points, intrinsics, cameras, size, depth), args.device, args.repeats
        ),
    }
    index = build_uv_index_batch(points, intrinsics, cameras, size, depth)
    if args.device.type == "cpu":
        arrays = [part[0].double().numpy() for part in scene]
        costs["numpy, view by view"] = measure(lambda: loop_over_views(*arrays, size), args.device, args.repeats)
    expected = loop_over_views(*(part[0].double().cpu().numpy() for part in scene), size)
    valid = index.valid[0].cpu().numpy()
    differ = float((valid != expected[1]).mean())
    error = float(np.abs(index.uv[0].cpu().numpy() - expected[0])[valid & expected[1]].max())
    print(f"{args.views} views x {args.points} points, {valid.mean():.0%} seen, {args.device}, {args.threads} threads")
    print_costs(costs)
    ours = costs["Warp kernel"]
    details = {name: cost._asdict() for name, cost in costs.items()}
    seconds = {name: cost.cpu_s if args.device.type == "cpu" else cost.wall_s for name, cost in costs.items()}
    report_error("point_projection_ms", 1000 * ours.wall_s, at_most=10)
    report_claim("point_projection_faster_than_torch", seconds["torch"] / seconds["Warp kernel"], costs=details)
    report_error("point_projection_pixels_from_float64", error, at_most=1e-3)
    report_error("point_projection_share_of_other_decisions", differ, at_most=1e-3)


def hilly_wall(num_views: int, num_points: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns points, intrinsics, cameras and depth maps of one scene; the maps are true to a centimetre or two."""
    intrinsics = torch.tensor([[289.0, 0, 160], [0, 289, 120], [0, 0, 1]])
    cameras = torch.eye(4).repeat(num_views, 1, 1)
    cameras[:, 0, 3] = torch.linspace(0, 0.4, num_views)
    row, column = torch.meshgrid(torch.arange(240.0), torch.arange(320.0), indexing="ij")
    depth = torch.stack(
        [3 + 0.3 * torch.sin((column - 96 * camera[0, 3]) / 40) + 0.2 * torch.cos(row / 30) for camera in cameras]
    )
    surface, _ = back_project(depth[0], Camera(cameras[0], intrinsics, 320, 240))
    points = surface.reshape(-1, 3)[torch.randint(240 * 320, (num_points,))]
    depth[:, :, :20] = 0
    return points[None], intrinsics.expand(1, num_views, 3, 3).contiguous(), cameras[None], depth[None]


def loop_over_views(
    points: np.ndarray, intrinsics: np.ndarray, cameras: np.ndarray, depth: np.ndarray, size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Projects into one view after the other, in float64."""
    views = []
    for matrix, camera, image in zip(intrinsics, cameras, depth, strict=True):
        homogeneous = (points @ camera[:3, :3].T + camera[:3, 3]) @ matrix.T
        z = homogeneous[:, 2]
        uv = homogeneous[:, :2] / np.where(z > 0.05, z, np.inf)[:, None]
        valid = (z > 0.05) & (uv >= 0).all(axis=1) & (uv < [size[1], size[0]]).all(axis=1)
        column, row = np.clip(uv, 0, [size[1] - 1, size[0] - 1]).astype(int).T
        deviation = np.abs(image[row, column] - z) / np.maximum(0.05, 0.02 * z)
        valid &= (image[row, column] > 0) & (deviation <= 1)
        views.append((uv, valid, np.where(valid, 1 / (1 + 4 * deviation**2), 0), z))
    uv, valid, conf, z = (np.stack(parts) for parts in zip(*views, strict=True))
    return uv, valid, conf, z


if __name__ == "__main__":
    started = time.process_time()
    main()
    print(f"all of it: {time.process_time() - started:.1f} CPU s")
