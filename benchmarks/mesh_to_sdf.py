"""Mesh to sparse signed distance: time and memory by resolution, signs, and the way back to a mesh.

The baseline asks Warp for the distance and the sign of every point of the dense grid, which is what one writes first;
its sign is that of the nearest face's normal. Both measure the spot mesh. The round trip takes all four meshes to
signed distances and back, without a network.

    python -m benchmarks.mesh_to_sdf [../shared/data] [--threads 2] [--resolutions 64 128 256 512 1024]
"""

import argparse
from pathlib import Path

import torch
import trimesh
import warp as wp

from benchmarks.measuring import Cost, measure, print_costs, report_claim, report_error
from lightning_modules.functional.kernels.launch import launch
from lightning_modules.functional.sdf_vqvae.marching_cubes import marching_cubes
from lightning_modules.functional.sdf_vqvae.mesh_distance import build_hierarchy, sparse_sdf
from lightning_modules.functional.sdf_vqvae.mesh_metrics import chamfer_distance, compare_surfaces
from lightning_modules.functional.sdf_vqvae.meshes import (
    TriangleMesh,
    euler_number,
    is_watertight,
    merge_vertices,
    normalised,
)

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
SECONDS = {256: 1.0, 512: 4.0}  # claimed, wall, two cores
PEAK_MIB = {512: 512.0}
BAND = 4.0
DENSE = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?", default=DATA, help="folder with meshes/")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--resolutions", type=int, nargs="+", default=[64, 128, 256, 512, 1024])
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    meshes = {
        path.stem: merge_vertices(normalised(read(path))[0]).to(args.device)
        for path in sorted((args.data / "meshes").glob("*.*"))
        if path.suffix in (".obj", ".stl")
    }

    spot = meshes["spot"]
    costs: dict[str, Cost] = {}
    for resolution in args.resolutions:
        repeats = args.repeats if resolution <= 512 else 1
        costs[f"sparse, {resolution}"] = measure(lambda r=resolution: sparse_sdf(spot, r), args.device, repeats)
    dense = measure(lambda: dense_sdf(spot, DENSE), args.device, 1)
    print(f"spot, {len(spot.faces)} faces, band {BAND:g}, {args.device}, {args.threads} threads")
    print_costs({**costs, f"every point, {DENSE}": dense})
    for resolution, seconds in SECONDS.items():
        if resolution in args.resolutions:
            report_error(f"mesh_to_sdf_{resolution}_wall_s", costs[f"sparse, {resolution}"].wall_s, seconds)
    for resolution, mib in PEAK_MIB.items():
        peak = costs[f"sparse, {resolution}"].peak_mib if resolution in args.resolutions else None
        if peak is not None:
            report_error(f"mesh_to_sdf_{resolution}_peak_mib", peak, mib)
    if DENSE in args.resolutions:
        ours = costs[f"sparse, {DENSE}"]
        ratio = dense.cpu_s / ours.cpu_s if args.device.type == "cpu" else dense.wall_s / ours.wall_s
        report_claim(f"mesh_to_sdf_against_every_point_{DENSE}", ratio, None, baseline=dense._asdict())

    for name, mesh in meshes.items():
        coords, sdf = sparse_sdf(mesh, DENSE)
        x, y, z = coords.long().unbind(1)
        by_normal = dense_sdf(mesh, DENSE)[(x * DENSE + y) * DENSE + z]
        wrong = int(((by_normal < 0) != (sdf < 0)).sum())
        back = marching_cubes(coords, sdf, DENSE)
        comparison = compare_surfaces(back, mesh, 200_000)
        step = 2 / (DENSE - 1)
        report_error(f"round_trip_{name}_chamfer_voxels", float(chamfer_distance(comparison)) / step, 0.05)
        kept = is_watertight(back) and euler_number(back) == euler_number(mesh)
        farthest = float(torch.maximum(comparison.from_truth.max(), comparison.from_reconstruction.max())) / step
        report_claim(
            f"round_trip_{name}_watertight_with_its_euler_number",
            float(kept),
            1,
            euler=euler_number(back),
            faces=len(back.faces),
            farthest_voxels=farthest,
            signs_the_nearest_normal_gets_wrong=wrong,
        )


def read(path: Path) -> TriangleMesh:
    solid = trimesh.load(path, process=False)
    return TriangleMesh(torch.tensor(solid.vertices).float(), torch.tensor(solid.faces).long())


@wp.kernel
def query_every_point(
    start: int, mesh: wp.uint64, resolution: int, band: float, distances: wp.array(dtype=float)
) -> None:
    n = start + wp.tid()
    step = 2.0 / float(resolution - 1)
    x, y, z = n // (resolution * resolution), n // resolution % resolution, n % resolution
    point = wp.vec3(float(x), float(y), float(z)) * step - wp.vec3(1.0, 1.0, 1.0)
    query = wp.mesh_query_point_sign_normal(mesh, point, band * 1.0001)
    distances[n] = band
    if query.result:
        nearest = wp.mesh_eval_position(mesh, query.face, query.u, query.v)
        distances[n] = query.sign * wp.length(nearest - point)


def dense_sdf(mesh: TriangleMesh, resolution: int) -> torch.Tensor:
    """The truncated distance of all points of the grid, flat."""
    distances = torch.empty(resolution**3, device=mesh.vertices.device)
    hierarchy = build_hierarchy(mesh)
    band = BAND * 2 / (resolution - 1)
    launch(query_every_point, len(distances), [hierarchy.id, resolution, band, distances], distances.device)
    return distances


if __name__ == "__main__":
    main()
