"""From photographs to answers with nothing else at hand: its Gaussians and masks against the world's own.

On the tabletop world: Gaussians trained from its photographs and COLMAP points, masks found without weights, each
described by the world's own feature of what it covers (the stand-in for CLIP), a field on both, LERF's protocol. The
baselines are the same field on the world's own Gaussians and masks, one replaced at a time. The world is made anew.

    python -m benchmarks.photo_chain [--seed 1]
"""

import argparse
import json
import tempfile
from pathlib import Path

from benchmarks.demo import CONFIG, run
from benchmarks.measuring import report_claim

RGB_CONFIG = "configs/gaussian_rgb/demo.yaml"
FEATURES_CONFIG = "configs/preprocess/demo.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1, help="of the world")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        world = [f"--data.init_args.root={folder}/world", f"--data.init_args.seed={args.seed}"]
        world.append(f"--trainer.logger.init_args.save_dir={folder}/runs")
        times = {
            "train Gaussians": run("fit", *world, config=RGB_CONFIG),
            "test Gaussians": run("test", *world, "--ckpt_path=last", config=RGB_CONFIG),
            "masks and features": run("predict", *world, config=FEATURES_CONFIG),
        }
        trained = [f"--data.init_args.gaussians={folder}/runs/gaussian_rgb_demo/exports/gaussians.ply"]
        found = ["--data.init_args.features=language_features_from_photos"]
        fields = {
            "world's Gaussians, world's masks": [],
            "world's Gaussians, masks of the photos": found,
            "trained Gaussians, world's masks": trained,
            "trained Gaussians, masks of the photos": trained + found,
        }
        figures = {}
        for number, (name, flags) in enumerate(fields.items()):
            own = [*world, *flags, f"--trainer.logger.init_args.name=field_{number}"]
            times[name] = run("fit", *own, config=CONFIG)
            run("test", *own, "--ckpt_path=last", config=CONFIG)
            figures[name] = json.loads(Path(folder, "runs", f"field_{number}", "test_metrics.json").read_text())
        rgb = json.loads(Path(folder, "runs", "gaussian_rgb_demo", "test_metrics.json").read_text())
    print(f"{'':40}{'wall s':>8}{'CPU s':>8}")
    for name, (wall, cpu) in times.items():
        print(f"{name:40}{wall:8.1f}{cpu:8.1f}")
    print(f"{'':40}{'mIoU':>8}{'localized':>11}{'PSNR':>8}")
    for name, metrics in figures.items():
        columns = (metrics[f"test/{key}"] for key in ("miou", "localization_accuracy", "psnr"))
        print("{:40}{:8.3f}{:11.3f}{:8.2f}".format(name, *columns))
    report_claim(
        "rgb_demo_psnr", rgb["test/psnr"], 28.0, ssim=rgb["test/ssim"], minutes=times["train Gaussians"][0] / 60
    )
    whole, own = figures["trained Gaussians, masks of the photos"], figures["world's Gaussians, world's masks"]
    report_claim("photo_chain_miou", whole["test/miou"], worlds_own=own["test/miou"], seed=args.seed)


if __name__ == "__main__":
    main()
