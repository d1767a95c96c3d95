"""A real scene in a second: the garden's points as Gaussians, 648x420 RGB from projection to picture, on CPU.

The points of Mip-NeRF 360's garden become isotropic Gaussians as 3D Gaussian Splatting begins them: the scale is the
mean distance to the three nearest neighbours. The picture is compared with the float64 twin on scattered pixels.

Floor: 138,766 Gaussians are read once (68 B each, 9 MB) and 16.6 million pixel-Gaussian pairs are blended, about 30
flops each, 0.5 GFLOP; with 16-wide SIMD a few hundredths of a second. The rest is finding the pairs.

    python -m benchmarks.garden_render [../shared/data] [--threads 2]
"""

import argparse
import os
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # both are read by torch when it loads: no spinning threads,
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # and big tensors on huge pages

import numpy as np
import torch
from scipy.spatial import cKDTree

from benchmarks.measuring import measure, print_costs, report_claim
from lightning_modules.functional.cameras import Camera
from lightning_modules.functional.splatting import rasterization_reference
from lightning_modules.functional.splatting.gaussians import GaussianScene
from lightning_modules.functional.splatting.rasterization import blending_weights, prepare_view, render

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def read_garden(data: Path, view: int, opacity: float = 0.5) -> tuple[GaussianScene, Camera]:
    """Reads points and a camera; leaves the program with a message where the file is absent."""
    path = data / "garden" / "garden.npz"
    if not path.is_file():
        raise SystemExit(f"skipped: {path} is absent; give the folder that holds garden/garden.npz")
    with np.load(path) as file:
        points, colors = file["means3d"], file["colors"]
        camera_from_world, intrinsics = file["viewmats"][view], file["Ks"][view]
        width, height = int(file["width"]), int(file["height"])
    distances = cKDTree(points).query(points, k=4)[0][:, 1:].mean(1).clip(1e-4)
    count = len(points)
    scene = GaussianScene(
        means=torch.from_numpy(points),
        log_scales=torch.from_numpy(np.log(distances)).float()[:, None].repeat(1, 3),
        quaternions=torch.tensor([1.0, 0.0, 0.0, 0.0]).repeat(count, 1),
        opacity_logits=torch.full((count,), opacity).logit(),
        spherical_harmonics=(torch.from_numpy(colors).float()[:, None] / 255 - 0.5) / 0.28209479177387814,
    )
    return scene, Camera(torch.from_numpy(camera_from_world), torch.from_numpy(intrinsics), width, height)


def main() -> None:
    """Measures, compares with the twin and reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?", default=DATA)
    parser.add_argument("--view", type=int, default=0, choices=(0, 1, 2))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--pixels", type=int, default=512, help="pixels to compare with the twin")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device("cpu")
    scene, camera = read_garden(args.data, args.view)

    began = time.perf_counter()
    blending_weights(prepare_view(scene, camera))
    compilation_s = time.perf_counter() - began
    costs = {
        "prepare_view": measure(lambda: prepare_view(scene, camera), device, args.repeats),
        "prepare_view + render": measure(lambda: render(scene, prepare_view(scene, camera)), device, args.repeats),
    }
    view = prepare_view(scene, camera)
    costs["blending_weights"] = measure(lambda: blending_weights(view), device, args.repeats)
    pairs = blending_weights(view).weights.numel()
    print(
        f"{camera.width}x{camera.height}, {scene.num_gaussians} Gaussians, {view.gaussian_ids.numel()} visible, "
        f"{pairs / 1e6:.1f} M pairs, view {view.num_bytes / 2**20:.1f} MiB, {args.threads} threads"
    )
    print_costs(costs)
    print(f"first call, kernels compiled or read from the cache: {compilation_s:.1f} s")

    rendered = render(scene, view)
    ids = torch.randperm(camera.num_pixels, generator=torch.Generator().manual_seed(0))[: args.pixels]
    wide_scene = GaussianScene(*(parameter.double() for parameter in scene))
    wide_camera = camera._replace(
        camera_from_world=camera.camera_from_world.double(), intrinsics=camera.intrinsics.double()
    )
    projected = rasterization_reference.project_gaussians(wide_scene, wide_camera)
    errors, is_clear = [], []
    for chunk in ids.split(32):
        rgb, depth, alpha = rasterization_reference.render(wide_scene, wide_camera, chunk)
        expected = torch.cat([rgb, depth[:, None], alpha[:, None]], 1)
        actual = torch.cat([rendered.rgb[chunk], rendered.depth[chunk, None], rendered.alpha[chunk, None]], 1)
        errors.append((actual - expected).abs().amax(1))
        is_clear.append(~rasterization_reference.blend(wide_scene, projected, wide_camera, chunk).is_ambiguous)
    error, clear = torch.cat(errors), torch.cat(is_clear)
    print(
        f"difference from the float64 twin on {len(ids)} pixels: {error[clear].max():.1e} where no threshold is within "
        f"1/1000 ({clear.sum()} pixels), {error.max():.1e} in all"
    )
    whole = costs["prepare_view + render"]
    report_claim("garden_render_in_half_a_second", 0.5 / whole.wall_s, 1, ours=whole._asdict(), pairs=pairs)
    report_claim("garden_render_equals_the_twin", 1e-5 / float(error[clear].max()), 1, error=float(error[clear].max()))


if __name__ == "__main__":
    main()
