"""The RGB-D configuration on real photographs, from files to figures on the held-out one."""

import json
from pathlib import Path

import pytest

from benchmarks import real_photos
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


@pytest.mark.slow
def test_trained_gaussians_and_extracted_features_carry_over_to_the_held_out_photograph(
    shared_data, tmp_path, monkeypatch
):
    def in_this_process(command: str, *flags: str, config: str) -> tuple[float, float]:
        quiet = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
        main([command, "--config", str(Path(__file__).parents[2] / config), *flags, *quiet])
        return 0.0, 0.0

    monkeypatch.setattr(real_photos, "run", in_this_process)
    figures = real_photos.measure_chain(shared_data / "rgbd", tmp_path, steps=40, size=(320, 240))
    depth, trained = figures["Gaussians as depth has them"], figures["Gaussians trained"]
    assert trained["psnr_covered"] > depth["psnr_covered"] + 1
    for metrics in (depth, trained):
        assert metrics["cosine"] > metrics["cosine_shuffled"] + 0.05
