"""What end-to-end tests do to a run: save it often, break it off, keep its losses."""

from typing import ClassVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer


def saved_every(steps: int) -> str:
    """Returns the flag that replaces a configuration's callbacks by checkpoints alone."""
    return (
        '--trainer.callbacks=[{"class_path": "callbacks.resumable_checkpoint.ResumableCheckpoint", '
        f'"init_args": {{"every_n_train_steps": {steps}}}}}]'
    )


class Killed(Callback):
    """Breaks a run off in the middle of a step, as a full disk or an impatient user would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError("killed")


def killed_at(step: int) -> list[str]:
    """Returns the flags that break a run off; after those that set its callbacks."""
    return ["--trainer.callbacks+=tests.end_to_end.watched_runs.Killed", f"--trainer.callbacks.step={step}"]


class LossRecorder(Callback):
    """Keeps the loss of each step; clear ``losses`` before the run."""

    losses: ClassVar[list[float]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        self.losses.append(float(trainer.callback_metrics["train/loss"]))


RECORDED = "--trainer.callbacks+=tests.end_to_end.watched_runs.LossRecorder"


def assert_equal_states(whole: dict[str, torch.Tensor], parts: dict[str, torch.Tensor]) -> None:
    """Compares two state dicts to the bit."""
    assert whole.keys() == parts.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, parts[name]), name
