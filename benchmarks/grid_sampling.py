"""What looking points up in a map of 56 x 56 gains over taking the 14 x 14 patches they fall in, on the demo's rooms.

Twice: without training, the dense teacher fused over the views with its tokens interpolated or taken as they are; and
after training, the whole encoder with ``encoder.upsample`` on and off. mIoU of ScanNet's 20 classes on rooms that are
not trained on.

    python -m benchmarks.grid_sampling [--steps 240] [--root data/mini_scannet]
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.demo import run
from benchmarks.measuring import report_claim
from datamodules.batches import SceneFrames
from datamodules.synthetic.mini_scannet import MiniScanNetDataModule
from lightning_modules.functional.projection import build_uv_index_batch, sample_views
from lightning_modules.metrics.point_segmentation import PointSegmentation
from lightning_modules.networks.bi_fusion.bi_fusion_encoder import patch_centres

CONFIG = "configs/bi_fusion/demo.yaml"


def main() -> None:
    """Runs the demo twice and reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--root", default=None, help="a world to use; by default one is made and thrown away")
    args = parser.parse_args()
    trained, costs = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        root = args.root or f"{folder}/world"
        for name, upsample in (("patches of 14 x 14", "false"), ("cells of 56 x 56", "true")):
            flags = [f"--data.init_args.root={root}", f"--trainer.logger.init_args.save_dir={folder}/{upsample}"]
            flags += [f"--model.init_args.encoder.upsample={upsample}", "--trainer.enable_progress_bar=false"]
            run_flags = [f"--trainer.max_steps={args.steps}", "--trainer.limit_val_batches=0"]
            costs[name] = run("fit", *flags, *run_flags, config=CONFIG)[1]
            run("test", *flags, "--ckpt_path=last", config=CONFIG)
            metrics = json.loads(Path(folder, upsample, "bi_fusion_demo", "test_metrics.json").read_text())
            trained[name] = metrics["test/miou_fused"]
        untrained = teacher_miou(root)
    print(f"{'':20}{'teacher mIoU':>14}{'trained mIoU':>14}{'fit CPU s':>11}")
    for name, miou in trained.items():
        print(f"{name:20}{untrained[name]:14.4f}{miou:14.4f}{costs[name]:11.1f}")
    patches, cells = trained
    report_claim("grid_sampling_teacher_gain", untrained[cells] - untrained[patches], 0)
    report_claim("grid_sampling_trained_gain", trained[cells] - trained[patches], 0, steps=args.steps)


@torch.no_grad()
def teacher_miou(root: str) -> dict[str, float]:
    """Returns the mIoU of the fused teacher on the test rooms, by patches and interpolated."""
    data = MiniScanNetDataModule(root, num_train_scenes=24, views_per_sample=4, max_points=2048)
    data.prepare_data()
    data.setup("test")
    names = data.class_names("scannet20")
    judged = {name: PointSegmentation(names) for name in ("patches of 14 x 14", "cells of 56 x 56")}
    texts = data.encode_text(names)
    for frames in data.test_dataloader():
        for name, metric in judged.items():
            features, seen = fused_teacher(frames, data.projection, nearest=name.startswith("patches"))
            metric.update(features[seen] @ texts.T, frames.labels["scannet20"][0][seen])
    return {name: float(metric.compute()["miou"]) for name, metric in judged.items()}


def fused_teacher(frames: SceneFrames, projection: torch.Tensor, *, nearest: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the teacher's mean over the views at the points of a batch of one, and where there is any."""
    points = frames.points[0][None, :, :3]
    index = build_uv_index_batch(
        points, frames.intrinsics, frames.camera_from_world, frames.image_size, frames.depth, has_frame=frames.has_frame
    )
    maps = F.normalize(torch.einsum("bvdhw,dc->bvchw", frames.tokens.float(), projection), dim=2)
    uv = patch_centres(index.uv, frames.image_size, maps.shape[-2:]) if nearest else index.uv
    mean, seen = sample_views(maps, uv, index.conf_2d, frames.image_size)
    return mean[0], seen[0]


if __name__ == "__main__":
    main()
