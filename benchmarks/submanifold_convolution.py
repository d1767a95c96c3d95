"""Submanifold convolution, forward and backward: spconv's Native algorithm, autograd through offsets, and ours.

The voxels are those nearest to a sphere, about 70,000 of a 128^3 grid. All maps are built beforehand: every network
shares them among the layers of a level. spconv has no bfloat16 on CPU: ours in bfloat16 is compared with its float32.

    python -m benchmarks.submanifold_convolution [--device cuda] [--channels 16 32 64 128]

On CPU the peaks come from ``MALLOC_MMAP_THRESHOLD_=65536``: freed blocks then leave the process, which is slow, but
without which what is used again does not show; ``--memory`` prints them alone.
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.measuring import Cost, measure, print_costs, report_claim, report_error
from lightning_modules.functional.sdf_vqvae import spconv_backend
from lightning_modules.functional.sdf_vqvae.neighbour_maps import neighbour_map, voxel_keys
from lightning_modules.functional.sdf_vqvae.submanifold_convolution import submanifold_convolution

RESOLUTION = 128
FLOAT32_CLAIMS = {16: 1.5, 32: 1.5, 64: 1.0, 128: 1.0}
BFLOAT16_CLAIM = 2.5  # from 32 channels on


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--channels", type=int, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory", action="store_true", help="measure peaks instead of times")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    warnings.filterwarnings("ignore", category=FutureWarning)  # spconv's import

    coords = sphere_voxels().to(args.device)
    keys = voxel_keys(coords, RESOLUTION)
    neighbours = neighbour_map(keys, RESOLUTION, is_sorted=True)
    pairs = spconv_backend.pair_map(coords, RESOLUTION, 1)
    per_voxel = float((neighbours < len(coords)).sum()) / len(coords)
    building = measure(lambda: neighbour_map(keys, RESOLUTION, is_sorted=True), args.device, args.repeats)
    print(f"{len(coords)} voxels, {per_voxel:.1f} neighbours each, {args.device}, {args.threads} threads")
    print_costs({"neighbour map": building})
    for channels in args.channels:
        print(f"\n{channels} channels, forward and backward")
        compare(channels, coords, neighbours, pairs, args)


def compare(
    channels: int, coords: Tensor, neighbours: Tensor, pairs: spconv_backend.PairMap, args: argparse.Namespace
) -> None:
    device = args.device
    feats = torch.randn(len(coords), channels, device=device, requires_grad=True)
    weight = (torch.randn(channels, 3, 3, 3, channels, device=device) / (20 * channels) ** 0.5).requires_grad_()
    output_grad = torch.randn(len(coords), channels, device=device)
    pair_lists = [
        (rows, column[rows]) for column in neighbours.long().T for rows in [(column < len(coords)).nonzero()[:, 0]]
    ]

    def step(convolve: Callable[[Tensor], Tensor], dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        values = feats.detach().to(dtype).requires_grad_()
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            output = convolve(values)
        return output.detach(), *torch.autograd.grad(output, (values, weight), output_grad.to(dtype))

    def ours(values: Tensor) -> Tensor:
        return submanifold_convolution(values, weight, None, neighbours)

    contenders: dict[str, Callable[[], tuple[Tensor, ...]]] = {
        "spconv, Native": lambda: step(
            lambda values: spconv_backend.submanifold_convolution(values, weight, None, pairs)
        ),
        "ours, float32": lambda: step(ours),
        "ours, bfloat16": lambda: step(ours, torch.bfloat16),
    }
    expected = contenders["spconv, Native"]()
    for name, most in (("ours, float32", 1e-5), ("ours, bfloat16", 1e-2)):
        results = contenders[name]()
        errors = [float((a.float() - b).norm() / b.norm()) for a, b in zip(results, expected, strict=True)]
        report_error(f"submanifold_convolution_{name[6:]}_as_spconv_c{channels}", max(errors), most)
    if args.memory or device.type == "cuda":
        contenders["autograd, by offset"] = lambda: step(lambda values: by_offset(values, weight, pair_lists))
        costs = {name: measure(work, device, 1) for name, work in contenders.items()}
        print_costs(costs)
        share = costs["ours, float32"].peak_mib / costs["autograd, by offset"].peak_mib
        report_claim(f"submanifold_convolution_memory_c{channels}", 1 / share, 3)
        if args.memory:
            return
    costs = interleaved(contenders, device, args.repeats)
    print_costs(costs)
    seconds = {name: cost.cpu_s if device.type == "cpu" else cost.wall_s for name, cost in costs.items()}
    for name, required in (
        ("ours, float32", FLOAT32_CLAIMS.get(channels)),
        ("ours, bfloat16", BFLOAT16_CLAIM if channels >= 32 else None),
    ):
        ratio = seconds["spconv, Native"] / seconds[name]
        claim = f"submanifold_convolution_{name[6:]}_c{channels}"
        report_claim(claim, ratio, required, seconds=seconds[name], spconv_seconds=seconds["spconv, Native"])


def interleaved(contenders: dict[str, Callable[[], object]], device: torch.device, repeats: int) -> dict[str, Cost]:
    """Runs the contenders in turns, so that a busy moment of the machine falls on all; returns medians."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for _ in range(repeats + 1):
        for name, work in contenders.items():
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            cpu, wall = time.process_time(), time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times[name].append((time.process_time() - cpu, time.perf_counter() - wall))
    return {
        name: Cost(*(statistics.median(column) for column in zip(*rounds[1:], strict=True)), None)
        for name, rounds in times.items()
    }


def by_offset(feats: Tensor, weight: Tensor, pair_lists: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Gathers, multiplies and adds offset by offset, as autograd differentiates it."""
    output = feats.new_zeros(len(feats), len(weight))
    for kernel, (rows, partners) in zip(weight.flatten(1, 3).unbind(1), pair_lists, strict=True):
        output = output.index_add(0, rows, feats[partners] @ kernel.t())
    return output


def sphere_voxels() -> Tensor:
    """Voxels within a voxel and a half of a sphere."""
    axis = torch.arange(RESOLUTION) - (RESOLUTION - 1) / 2
    radius = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij")).norm(dim=0)
    cells = ((radius - 43.5).abs() < 1.5).nonzero().int()
    return torch.cat([torch.zeros_like(cells[:, :1]), cells], dim=1)


if __name__ == "__main__":
    main()
