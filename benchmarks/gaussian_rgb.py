"""The demo of RGB Gaussians, fit and test from nothing: time, and PSNR on the held-out views.

The baseline is the world's own Gaussians, which know the surfaces but no photograph, rendered in the same views.

    python -m benchmarks.gaussian_rgb [--seed 1]
"""

import argparse
import json
import tempfile
from pathlib import Path

from benchmarks.demo import run
from benchmarks.measuring import report_claim
from datamodules.posed_views import PosedViewsDataModule
from datamodules.readers.gaussians import read_gaussians
from lightning_modules.functional.splatting.image_quality import peak_signal_to_noise
from lightning_modules.functional.splatting.rasterization import prepare_view, render

CONFIG = "configs/gaussian_rgb/demo.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1, help="of the world")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        world = Path(folder, "world")
        flags = [f"--data.init_args.root={world}", f"--data.init_args.seed={args.seed}"]
        flags += [f"--trainer.logger.init_args.save_dir={folder}/runs"]
        fit = run("fit", *flags, config=CONFIG)
        test = run("test", *flags, "--ckpt_path=last", config=CONFIG)
        metrics = json.loads(Path(folder, "runs", "gaussian_rgb_demo", "test_metrics.json").read_text())
        world_psnr = psnr_of_own_gaussians(world)
    print(f"{'':6}{'wall s':>8}{'CPU s':>8}")
    for name, (wall, cpu) in {"fit": fit, "test": test}.items():
        print(f"{name:6}{wall:8.1f}{cpu:8.1f}")
    for name, value in {**metrics, "PSNR of the world's own Gaussians": world_psnr}.items():
        print(f"{name:44}{value:.4f}")
    minutes = (fit[0] + test[0]) / 60
    report_claim("gaussian_rgb_psnr", metrics["test/psnr"], 28, seed=args.seed)
    report_claim(
        "gaussian_rgb_minutes_to_spare", 5 - minutes, 0, minutes=minutes, cpu_s=fit[1] + test[1], seed=args.seed
    )


def psnr_of_own_gaussians(world: Path) -> float:
    """Returns the mean PSNR, in the held-out views, of the Gaussians that the world was made with."""
    data = PosedViewsDataModule(world)
    data.setup("test")
    scene = read_gaussians(world / "gaussians.ply")
    values = [
        peak_signal_to_noise(render(scene, prepare_view(scene, view.camera)).rgb, view.image.flatten(0, 1) / 255)
        for view in data.test_views
    ]
    return float(sum(values)) / len(values)


if __name__ == "__main__":
    main()
