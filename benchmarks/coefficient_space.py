"""Weight map -> cosine loss -> gradients of weight map and codebook: coefficient space against dense feature maps.

The dense side is LangSplatV2's training step from the weight map on: ``codebook^T @ W``, then
``1 - cosine_similarity(a * m, b * m, dim=0).mean()`` on [512, H, W] maps. Splatting is left out on both sides. The
dense map of targets, which LangSplatV2 makes in each step, counts as given, in time and in memory.

    python -m benchmarks.coefficient_space [--device cuda]
"""

import argparse

import torch
import torch.nn.functional as F

from benchmarks.measuring import measure, print_costs, report_claim, report_error
from lightning_modules.functional.language_field.coefficient_space import cosine_similarity_to_targets


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--width", type=int, default=640)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--size", type=int, default=64, help="entries of the codebook")
    parser.add_argument("--channels", type=int, default=512)
    parser.add_argument("--masks", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    pixels = args.width * args.height
    weights = F.normalize(torch.rand(pixels, args.size, device=args.device).pow(8), p=1, dim=1)
    codebook = F.normalize(torch.randn(args.size, args.channels, device=args.device) + 1, dim=1)
    targets = F.normalize(torch.randn(args.masks, args.channels, device=args.device) + 1, dim=1)
    ids = torch.randint(args.masks, (pixels,), device=args.device)
    gradients = {}

    def step_in_coefficient_space() -> None:
        leaves = weights.requires_grad_(), codebook.requires_grad_()
        loss = 1 - cosine_similarity_to_targets(*leaves, targets, ids).mean()
        gradients["ours"] = torch.autograd.grad(loss, leaves)

    ours = measure(step_in_coefficient_space, args.device, args.repeats)

    # LangSplatV2's layout is channel-first; each side gets its own, without conversion inside the timing.
    weight_map = weights.detach().T.contiguous().unflatten(1, (args.height, args.width))
    target_map = targets[ids].T.contiguous().unflatten(1, (args.height, args.width))
    mask = torch.ones(1, args.height, args.width, dtype=torch.bool, device=args.device)

    def step_on_dense_maps() -> None:
        leaves = weight_map.requires_grad_(), codebook.detach().requires_grad_()
        feature_map = (leaves[1].T @ leaves[0].flatten(1)).unflatten(1, weight_map.shape[1:])
        loss = 1 - F.cosine_similarity(feature_map * mask, target_map * mask, dim=0).mean()
        gradients["dense"] = torch.autograd.grad(loss, leaves)

    dense = measure(step_on_dense_maps, args.device, args.repeats)

    mine, reference = gradients["ours"], (gradients["dense"][0].flatten(1).T, gradients["dense"][1])
    error = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(mine, reference, strict=True))
    print(
        f"{args.width}x{args.height}, {args.size} entries, {args.channels} channels, {args.device}, "
        f"{args.threads} threads; peak memory beside the inputs"
    )
    print_costs({"dense maps": dense, "coefficient space": ours})
    faster = dense.cpu_s / ours.cpu_s if args.device.type == "cpu" else dense.wall_s / ours.wall_s
    report_claim("coefficient_space_faster", faster, 8, dense=dense._asdict(), ours=ours._asdict())
    if dense.peak_mib is not None and ours.peak_mib is not None:
        report_claim("coefficient_space_less_memory", dense.peak_mib / ours.peak_mib, 6)
    report_error("coefficient_space_gradient_difference_relative_to_the_largest", error, at_most=1e-5)


if __name__ == "__main__":
    main()
