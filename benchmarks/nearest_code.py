"""Nearest of 8192 codes for 80,000 latents of 64 channels: ours against ``torch.cdist`` in blocks.

Both sides run in turns on the same latents; compared is the least CPU time of the turns. Indices are compared for all
latents, and for some with distances in float64.

    python -m benchmarks.nearest_code [--device cuda]
"""

import argparse
import os
import time
from collections.abc import Callable

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from torch import Tensor

from benchmarks.measuring import measure, report_claim, report_error
from lightning_modules.functional.sdf_vqvae.nearest_code import nearest_code_ids

CHECKED = 8000
BLOCK = 2048


def main() -> None:
    """Measures both sides in turns and reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--latents", type=int, default=80_000)
    parser.add_argument("--codes", type=int, default=8192)
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    latents = torch.randn(args.latents, args.channels, device=args.device)
    codebook = torch.randn(args.codes, args.channels, device=args.device)

    sides: dict[str, Callable[[], Tensor]] = {
        "cdist and argmin in blocks": lambda: by_cdist(latents, codebook),
        "ours": lambda: nearest_code_ids(latents, codebook),
    }
    found = {name: work() for name, work in sides.items()}
    assert torch.equal(*found.values()), "the indices differ"
    exact = torch.cat(
        [torch.cdist(part, codebook.double()).argmin(1) for part in latents[:CHECKED].double().split(500)]
    )
    assert torch.equal(found["ours"][:CHECKED], exact), "float64 finds other codes"
    costs: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for _ in range(args.turns):
        for name, work in sides.items():
            cpu, wall = time.process_time(), time.perf_counter()
            work()
            if args.device.type == "cuda":
                torch.cuda.synchronize()
            costs[name].append((time.process_time() - cpu, time.perf_counter() - wall))
    least = {name: tuple(min(column) for column in zip(*turns, strict=True)) for name, turns in costs.items()}
    print(
        f"{args.latents} x {args.codes} x {args.channels}, {args.device}, {args.threads} threads, least of {args.turns}"
    )
    print(f"{'':28}{'CPU s':>8}{'wall s':>8}")
    for name, (cpu_s, wall_s) in least.items():
        print(f"{name:28}{cpu_s:8.2f}{wall_s:8.2f}")
    time_of = 0 if args.device.type == "cpu" else 1
    ratio = least["cdist and argmin in blocks"][time_of] / least["ours"][time_of]
    report_claim("nearest_code_against_cdist", ratio, 2, seconds=least)
    peak = measure(sides["ours"], args.device, 1).peak_mib
    if peak is not None:
        report_error("nearest_code_peak_mib", peak, 150)


def by_cdist(latents: Tensor, codebook: Tensor) -> Tensor:
    """Finds the codes with torch's own distances."""
    return torch.cat([torch.cdist(part, codebook).argmin(1) for part in latents.split(BLOCK)])


if __name__ == "__main__":
    main()
