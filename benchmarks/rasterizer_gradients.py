"""Gradients of a picture: 100,000 Gaussians at 640x480, forward and backward, against the torch twin and gsplat.

The scene is random: Gaussians of all directions and opacities fill the view, deep enough that no background is left.
The twin blends every pixel over every Gaussian, so that it is run on two samples of pixels and the difference is
extrapolated to the whole picture. Gradients are compared with the float64 twin on a smaller scene in the same run.
Where there is a CUDA device, the same scene is rendered there, and by gsplat if it is installed.

Floor: a pair of Gaussian and tile is read and its 10 sums are written and read again, 64 B each way, and a block of 8x2
pixels costs about 45 SIMD operations forward and 75 backward, two a cycle. With the 490,000 pairs and 1.9 million
blocks of this scene that is 60 MB and 0.23 billion operations: about 0.04 s of one core. Projection, harmonics and
their gradients move 0.7 kB a Gaussian, 70 MB.

    python -m benchmarks.rasterizer_gradients [--threads 2]
"""

import argparse
import os
import time

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # both are read by torch when it loads: no spinning threads,
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # and big tensors on huge pages

import importlib.util

import torch
from torch import Tensor

from benchmarks.measuring import measure, print_costs, report_claim, report_error
from lightning_modules.functional.cameras import Camera
from lightning_modules.functional.splatting import rasterization_reference
from lightning_modules.functional.splatting.differentiable_rendering import render_with_gradients
from lightning_modules.functional.splatting.gaussians import GaussianScene
from lightning_modules.functional.splatting.rasterization import prepare_view

NAMES = (*GaussianScene._fields, "screen_offsets")


def random_view(
    num_gaussians: int, width: int, height: int, size_m: float, device: torch.device, seed: int = 0
) -> tuple[GaussianScene, Camera]:
    """Gaussians of about ``size_m`` fill the view of a camera from one to four metres."""
    generator = torch.Generator().manual_seed(seed)
    focal = 0.8 * width
    intrinsics = torch.tensor([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1.0]])
    camera = Camera(torch.eye(4, device=device), intrinsics.to(device), width, height)
    z = 1 + 3 * torch.rand(num_gaussians, 1, generator=generator)
    beside = (torch.rand(num_gaussians, 2, generator=generator) - 0.5) * torch.tensor([width, height]) / focal * z * 1.1
    parameters = (
        torch.cat([beside, z], 1),
        torch.randn(num_gaussians, 3, generator=generator) * 0.5 + torch.tensor(size_m).log(),
        torch.randn(num_gaussians, 4, generator=generator),
        torch.randn(num_gaussians, generator=generator) * 1.5,
        torch.randn(num_gaussians, 16, 3, generator=generator) * 0.2,
    )
    return GaussianScene(*(parameter.to(device).requires_grad_() for parameter in parameters)), camera


def differentiate(scene: GaussianScene, camera: Camera, upstream: Tensor) -> tuple[Tensor, ...]:
    """Renders and returns the gradients of all parameters and of the centres."""
    offsets = scene.means.new_zeros(scene.num_gaussians, 2).requires_grad_()
    rgb = render_with_gradients(scene, camera, screen_offsets=offsets).rgb
    return torch.autograd.grad(rgb, [*scene, offsets], upstream)


def differentiate_by_gsplat(scene: GaussianScene, camera: Camera, upstream: Tensor | None) -> Tensor:
    """Renders with gsplat's own ``rasterization``; also differentiates where ``upstream`` is given."""
    import gsplat

    channels, _, _ = gsplat.rasterization(
        scene.means, scene.quaternions, scene.scales, scene.opacities, scene.spherical_harmonics,
        camera.camera_from_world[None], camera.intrinsics[None], camera.width, camera.height,
        near_plane=0.2, eps2d=0.3, sh_degree=3, packed=False,
    )  # fmt: skip
    rgb = channels.reshape(-1, 3)
    if upstream is not None:
        torch.autograd.grad(rgb, list(scene), upstream)
    return rgb


def render_frozen(scene: GaussianScene, camera: Camera) -> Tensor:
    with torch.no_grad():
        return render_with_gradients(scene, camera).rgb


def twin_seconds(scene: GaussianScene, camera: Camera, num_pixels: int, repeats: int) -> float:
    """CPU seconds of the twin, forward and backward, on random pixels: the fewest of the repeats."""
    pixels = torch.randperm(camera.num_pixels, generator=torch.Generator().manual_seed(0))[:num_pixels]
    seconds = []
    for _ in range(repeats):
        began = time.process_time()
        rgb, _, _ = rasterization_reference.render(scene, camera, pixels)
        torch.autograd.grad(rgb, list(scene), torch.ones_like(rgb))
        seconds.append(time.process_time() - began)
    return min(seconds)


