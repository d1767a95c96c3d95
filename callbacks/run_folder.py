"""Where the files of a run go."""

from pathlib import Path

from lightning.pytorch import Trainer


def run_folder(trainer: Trainer) -> Path:
    """Returns the folder of the run. All processes must ask at once: Lightning sends the answer from the first one."""
    return Path(trainer.log_dir or trainer.default_root_dir)
