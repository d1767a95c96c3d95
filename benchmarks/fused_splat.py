"""Three levels of sparse codes to a weight map of 192 channels, against a sparse-dense product on the same weights.

12 codes per Gaussian (3 levels, the top 4 of 64 entries), all 648x420 pixels of the garden, single-threaded CPU time.
Every side makes its own output (209 MB). The baseline is torch's CSR matrix (MKL) times the codes as a dense
[N, 192] matrix, which is given to it for nothing; "as three levels" multiplies with [N, 64] three times.

Floor, for E = 16.6 million pixel-Gaussian pairs and P = 272,160 pixels:
    stored weights x codes    E (4 + 4) B in, P 192 4 B out = 0.34 GB; 12 E = 0.2 G scalar multiply-adds, each a load,
                              an add and a store to L1, one per cycle at best: 0.06 s at 3.5 GHz
    render_codes              no weights in; 16 pixels of a row share a Gaussian, so 12 vector multiply-adds for each of
                              1.9 million (strip, Gaussian) pairs, 0.01 s; P 192 4 B out; and the blending itself
    CSR x dense               192 E = 3.2 G multiply-adds, 0.03 s in 16-wide SIMD at two per cycle, and 768 E B = 13 GB
                              of rows through L2, 0.2 s

    python -m benchmarks.fused_splat [../shared/data]
"""

import argparse
import os
import time
import warnings
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # both are read by torch when it loads: no spinning threads,
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # and big tensors on huge pages

import torch

from benchmarks.garden_render import DATA, read_garden
from benchmarks.measuring import measure, print_costs, report_claim
from lightning_modules.functional.language_field.sparse_codes import SparseCodes, densify_codes
from lightning_modules.functional.splatting.rasterization import (
    blending_weights,
    prepare_view,
    render_codes,
    splat_codes,
    splat_dense,
)


def main() -> None:
    """Measures every side, compares the results and reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?", default=DATA)
    parser.add_argument("--view", type=int, default=0, choices=(0, 1, 2))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", message="Sparse")
    device = torch.device("cpu")
    scene, camera = read_garden(args.data, args.view)
    count, levels, size, top_k = scene.num_gaussians, 3, 64, 4

    generator = torch.Generator().manual_seed(0)
    entries = torch.rand(count, levels, size, generator=generator).topk(top_k, dim=-1).indices
    channel_ids = (entries + torch.arange(levels)[:, None] * size).flatten(1).short()
    values = torch.rand(count, levels, top_k, generator=generator)
    codes = SparseCodes(channel_ids, (values / values.sum(-1, keepdim=True)).flatten(1), levels * size)

    view = prepare_view(scene, camera)
    began = time.perf_counter()
    weights = blending_weights(view)
    splat_codes(weights, codes)
    compilation_s = time.perf_counter() - began
    dense = densify_codes(codes)
    by_level = [part.contiguous() for part in dense.split(size, dim=1)]
    matrix = torch.sparse_csr_tensor(
        weights.offsets.int(), weights.gaussian_ids, weights.weights, (camera.num_pixels, count)
    )
    costs = {
        "torch CSR x dense [N, 192]": measure(lambda: matrix @ dense, device, args.repeats),
        "torch CSR x dense, as three levels": measure(lambda: [matrix @ p for p in by_level], device, args.repeats),
        "splat_codes, stored weights": measure(lambda: splat_codes(weights, codes), device, args.repeats),
        "splat_dense, stored weights": measure(lambda: splat_dense(weights, dense), device, args.repeats),
        "render_codes, blending included": measure(lambda: render_codes(view, codes), device, args.repeats),
        "blending_weights": measure(lambda: blending_weights(view), device, args.repeats),
    }
    pairs = weights.weights.numel()
    print(f"{camera.width}x{camera.height}, {count} Gaussians, {pairs / 1e6:.1f} M pairs, {args.threads} threads")
    print_costs(costs)
    print(f"first call, kernels compiled or read from the cache: {compilation_s:.1f} s")
    expected = matrix @ dense
    error = max(
        float((result - expected).abs().max()) for result in (splat_codes(weights, codes), render_codes(view, codes)[0])
    )
    print(f"largest difference from the product: {error:.1e}")
    baseline, ours, fused = (
        costs[name]
        for name in ("torch CSR x dense [N, 192]", "splat_codes, stored weights", "render_codes, blending included")
    )
    details = {"baseline": baseline._asdict(), "pairs": pairs, "error": error}
    report_claim("fused_splat_on_the_same_weights", baseline.cpu_s / ours.cpu_s, 2, ours=ours._asdict(), **details)
    stored = baseline.cpu_s + costs["blending_weights"].cpu_s
    report_claim("fused_splat_with_blending", stored / fused.cpu_s, 2, ours=fused._asdict(), baseline_cpu_s=stored)


if __name__ == "__main__":
    main()