def largest_relative_error(device: torch.device) -> float:
    """Compares all gradients with the float64 twin's on a small scene; the largest distance over the largest length."""
    scene, camera = random_view(1500, 64, 48, 0.05, device)
    wide_scene = GaussianScene(*(parameter.detach().double().requires_grad_() for parameter in scene))
    wide_camera = camera._replace(
        camera_from_world=camera.camera_from_world.double(), intrinsics=camera.intrinsics.double()
    )
    pixels = torch.arange(camera.num_pixels, device=device)
    with torch.no_grad():
        projected = rasterization_reference.project_gaussians(wide_scene, wide_camera)
        is_ambiguous = rasterization_reference.blend(wide_scene, projected, wide_camera, pixels).is_ambiguous
    upstream = torch.randn(camera.num_pixels, 3, generator=torch.Generator().manual_seed(0)).to(device)
    upstream[is_ambiguous] = 0
    rgb, _, _ = rasterization_reference.render(wide_scene, wide_camera, pixels)
    expected = torch.autograd.grad(rgb, list(wide_scene), upstream.double())
    errors = []
    for name, ours, theirs in zip(NAMES, differentiate(scene, camera, upstream), expected, strict=False):
        errors.append(float((ours - theirs).norm() / theirs.norm()))
        print(f"gradient of {name}: {errors[-1]:.1e} from the float64 twin (relative L2, {len(pixels)} pixels)")
    return max(errors)


def main() -> None:
    """Measures, compares with the twin and reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cpu = torch.device("cpu")
    scene, camera = random_view(100_000, 640, 480, 0.012, cpu)
    small_scene, small_camera = random_view(20_000, 320, 240, 0.02, cpu)
    upstream, small_upstream = torch.randn(camera.num_pixels, 3), torch.randn(small_camera.num_pixels, 3)

    began = time.perf_counter()
    differentiate(small_scene, small_camera, small_upstream)
    compilation_s = time.perf_counter() - began
    view = prepare_view(scene, camera)
    print(
        f"{camera.width}x{camera.height}, {scene.num_gaussians} Gaussians, {view.gaussian_ids.numel()} visible, "
        f"{view.tile_rows.numel()} pairs of Gaussian and tile, 16 harmonics, {args.threads} threads"
    )
    costs = {
        "640x480, 100,000: forward": measure(lambda: render_frozen(scene, camera), cpu, args.repeats),
        "640x480, 100,000: forward + backward": measure(
            lambda: differentiate(scene, camera, upstream), cpu, args.repeats
        ),
        "320x240, 20,000: forward": measure(lambda: render_frozen(small_scene, small_camera), cpu, args.repeats),
        "320x240, 20,000: forward + backward": measure(
            lambda: differentiate(small_scene, small_camera, small_upstream), cpu, args.repeats
        ),
    }
    print_costs(costs)
    print(f"first call, kernels compiled or read from the cache: {compilation_s:.1f} s")

    few, more = 8, 40
    seconds = {count: twin_seconds(scene, camera, count, 3) for count in (few, more)}
    per_pixel = (seconds[more] - seconds[few]) / (more - few)
    twin_s = seconds[few] + per_pixel * (camera.num_pixels - few)
    print(
        f"torch twin, forward + backward: {seconds[few]:.2f} CPU s on {few} pixels, {seconds[more]:.2f} on {more}; "
        f"extrapolated to {camera.num_pixels} pixels: {twin_s:.0f} CPU s"
    )
    ours = costs["640x480, 100,000: forward + backward"]
    report_claim(
        "rasterizer_gradients_against_the_twin", twin_s / ours.cpu_s, 10, ours=ours._asdict(), twin_cpu_s=twin_s
    )
    report_error("rasterizer_gradients_equal_the_twin", largest_relative_error(cpu), 1e-4)
    report_gpu(args.repeats)


def report_gpu(repeats: int) -> None:
    """Repeats the measurement on CUDA, beside gsplat."""
    if not torch.cuda.is_available():
        print("GPU, ours and gsplat 1.5.3: not measured (no CUDA device)")
        return
    cuda = torch.device("cuda")
    scene, camera = random_view(100_000, 640, 480, 0.012, cuda)
    upstream = torch.randn(camera.num_pixels, 3, device=cuda)
    print(torch.cuda.get_device_name(cuda))
    costs = {
        "GPU: forward": measure(lambda: render_frozen(scene, camera), cuda, repeats),
        "GPU: forward + backward": measure(lambda: differentiate(scene, camera, upstream), cuda, repeats),
    }
    if importlib.util.find_spec("gsplat") is None:
        print_costs(costs)
        print("gsplat 1.5.3: not measured (not installed)")
        return
    with torch.no_grad():
        costs["gsplat: forward"] = measure(lambda: differentiate_by_gsplat(scene, camera, None), cuda, repeats)
    costs["gsplat: forward + backward"] = measure(
        lambda: differentiate_by_gsplat(scene, camera, upstream), cuda, repeats
    )
    print_costs(costs)
    for what in ("forward", "forward + backward"):
        ours, theirs = costs[f"GPU: {what}"], costs[f"gsplat: {what}"]
        name = what.replace(" + ", "_and_")
        report_claim(
            f"gpu_{name}_against_gsplat", theirs.wall_s / ours.wall_s, ours=ours._asdict(), gsplat=theirs._asdict()
        )


if __name__ == "__main__":
    main()
