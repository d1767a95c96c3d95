"""The VQVAE demo from nothing: fit and test, time, and the figures they end with, on solids that were not trained on.

Shapes are decoded from tokens alone.

    python -m benchmarks.sdf_vqvae_demo [--seed 1]
"""

import argparse
import json
import tempfile
from pathlib import Path

from benchmarks.demo import run
from benchmarks.measuring import report_claim

CONFIG = "configs/sdf_vqvae/demo.yaml"


def main() -> None:
    """Runs both commands in an empty folder and reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of the solids")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        flags = [f"--data.init_args.root={folder}/solids", f"--data.init_args.world_seed={args.seed}"]
        flags += [f"--trainer.logger.init_args.save_dir={folder}/runs"]
        fit = run("fit", *flags, config=CONFIG)
        test = run("test", *flags, "--ckpt_path=last", config=CONFIG)
        metrics = json.loads(Path(folder, "runs", "sdf_vqvae_demo", "test_metrics.json").read_text())
    print(f"{'':6}{'wall s':>8}{'CPU s':>8}")
    for name, (wall, cpu) in {"fit": fit, "test": test}.items():
        print(f"{name:6}{wall:8.1f}{cpu:8.1f}")
    for name, value in metrics.items():
        print(f"{name:32}{value:.4f}")
    minutes = (fit[0] + test[0]) / 60
    report_claim("sdf_demo_minutes_to_spare", 6 - minutes, 0, minutes=minutes, cpu_s=fit[1] + test[1], seed=args.seed)
    report_claim("sdf_demo_sign_iou", metrics["test/sign_iou"], 0.90)
    report_claim("sdf_demo_f_score_64", metrics["test/f_score_64"], 0.95)
    report_claim("sdf_demo_codebook_usage", metrics["test/codebook_usage"], 0.5)


if __name__ == "__main__":
    main()
