"""Five posed RGB-D photographs through the whole chain, four to learn from and the fifth to compare with.

Depth of four photographs becomes Gaussians, which train on those four; masks come from graph-based segmentation and
features from OpenCLIP's class with a small seeded random image tower, by the extraction that users run; a field is
lifted and polished on four views. The baselines are the Gaussians as depth has them, and features in random order.

    python -m benchmarks.real_photos ../shared/data/rgbd [--steps 200]
"""

import argparse
import json
import tempfile
from pathlib import Path

from benchmarks.demo import run
from benchmarks.measuring import report_claim

SCENE_CONFIG = "configs/language_field/rgbd.yaml"
RGB_CONFIG = "configs/gaussian_rgb/colmap.yaml"
FEATURES_CONFIG = "configs/preprocess/laptop.yaml"
FIELD_CONFIG = "configs/language_field/lerf.yaml"
FEATURES = "features_from_photos"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder with color, depth, trajectory.log and camera_primesense.json")
    parser.add_argument("--steps", type=int, default=200, help="of training the Gaussians")
    parser.add_argument("--size", type=int, nargs=2, default=(320, 240), help="width and height of the photographs")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure_chain(args.source, Path(folder), args.steps, tuple(args.size))
    keys = ("psnr", "psnr_covered", "coverage", "cosine", "cosine_shuffled", "cpu_s")
    print(f"{'':28}" + "".join(f"{key:>17}" for key in keys))
    for name, metrics in figures.items():
        print(f"{name:28}" + "".join(f"{metrics[key]:17.3f}" for key in keys))
    trained = figures["Gaussians trained"]
    report_claim("real_photos_cosine_over_shuffled", trained["cosine"] - trained["cosine_shuffled"], 0.05, **trained)


def measure_chain(source: Path, folder: Path, steps: int, size: tuple[int, int]) -> dict[str, dict[str, float]]:
    """Runs all commands and returns the fifth photograph's figures, with Gaussians as depth has them and trained."""
    runs = [f"--trainer.logger.init_args.save_dir={folder / 'runs'}"]
    rgbd = [*runs, f"--data.init_args.source={source}", f"--data.init_args.root={folder / 'scene'}"]
    scene_s = run(
        "fit", *rgbd, f"--data.init_args.image_size={list(size)}", "--trainer.max_steps=0", config=SCENE_CONFIG
    )[1]
    scene = [*runs, f"--data.init_args.root={folder / 'scene'}"]
    features_s = run(
        "predict", *scene, f"--data.init_args.features={FEATURES}", "--data.init_args.resolution=-1",
        "--model.init_args.describer=lightning_modules.networks.mask_features.RandomTiles", config=FEATURES_CONFIG,
    )[1]  # fmt: skip
    held_out = '--data.init_args.held_out=["00004"]'
    rgb_s = run(
        "fit", *scene, held_out, "--data.init_args.gaussians=gaussians.ply", f"--trainer.max_steps={steps}",
        "--trainer.limit_val_batches=0", config=RGB_CONFIG,
    )[1]  # fmt: skip
    trained = folder / "runs" / "gaussian_rgb_colmap" / "exports" / "gaussians.ply"
    figures = {}
    for name, gaussians, seconds in (
        ("Gaussians as depth has them", "gaussians.ply", scene_s + features_s),
        ("Gaussians trained", str(trained), scene_s + features_s + rgb_s),
    ):
        field = [
            *scene, held_out, f"--data.init_args.gaussians={gaussians}", f"--data.init_args.features={FEATURES}",
            "--data.init_args.text=null", f"--trainer.logger.init_args.name={name}", "--trainer.max_epochs=15",
            "--model.init_args.codebook_size=128", "--trainer.limit_val_batches=0",
        ]  # fmt: skip
        seconds += run("fit", *field, config=FIELD_CONFIG)[1]
        run("test", *field, "--ckpt_path=last", config=FIELD_CONFIG)
        metrics = json.loads((folder / "runs" / name / "test_metrics.json").read_text())
        figures[name] = {key.removeprefix("test/"): value for key, value in metrics.items()} | {"cpu_s": seconds}
    return figures


if __name__ == "__main__":
    main()
