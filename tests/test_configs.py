"""Every file of configs/ runs, or changes how one that runs is run."""

from pathlib import Path

import pytest

import train

CONFIGS = Path(__file__).parents[1] / "configs"
WAYS_TO_RUN = sorted((CONFIGS / "trainer").glob("*.yaml"))
EXPERIMENTS = sorted(set(CONFIGS.rglob("*.yaml")) - set(WAYS_TO_RUN))


@pytest.fixture
def no_fit(monkeypatch):
    """Everything is built from the configuration, nothing is run."""
    monkeypatch.setattr(train.LexelTrainer, "fit", lambda self, model, **kwargs: None)


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_experiment_builds_its_classes(path, no_fit, tmp_path):
    command_line = train.main(["fit", "--config", str(path), f"--trainer.logger.init_args.save_dir={tmp_path}"])
    assert type(command_line.model).__name__ in path.read_text()
    assert type(command_line.datamodule).__name__ in path.read_text()


@pytest.mark.parametrize("path", WAYS_TO_RUN, ids=lambda path: path.stem)
def test_every_way_to_run_combines_with_an_experiment(path, no_fit, tmp_path):
    demo = CONFIGS / "language_field" / "demo.yaml"
    flags = ["--trainer.accelerator=cpu", "--trainer.devices=1", f"--trainer.logger.init_args.save_dir={tmp_path}"]
    command_line = train.main(["fit", "--config", str(demo), "--config", str(path), *flags])
    assert command_line.trainer.num_devices == 1


def test_each_kind_of_experiment_has_a_demo():
    for folder in {path.parent for path in EXPERIMENTS}:
        assert (folder / "demo.yaml").is_file(), folder
