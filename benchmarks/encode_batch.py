"""Embedding many depth maps: ``encode_batch`` against the bare network, and the ways a CPU can compute it.

Both sides run the same ResNet-18-wide network on the same batches in evaluation mode without gradients, in turns, so
that what else runs on the machine slows both; compared is the least CPU time of the turns. The bare network has the
weights in the layout that ``encode_batch`` uses (channels last); its own default layout is in the table beside. Memory
is the peak beyond the input, for few and for many maps, of a narrower network.

    python -m benchmarks.encode_batch [--maps 10000]
"""

import argparse
import os
import time
from collections.abc import Callable

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measuring import measure, report_claim, report_error
from lightning_modules.networks.semantic_encoder import SemanticEncoder

BATCH = 64


def main() -> None:
    """Measures the sides in turns and reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--maps", type=int, default=10_000)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    encoder = SemanticEncoder().eval()
    laid_out = SemanticEncoder().eval().to(memory_format=torch.channels_last)
    laid_out.load_state_dict(encoder.state_dict())
    images = smooth_maps(args.maps)

    sides: dict[str, Callable[[], Tensor]] = {
        "bare network, float32": lambda: bare(encoder, images),
        "bare network, float32, channels last": lambda: bare(laid_out, images),
        "encode_batch, float32": lambda: encoder.encode_batch(images, BATCH),
        "bare network, bfloat16": lambda: bare(encoder, images, bfloat16=True),
        "bare network, bfloat16, channels last": lambda: bare(laid_out, images, bfloat16=True),
        "encode_batch, bfloat16": lambda: encoder.encode_batch(images, BATCH, precision="bfloat16"),
    }
    exact = bare(encoder, images[:BATCH])
    results = {name: work() for name, work in sides.items()}
    costs: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for _ in range(args.turns):
        for name, work in sides.items():
            cpu, wall = time.process_time(), time.perf_counter()
            work()
            costs[name].append((time.process_time() - cpu, time.perf_counter() - wall))
    least = {name: min(turns) for name, turns in costs.items()}
    print(f"{args.maps} maps of 128 x 128, batches of {BATCH}, {args.threads} threads, least of {args.turns} turns")
    print(f"{'':38}  {'CPU s':>9}  {'wall s':>9}  {'CPU ms/map':>10}  {'least cosine':>12}")
    for name, result in results.items():
        cosine = float(F.cosine_similarity(result[:BATCH], exact).min())
        print(f"{name:38}  {least[name][0]:9.3f}  {least[name][1]:9.3f}  "
              f"{1000 * least[name][0] / args.maps:10.2f}  {cosine:12.6f}")  # fmt: skip
        if "bfloat16" in name:
            report_claim(f"cosine: {name}", cosine, 0.999)
    for precision in ("float32", "bfloat16"):
        ours, theirs = least[f"encode_batch, {precision}"], least[f"bare network, {precision}, channels last"]
        report_error(f"encode_batch_overhead_{precision}", ours[0] / theirs[0] - 1, 0.05)
    fewer, more = (peak_mib(count) for count in (256, 2048))
    print(f"peak beyond the input: {fewer:.0f} MiB for 256 maps, {more:.0f} MiB for 2048 (the result: 6 MiB)")
    report_error("encode_batch_memory_growth_mib", more - fewer, 16)


@torch.no_grad()
def bare(encoder: SemanticEncoder, images: Tensor, *, bfloat16: bool = False) -> Tensor:
    """Runs the network on the batches and nothing else."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        return torch.cat([encoder(batch).float() for batch in images.split(BATCH)])


def smooth_maps(count: int) -> Tensor:
    """Returns maps of smooth depth with a tenth of the pixels missing."""
    maps = F.interpolate(torch.rand(count, 1, 8, 8), size=(128, 128), mode="bilinear", align_corners=False)
    return torch.where(torch.rand_like(maps) < 0.1, torch.zeros(()), 0.1 + 0.9 * maps)


def peak_mib(count: int) -> float:
    """Returns the peak memory of encoding so many maps, beyond what was there before."""
    encoder, images = SemanticEncoder(widths=(8, 16, 32, 64)).eval(), smooth_maps(count)
    return measure(lambda: encoder.encode_batch(images, BATCH), torch.device("cpu"), 1).peak_mib or 0.0


if __name__ == "__main__":
    main()
