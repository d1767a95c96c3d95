"""The Bi-Fusion demo from nothing: fit and test, time and the figures they end with; then the same without labels.

Two baselines stand beside, computed in the same pass over rooms that are not trained on: the 2D teacher fused over the
views, and OpenScene's ensemble of it and the 3D branch.

    python -m benchmarks.bi_fusion_demo [--labelled-only]
"""

import argparse
import json
import tempfile
from pathlib import Path

from benchmarks.demo import run
from benchmarks.measuring import report_claim

CONFIG = "configs/bi_fusion/demo.yaml"
WITHOUT_LABELS = (
    "--model.init_args.losses.text=0",
    "--model.init_args.losses.distillation=1",
    "--model.init_args.encoder.centring=1",  # nothing else takes the common favourites off
    "--trainer.max_steps=100",  # then the noise begins to be learned
)


def main() -> None:
    """Runs the commands in an empty folder and reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labelled-only", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report("labels", folder)
        if not args.labelled_only:
            report("label_free", folder, *WITHOUT_LABELS)


def report(name: str, folder: str, *settings: str) -> None:
    """Trains and tests once, and prints what came out."""
    flags = [f"--data.init_args.root={folder}/world", f"--trainer.logger.init_args.save_dir={folder}/{name}", *settings]
    fit = run("fit", *flags, config=CONFIG)
    test = run("test", *flags, "--ckpt_path=last", config=CONFIG)
    metrics = json.loads(Path(folder, name, "bi_fusion_demo", "test_metrics.json").read_text())
    print(f"{name:12}{'wall s':>8}{'CPU s':>8}")
    for command, (wall, cpu) in {"fit": fit, "test": test}.items():
        print(f"{command:12}{wall:8.1f}{cpu:8.1f}")
    for figure, value in metrics.items():
        print(f"{figure:52}{value:.4f}")
    if name == "labels":
        minutes = (fit[0] + test[0]) / 60
        report_claim("bi_fusion_demo_minutes_to_spare", 5 - minutes, 0, minutes=minutes, cpu_s=fit[1] + test[1])
    fused = metrics["test/miou_fused"]
    for baseline in ("teacher_2d", "ensemble"):
        gain = fused - metrics[f"test/miou_{baseline}"]
        report_claim(f"bi_fusion_{name}_above_{baseline}", gain, 0.05, miou_fused=fused)


if __name__ == "__main__":
    main()
