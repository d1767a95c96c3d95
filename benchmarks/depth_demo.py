"""The depth demo from nothing: fit and test, time and the figures they end with.

The baselines stand beside: nearest neighbours and probe by depth itself on a 16 x 16 grid (``..._of_pixels``). Kinds of
scenes are six, so chance is 17 %.

    python -m benchmarks.depth_demo
"""

import argparse
import json
import tempfile
from pathlib import Path

from benchmarks.demo import run
from benchmarks.measuring import report_claim, report_error

CONFIG = "configs/depth_autoencoder/demo.yaml"


def main() -> None:
    """Runs both commands in an empty folder and reports."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        flags = [f"--data.init_args.root={folder}/world", f"--trainer.logger.init_args.save_dir={folder}/runs"]
        fit = run("fit", *flags, config=CONFIG)
        test = run("test", *flags, "--ckpt_path=last", config=CONFIG)
        metrics = json.loads(Path(folder, "runs", "depth_autoencoder_demo", "test_metrics.json").read_text())
    print(f"{'':6}{'wall s':>8}{'CPU s':>8}")
    for name, (wall, cpu) in {"fit": fit, "test": test}.items():
        print(f"{name:6}{wall:8.1f}{cpu:8.1f}")
    for name, value in metrics.items():
        print(f"{name:44}{value:.4f}")
    minutes = (fit[0] + test[0]) / 60
    report_claim("depth_demo_minutes_to_spare", 4 - minutes, 0, minutes=minutes, cpu_s=fit[1] + test[1])
    report_error("depth_demo_mae_fraction", metrics["test/mae_fraction"], 0.03)
    report_claim("depth_demo_neighbour_agreement", metrics["test/neighbour_agreement"], 0.8)


if __name__ == "__main__":
    main()
