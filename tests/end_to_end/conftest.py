"""One tiny tabletop world for all end-to-end tests, and a way to run the command line on it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from train import CommandLine, main

CONFIG = str(Path(__file__).parents[2] / "configs" / "language_field" / "demo.yaml")


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("worlds") / "tabletop"


@pytest.fixture
def lexel(world: Path, tmp_path: Path) -> Callable[..., CommandLine]:
    """Runs a command of the demo's configuration on the tiny world, in a folder of runs of its own."""

    def run(command: str, *flags: str, config: str = CONFIG, runs: Path = tmp_path) -> CommandLine:
        return main([command, "--config", config, *tiny_world(world), *tiny_trainer(runs), *flags])

    return run


def tiny_world(world: Path) -> list[str]:
    return [
        f"--data.init_args.root={world}",
        "--data.init_args.image_size=[96, 72]",
        "--data.init_args.num_gaussians=3000",
        "--data.init_args.num_train_views=6",
        "--data.init_args.objects_per_group=1",
    ]


def tiny_trainer(runs: Path) -> list[str]:
    return [
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
        f"--trainer.logger.init_args.save_dir={runs}",
        "--model.init_args.pixels_per_step=256",
        "--trainer.log_every_n_steps=1",
    ]
