"""Features of a photograph's masks, without the network that finds the masks: tiles and CLIP.

One mask at a time (cut out of a copy of the photograph, resized, encoded in float32) against all tiles at once, encoded
in batches: in float32, and under autocast as ``OpenClipTiles`` does it. ViT-B/16 of OpenCLIP's class, random weights.

    python -m benchmarks.feature_tiles [--device cuda]
"""

import argparse

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.mask_nms import nested_blobs
from benchmarks.measuring import measure, print_costs, report_claim, report_error
from lightning_modules.functional.language_features.mask_tiles import mask_tiles
from lightning_modules.functional.open_clip_loading import image_tower
from lightning_modules.networks.mask_features import TileEncoder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--model", default="ViT-B-16")
    parser.add_argument("--masks", type=int, default=24)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--width", type=int, default=988)
    parser.add_argument("--height", type=int, default=730)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    tower = image_tower(open_clip.create_model(args.model)).to(args.device)
    encoders = {
        "tiles in batches, float32": TileEncoder(tower, args.batch_size, "float32"),
        "tiles in batches, autocast": TileEncoder(tower, args.batch_size),
    }
    size = encoders["tiles in batches, float32"].tile_size
    photo = torch.randint(0, 256, (args.height // 10, args.width // 10, 3), dtype=torch.uint8)
    photo = photo.repeat_interleave(10, 0).repeat_interleave(10, 1)
    masks = nested_blobs(args.masks, *photo.shape[:2])
    on_device = photo.to(args.device), masks.to(args.device)
    features: dict[str, Tensor] = {}

    def run(name: str) -> None:
        features[name] = encoders[name](mask_tiles(*on_device, size))

    def one_by_one() -> None:
        cut = (single_tile(photo.numpy(), mask.numpy(), size) for mask in masks)
        features["one mask at a time"] = torch.cat([encode_one(tower, tile.to(args.device)) for tile in cut])

    costs = {
        "tiles alone": measure(lambda: mask_tiles(*on_device, size), args.device, args.repeats),
        **{name: measure(lambda name=name: run(name), args.device, args.repeats) for name in encoders},
        "one mask at a time": measure(one_by_one, args.device, args.repeats),
    }
    print(
        f"{len(masks)} masks of a photo of {photo.shape[1]}x{photo.shape[0]}, {args.model}, batches of "
        f"{args.batch_size}, {args.device}, {args.threads} threads"
    )
    print_costs(costs)
    seconds = {name: cost.cpu_s if args.device.type == "cpu" else cost.wall_s for name, cost in costs.items()}
    details = {name: cost._asdict() for name, cost in costs.items()}
    slow = seconds["one mask at a time"]
    report_claim("features_faster_than_one_by_one", slow / seconds["tiles in batches, autocast"], 3, costs=details)
    report_claim("features_faster_than_one_by_one_in_float32", slow / seconds["tiles in batches, float32"])
    literal = features["one mask at a time"]
    for name in encoders:
        error = float(1 - (features[name] * literal).sum(dim=1).min())
        report_error(f"cosine_distance_of_{name.split(', ')[1]}", error, at_most=1e-3)


def single_tile(photo: np.ndarray, mask: np.ndarray, size: int) -> Tensor:
    """Cuts out one mask: black background, complete box, centred square, bilinear."""
    picture = photo.copy()
    picture[~mask] = 0
    rows, columns = mask.any(axis=1).nonzero()[0], mask.any(axis=0).nonzero()[0]
    crop = picture[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    side = max(crop.shape[:2])
    square = np.zeros((side, side, 3), np.uint8)
    top, left = (side - crop.shape[0]) // 2, (side - crop.shape[1]) // 2
    square[top : top + crop.shape[0], left : left + crop.shape[1]] = crop
    pixels = torch.from_numpy(square).permute(2, 0, 1)[None].float()
    return F.interpolate(pixels, (size, size), mode="bilinear").round()


@torch.no_grad()
def encode_one(tower: nn.Module, tile: Tensor) -> Tensor:
    """Encodes one tile in float32."""
    mean, std = (
        tile.new_tensor(x).view(3, 1, 1) for x in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    )
    return F.normalize(tower((tile / 255 - mean) / std), dim=-1)


if __name__ == "__main__":
    main()
