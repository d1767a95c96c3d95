"""A whole training step, three levels: sampled pixels in coefficient space, against three full-view dense steps.

The baseline is LangSplatV2's step, once per level: project, sort and blend the view, splat the [N, 64] soft codes,
decode to a [512, H, W] map, cosine loss against a dense target map, gradients of logits and codebook, Adam. It splats
with Lexel's own kernels. Ours is ``LanguageFieldModule``'s step: 4096 labelled pixels blended once for all levels
(projection and sorting are kept between steps, the scene is frozen), codes splatted, cosine through the Gram matrix,
gradients of logits and codebook, Adam. The two see different numbers of pixels: this is the cost of a step, not of a
result.

    python -m benchmarks.training_step [../shared/data] [--device cuda]
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.garden_render import DATA, read_garden
from benchmarks.measuring import measure, print_costs, report_claim
from lightning_modules.functional.language_field.coefficient_space import cosine_similarity_to_targets
from lightning_modules.functional.language_field.pixel_sampling import sample_labelled_pixels
from lightning_modules.functional.splatting.rasterization import (
    blending_weights,
    prepare_view,
    splat_codes,
    splat_dense,
)
from lightning_modules.networks.language_field import LanguageField

LEVELS, SIZE, TOP_K, CHANNELS = 3, 64, 4, 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?", default=DATA)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--pixels", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    scene, camera = read_garden(args.data, 0)
    scene = scene._make(part.to(args.device) for part in scene)
    camera = camera._replace(
        camera_from_world=camera.camera_from_world.to(args.device), intrinsics=camera.intrinsics.to(args.device)
    )
    # Masks are squares of 40 pixels, a level's own; a sixth of them are missing.
    rows, columns = torch.meshgrid(torch.arange(camera.height), torch.arange(camera.width), indexing="ij")
    squares = (rows // 40) * (camera.width // 40 + 1) + columns // 40
    num_masks = int(squares.max()) + 1
    mask_ids = torch.stack([torch.where(squares % 6 == level, -1, squares) for level in range(LEVELS)]).to(args.device)
    targets = F.normalize(torch.randn(num_masks, CHANNELS, device=args.device), dim=1)
    codebook = F.normalize(torch.randn(1, 1, SIZE, CHANNELS, device=args.device), dim=-1)

    field = LanguageField(scene.num_gaussians, LEVELS, codebook_size=SIZE, feature_dim=CHANNELS, top_k=TOP_K)
    field = field.to(args.device)
    entries = torch.rand(scene.num_gaussians, LEVELS, SIZE, device=args.device).topk(TOP_K).indices
    values = torch.full(entries.shape, 1 / TOP_K, device=args.device)
    field.set_lifted(codebook, entries, values, torch.ones(scene.num_gaussians, dtype=torch.bool, device=args.device))
    adam = torch.optim.Adam(field.parameters(), lr=2.5e-3, eps=1e-15)
    view = prepare_view(scene, camera)
    count = iter(range(10**9))

    def sampled_step() -> None:
        pixels = sample_labelled_pixels(mask_ids, args.pixels, (0, next(count)))
        weight_map = splat_codes(blending_weights(view, pixels), field.codes())
        loss = weight_map.new_zeros(())
        for level, ids in enumerate(mask_ids.flatten(1)[:, pixels]):
            weights, atoms = field.level_weights(weight_map, level), field.level_codebook(level)
            loss = loss + 1 - cosine_similarity_to_targets(weights, atoms, targets, ids).mean()
        adam.zero_grad(set_to_none=True)
        loss.backward()
        adam.step()

    ours = measure(sampled_step, args.device, 5 * args.repeats)

    logits = torch.randn(scene.num_gaussians, SIZE, device=args.device).requires_grad_()
    dense_codebook = codebook[0, 0].clone().requires_grad_()
    dense_adam = torch.optim.Adam([logits, dense_codebook], lr=2.5e-3, eps=1e-15)
    target_map = targets[mask_ids[0].clamp_min(0)].permute(2, 0, 1).contiguous()
    mask = mask_ids[:1] >= 0

    def full_view_step_of_one_level() -> None:
        soft = logits.softmax(1)
        kept, ids = soft.topk(TOP_K, dim=1)
        soft_code = torch.zeros_like(soft).scatter(1, ids, kept)
        soft_code = soft_code / (soft_code.sum(1, keepdim=True) + 1e-10)
        weight_map = splat_dense(blending_weights(prepare_view(scene, camera)), soft_code)
        features = (dense_codebook.T @ weight_map.T).unflatten(1, (camera.height, camera.width))
        loss = 1 - F.cosine_similarity(features * mask, target_map * mask, dim=0).mean()
        dense_adam.zero_grad(set_to_none=True)
        loss.backward()
        dense_adam.step()

    dense = measure(full_view_step_of_one_level, args.device, args.repeats)
    print(f"{camera.width}x{camera.height}, {scene.num_gaussians} Gaussians, {args.device}, {args.threads} threads")
    print_costs({"dense, one level": dense, f"sampled {args.pixels} pixels, three levels": ours})
    faster = 3 * (dense.cpu_s / ours.cpu_s if args.device.type == "cpu" else dense.wall_s / ours.wall_s)
    memory = None if dense.peak_mib is None or ours.peak_mib is None else dense.peak_mib / max(ours.peak_mib, 1)
    report_claim(
        "training_step_faster", faster, 10, less_memory=memory, one_dense_level=dense._asdict(), ours=ours._asdict()
    )


if __name__ == "__main__":
    main()
