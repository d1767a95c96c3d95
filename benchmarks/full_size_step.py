"""One training step of the full-size shape tokenizer (512 channels, 8192 codes of 64): time and peak memory.

The peak is the process's own, libraries, weights, gradients and AdamW's two moments included, so on CPU each setting
takes a process of its own. The voxels are those within four of a sphere's surface.

    python -m benchmarks.full_size_step [--resolution 64 --down-factor 4] [--autocast] [--checkpointing] [--device cuda]
"""

import argparse
import resource
import time

import torch
import torch.nn.functional as F

from benchmarks.measuring import report_error
from benchmarks.sdf_alignment import sphere_voxels
from lightning_modules.networks.sdf_vqvae.sparse_sdf_vqvae import SparseSDFVQVAE
from lightning_modules.networks.sdf_vqvae.sparse_tensor import SparseTensor, Voxels

LIMIT_GIB = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--down-factor", type=int, default=4)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--backend", default="torch", choices=("torch", "spconv"))
    parser.add_argument("--autocast", action="store_true", help="bfloat16")
    parser.add_argument("--checkpointing", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    network = SparseSDFVQVAE(down_factor=args.down_factor, backend=args.backend, checkpointing=args.checkpointing).to(
        args.device
    )
    optimizer = torch.optim.AdamW(network.parameters())
    coords = sphere_voxels(args.resolution).coords.to(args.device)
    centred = coords[:, 1:] - (args.resolution - 1) / 2
    distances = (centred.norm(dim=1, keepdim=True) - 0.34 * args.resolution) / 4
    latents = 0
    for step in range(args.steps):
        cpu, wall = time.process_time(), time.perf_counter()
        sdf = SparseTensor(distances, Voxels(coords, args.resolution, 1, is_sorted=True))
        with torch.autocast(args.device.type, torch.bfloat16, enabled=args.autocast):
            result = network(sdf)
            codes = result.quantized
            loss = F.l1_loss(result.aligned, sdf.feats)
            loss = loss + codes.codebook_loss.mean() + 0.25 * codes.commitment_loss.mean()
            for logits, occupied in zip(result.decoded.occupancy, result.decoded.occupied, strict=True):
                loss = loss + F.binary_cross_entropy_with_logits(logits.float(), occupied.float())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        latents = len(codes.code_ids)
        print(
            f"step {step}: loss {loss.item():.4f}, {time.process_time() - cpu:.2f} s of CPU, "
            f"{time.perf_counter() - wall:.2f} s elapsed"
        )
    if args.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(args.device) / 2**30
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux
    size = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    print(
        f"{size:.1f} M parameters, {args.resolution}^3 to {args.resolution // args.down_factor}^3: "
        f"{len(coords)} voxels, {latents} latents, peak {peak:.2f} GiB"
    )
    report_error(f"sdf_full_size_step_{args.resolution}_gib", peak, LIMIT_GIB)


if __name__ == "__main__":
    main()
