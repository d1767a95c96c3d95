"""Counts and sums of the latents of each code: ours against a one-hot matrix, as VQ-VAEs write it.

Least CPU time of some turns, 8192 latents and 8192 codes; ours also on 80,000 latents, where a one-hot matrix of int64
would take 5 GiB.

    python -m benchmarks.code_statistics [--device cuda]
"""

import argparse
import os
import time
from collections.abc import Callable

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measuring import report_claim
from lightning_modules.functional.sdf_vqvae.code_statistics import code_statistics


def main() -> None:
    """Measures both sides and reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--codes", type=int, default=8192)
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    def drawn(count: int) -> tuple[Tensor, Tensor]:
        ids = torch.randint(args.codes, (count,), device=args.device)
        return torch.randn(count, args.channels, device=args.device), ids

    few, many = drawn(8192), drawn(80_000)
    ours, theirs = code_statistics(*few, args.codes), one_hot(*few, args.codes)
    assert torch.equal(ours.counts, theirs[0])
    torch.testing.assert_close(ours.sums, theirs[1], rtol=1e-5, atol=1e-5)
    rows = {
        "one-hot, 8192 latents": least(lambda: one_hot(*few, args.codes), 2, args.device),
        "ours, 8192 latents": least(lambda: code_statistics(*few, args.codes), 20, args.device),
        "ours, 80000 latents": least(lambda: code_statistics(*many, args.codes), 20, args.device),
    }
    print(f"{args.codes} codes of {args.channels} channels, {args.device}, {args.threads} threads")
    print(f"{'':24}{'CPU ms':>10}{'wall ms':>10}")
    for name, (cpu_s, wall_s) in rows.items():
        print(f"{name:24}{1000 * cpu_s:10.2f}{1000 * wall_s:10.2f}")
    time_of = 0 if args.device.type == "cpu" else 1
    ratio = rows["one-hot, 8192 latents"][time_of] / rows["ours, 8192 latents"][time_of]
    report_claim("code_statistics_against_one_hot", ratio, 100, seconds=rows)


def one_hot(latents: Tensor, ids: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """Returns counts and sums by a matrix of zeros and ones."""
    members = F.one_hot(ids, num_codes).to(latents.dtype)
    return members.sum(0), members.T @ latents


def least(work: Callable[[], object], turns: int, device: torch.device) -> tuple[float, float]:
    """Returns the least CPU and wall time of some turns."""
    times = []
    for _ in range(turns + 1):
        cpu, wall = time.process_time(), time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append((time.process_time() - cpu, time.perf_counter() - wall))
    return min(t[0] for t in times[1:]), min(t[1] for t in times[1:])


if __name__ == "__main__":
    main()
