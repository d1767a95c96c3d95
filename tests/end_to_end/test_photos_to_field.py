"""The whole chain on a tiny world: photographs -> Gaussians and language features -> field -> answers."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.end_to_end.conftest import tiny_world
from train import main

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.slow
def test_a_field_from_photographs_answers_nearly_as_one_from_the_worlds_own_masks(
    world: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    def run(command: str, config: str, name: str, *flags: str) -> Path:
        trainer = ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
        logger = [f"--trainer.logger.init_args.save_dir={tmp_path}", f"--trainer.logger.init_args.name={name}"]
        main([command, f"--config={CONFIGS / config}", *tiny_world(world), *trainer, *logger, *flags])
        return tmp_path / name

    def miou(name: str, *flags: str) -> float:
        run("fit", "language_field/demo.yaml", name, "--trainer.max_steps=0", *flags)
        folder = run("test", "language_field/demo.yaml", name, "--ckpt_path=last", *flags)
        return json.loads((folder / "test_metrics.json").read_text())["test/miou"]

    gaussians = run("fit", "gaussian_rgb/demo.yaml", "gaussians", "--trainer.max_steps=200") / "exports/gaussians.ply"
    run("predict", "preprocess/demo.yaml", "features", "--data.init_args.features=from_photos")
    own = miou("own")
    from_photos = miou("photos", "--data.init_args.features=from_photos", f"--data.init_args.gaussians={gaussians}")
    record_property("miou of the world's own masks and Gaussians", own)
    record_property("miou from photographs alone", from_photos)
    print(f"mIoU: {own:.3f} of the world's own masks and Gaussians, {from_photos:.3f} from photographs alone")
    assert from_photos > 0.5 * own
