"""The RGB-D configuration on real photographs, from files to figures on the held-out one."""

import json
from pathlib import Path

from train import main

CONFIG = str(Path(__file__).parents[2] / "configs" / "language_field" / "rgbd.yaml")


def test_features_carry_over_to_the_held_out_photograph(shared_data, tmp_path):
    flags = [
        f"--data.init_args.source={shared_data / 'rgbd'}",
        f"--data.init_args.root={tmp_path / 'scene'}",
        f"--trainer.logger.init_args.save_dir={tmp_path}",
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
    ]
    main(["fit", "--config", CONFIG, *flags])
    main(["test", "--config", CONFIG, *flags, "--ckpt_path=last"])
    metrics = json.loads((tmp_path / "language_field_rgbd" / "test_metrics.json").read_text())
    assert metrics["test/coverage"] > 0.85  # the depth camera saw neither the sky nor the rim
    assert metrics["test/psnr_covered"] > 25
    assert metrics["test/cosine"] > metrics["test/cosine_shuffled"] + 0.05
    assert all(value == value for value in metrics.values())  # no NaN for what these photographs have none of
