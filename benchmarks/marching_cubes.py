"""Marching cubes on the grid points near a surface, against a dense grid filled up for scikit-image.

The dense way is that of Direct3D-S2 (``sparse2mesh``): a grid of ones with the known distances in it. Its surface has
a second shell where the band ends inside the solid; ours has not.

    python -m benchmarks.marching_cubes [../shared/data] [--threads 2] [--resolution 256]
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from skimage.measure import marching_cubes as dense_marching_cubes

from benchmarks.measuring import measure, print_costs, report_claim, report_error
from benchmarks.mesh_to_sdf import DATA, read
from lightning_modules.functional.sdf_vqvae.marching_cubes import marching_cubes, triangle_table
from lightning_modules.functional.sdf_vqvae.mesh_distance import sparse_sdf
from lightning_modules.functional.sdf_vqvae.meshes import TriangleMesh, euler_number, is_watertight, normalised


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?", default=DATA, help="folder with meshes/")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    resolution = args.resolution
    mesh, _ = normalised(read(args.data / "meshes" / "spot.obj"))
    coords, sdf = sparse_sdf(mesh.to(args.device), resolution)
    triangle_table()

    ours = measure(lambda: marching_cubes(coords, sdf, resolution), args.device, args.repeats)
    dense = measure(lambda: fill_and_march(coords, sdf, resolution), torch.device("cpu"), 1)
    sparse_mesh, dense_mesh = marching_cubes(coords, sdf, resolution), fill_and_march(coords, sdf, resolution)
    print(f"spot at {resolution}, {len(coords)} grid points, {args.device}, {args.threads} threads")
    print_costs({"known cells": ours, "filled grid, scikit-image": dense})
    for name, surface in {"known cells": sparse_mesh, "filled grid, scikit-image": dense_mesh}.items():
        closed = "watertight" if is_watertight(surface) else "open"
        print(f"{name:27}{len(surface.faces):>9} faces, {closed}, Euler number {euler_number(surface)}")
    if resolution == 256:
        report_error("marching_cubes_256_wall_s", ours.wall_s, 1.0)
    ratio = dense.cpu_s / ours.cpu_s if args.device.type == "cpu" else dense.wall_s / ours.wall_s
    report_claim("marching_cubes_against_a_filled_grid", ratio, None, ours=ours._asdict(), dense=dense._asdict())


def fill_and_march(coords: torch.Tensor, sdf: torch.Tensor, resolution: int) -> TriangleMesh:
    grid = np.ones((resolution,) * 3, np.float32)
    grid[tuple(coords.cpu().numpy().T)] = sdf.cpu().numpy()
    vertices, faces, _, _ = dense_marching_cubes(grid, 0.0)
    return TriangleMesh(
        torch.from_numpy(vertices.copy()) * (2 / (resolution - 1)) - 1, torch.from_numpy(faces.astype(np.int64))
    )


if __name__ == "__main__":
    main()
