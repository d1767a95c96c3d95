"""Suppression of redundant masks: LangSplat's loop over pairs against the matrix form, with the same decisions.

The masks are blobs with bays and holes, nested in threes (part, object, near copy of the object), of the sizes that
automatic masks have. The loop computes each pair's intersection and union from the two masks, as LangSplat does.

    python -m benchmarks.mask_nms [--device cuda]

On CPU the peak comes from ``MALLOC_MMAP_THRESHOLD_=65536 python -m benchmarks.mask_nms --only-matrix-form``: freed
blocks then leave the process, which is slow, but without which a peak of some MiB does not show.
"""

import argparse
import time

import torch
from torch import Tensor

from benchmarks.measuring import Cost, measure, print_costs, report_claim
from lightning_modules.functional.language_features.mask_nms import suppress_masks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--masks", type=int, default=300)
    parser.add_argument("--width", type=int, default=988)
    parser.add_argument("--height", type=int, default=730)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only-matrix-form", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    masks = nested_blobs(args.masks, args.height, args.width).to(args.device)
    scores = 0.65 + 0.35 * torch.rand(args.masks, device=args.device)
    ours = measure(lambda: suppress_masks(masks, scores), args.device, args.repeats)
    if args.only_matrix_form:
        print_costs({"matrix form": ours})
        return
    kept = suppress_masks(masks, scores)
    cpu, wall = time.process_time(), time.perf_counter()
    expected = loop_over_pairs(masks, scores)
    costs = {
        "matrix form": ours,
        "loop over pairs, once": Cost(time.process_time() - cpu, time.perf_counter() - wall, None),
    }
    assert kept.tolist() == expected, "the decisions differ"
    covered = float(masks.float().mean())
    print(
        f"{len(masks)} masks at {args.width}x{args.height} ({masks.numel() / 2**20:.0f} MiB, {covered:.1%} set), "
        f"{len(kept)} kept by both, {args.device}, {args.threads} threads"
    )
    print_costs(costs)
    seconds = {name: cost.cpu_s if args.device.type == "cpu" else cost.wall_s for name, cost in costs.items()}
    report_claim(
        "mask_nms_faster_same_decisions",
        seconds["loop over pairs, once"] / seconds["matrix form"],
        50,
        kept=len(expected),
        costs={name: cost._asdict() for name, cost in costs.items()},
    )


def loop_over_pairs(
    masks: Tensor, scores: Tensor, iou: float = 0.8, score: float = 0.7, inner: float = 0.5
) -> list[int]:
    """Decides pair by pair; returns the kept indices in rising order."""
    order = scores.sort(descending=True, stable=True).indices
    ranked = masks[order]
    areas = ranked.sum(dim=(1, 2), dtype=torch.float)
    overlap = torch.zeros(len(order), len(order), device=masks.device)
    containment = torch.zeros_like(overlap)
    for i in range(len(order)):
        for j in range(i, len(order)):
            shared = torch.logical_and(ranked[i], ranked[j]).sum(dtype=torch.float)
            overlap[i, j] = shared / torch.logical_or(ranked[i], ranked[j]).sum(dtype=torch.float)
            part_i, part_j = shared / areas[i], shared / areas[j]
            if part_i < 0.5 and part_j >= 0.85:
                containment[i, j] = 1 - part_j * part_i
            if part_i >= 0.85 and part_j < 0.5:
                containment[j, i] = 1 - part_j * part_i
    keep = (overlap.triu(diagonal=1).amax(dim=0) <= iou) & (scores[order] > score)
    for triangle in (containment.triu(diagonal=1), containment.tril(diagonal=1)):
        keep &= triangle.amax(dim=0) <= 1 - inner
    return order[keep].sort().values.tolist()


def nested_blobs(num_masks: int, height: int, width: int) -> Tensor:
    """Draws blobs in threes: an object, a near copy of it, and a part of it; one in ten objects has a hole."""
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    masks = torch.zeros(num_masks, height, width, dtype=torch.bool)
    for first in range(0, num_masks, 3):
        centre_y, centre_x = torch.rand(2) * torch.tensor([height, width])
        radius = max(height, width) * (0.015 + 0.15 * float(torch.rand(())) ** 3)
        waves = 0.12 * torch.randn(5)
        for index in range(first, min(first + 3, num_masks)):
            shift_y, shift_x = radius * 0.03 * torch.randn(2)
            dy, dx = y - centre_y - shift_y, x - centre_x - shift_x
            angle = torch.atan2(dy, dx)
            edge = 1 + sum(wave * torch.cos((k + 2) * angle + k) for k, wave in enumerate(waves))
            size = radius * (1.0, 1.02, 0.55)[index - first]
            distance = (dy.square() + dx.square()).sqrt()
            masks[index] = distance < size * edge
            if first % 30 == 0 and index == first:
                masks[index] &= distance > 0.2 * size
    return masks[masks.any(dim=(1, 2))]


if __name__ == "__main__":
    main()
