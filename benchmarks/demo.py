"""The newcomer's two commands, fit and test of the demo, from nothing: time, and the figures they end with.

The baseline is the geometry itself: ``test/miou_ceiling``, every Gaussian with its true feature. Kernels are compiled
before, as a second run finds them; the world is made anew.

    python -m benchmarks.demo [--seed 1]
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.measuring import report_claim

CONFIG = "configs/language_field/demo.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1, help="of the world")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        flags = [f"--data.init_args.root={folder}/world", f"--data.init_args.seed={args.seed}"]
        flags += [f"--trainer.logger.init_args.save_dir={folder}/runs"]
        fit = run("fit", *flags)
        test = run("test", *flags, "--ckpt_path=last")
        metrics = json.loads(Path(folder, "runs", "language_field_demo", "test_metrics.json").read_text())
    print(f"{'':6}{'wall s':>8}{'CPU s':>8}")
    for name, (wall, cpu) in {"fit": fit, "test": test}.items():
        print(f"{name:6}{wall:8.1f}{cpu:8.1f}")
    for name, value in metrics.items():
        print(f"{name:44}{value:.4f}")
    minutes = (fit[0] + test[0]) / 60
    report_claim("demo_minutes_to_spare", 3 - minutes, 0, minutes=minutes, cpu_s=fit[1] + test[1], seed=args.seed)
    report_claim("demo_miou", metrics["test/miou"], 0.80)
    report_claim("demo_share_of_ceiling", metrics["test/miou"] / metrics["test/miou_ceiling"], 0.95)
    report_claim("demo_localization", metrics["test/localization_accuracy"], 0.95)


def run(command: str, *flags: str, config: str = CONFIG) -> tuple[float, float]:
    """Runs one command and returns its wall time and its processor time, seconds."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(
        [sys.executable, "train.py", command, "--config", config, *flags], check=True, stdout=subprocess.DEVNULL
    )
    after, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - start
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main()
